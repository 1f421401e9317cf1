"""The model that ships with the package, and the hundred function heads that measure it."""

import ast
import hashlib
import json

import pytest

from scripts.function_heads import HEADS, NEW_TOKENS, body_end, defect, loops, score_heads

FUNCTION = 'def double(x):\n    """Return twice x."""\n'
METHOD = 'class Box:\n    """A box."""\n\n    def get(self):\n'


def test_the_heads_are_the_same_hundred_for_ever():
    assert len(HEADS) == len(set(HEADS)) == 100
    assert hashlib.sha256("".join(HEADS).encode()).hexdigest() == (
        "96e3ef8121e5f277132a209c80368de2dc77f7b5bd9b5fceef4225f4acd722e3"
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_the_beginning_of_a_program_and_none_by_itself(head):
    indentation = "        " if "    def " in head else "    "
    ast.parse(f"{head}{indentation}return_value = 1\n")
    assert defect(head, f"{indentation}return_value = 1\n") is None
    assert defect(head, "") in ("syntax", "trivial")


@pytest.mark.parametrize(
    "head, continuation, kept",
    [
        (FUNCTION, "    return 2 * x\n\n\ndef f():\n    pass\n", "    return 2 * x\n\n\n"),
        (FUNCTION, "    return 2 * x\n# done", "    return 2 * x\n"),
        (FUNCTION, "    if x:\n\n        return 2 * x\n", None),
        (FUNCTION, "print(1)\n", ""),
        (METHOD, "        return self.x\n\n    def set(self):\n        pass\n", "        return self.x\n\n"),
        (METHOD, "        return self.x\n    @property", "        return self.x\n"),
        (METHOD, "        return self.x\n  ", None),
        (
            "class Box:\n",
            "    x = 1\n\n    def f(self):\n        pass\nBox()",
            "    x = 1\n\n    def f(self):\n        pass\n",
        ),
    ],
)
def test_a_body_ends_where_the_indentation_returns(head, continuation, kept):
    end = body_end(head, continuation)
    assert (None if end is None else continuation[:end]) == kept


@pytest.mark.parametrize(
    "head, continuation, wrong",
    [
        (FUNCTION, "    return 2 * x\n", None),
        (FUNCTION, "    return 2 * (x\n", "syntax"),
        (FUNCTION, "    if x:\n", "syntax"),
        (FUNCTION, '    """And more."""\n    ...\n', "trivial"),
        (FUNCTION, "    pass\n", "trivial"),
        (FUNCTION, "    raise NotImplementedError('later')\n", "trivial"),
        (FUNCTION, "    raise ValueError(x)\n", None),
        (FUNCTION, "    return '\\d'\n", None),  # a warning of the parser, no error
        (FUNCTION, "    return '\0'\n", "syntax"),
        (METHOD, "        return self.x\n", None),
        (METHOD, "        pass\n", "trivial"),
        (METHOD, "        x = 1\n      y = 2\n", "syntax"),
    ],
)
def test_what_is_wrong_with_a_function(head, continuation, wrong):
    assert defect(head, continuation) == wrong


@pytest.mark.parametrize(
    "ids, looping",
    [
        ([7] * 21, True),
        ([7] * 20, False),  # nineteen of them repeat the first
        ([1, 2, 3] * 8, True),
        ([1, 2, 3] * 7, False),
        ([*range(30), *range(30)], True),
        ([*range(30), *range(29), 99, 98], False),
        ([*range(30), 99, *range(30)], False),  # not right before
        ([*range(100, 200), *[5] * 25, *range(100)], True),
        ([], False),
    ],
)
def test_a_loop_repeats_what_stands_right_before_it(ids, looping):
    assert loops(ids) == looping


def test_the_score_counts_what_is_complete_and_says_what_is_not():
    """Tokens are characters here."""
    continuations = [
        "    return 2 * x\n\n\ndef ",  # ends in time
        "    return 2 * x",  # the model ends the text
        "    return 2 * x\n    y = (",  # cut after the last full line, as its length is the limit
        "    return 2 * (",  # nothing is left after the cut
        "    return 2 * x\nprint(" + "1" * 30,  # loops behind its end
        "    return " + "1" * 30 + "\n",
        "    return )\n",
        "    pass\n",
    ]
    limit = len(continuations[4])
    lengths = {2: len(continuations[2]), 3: len(continuations[3])}
    for index, continuation in enumerate(continuations):
        score = score_heads(
            lambda heads, text=continuation: [[ord(c) for c in text]],
            lambda ids: "".join(map(chr, ids)),
            [FUNCTION],
            lengths.get(index, limit),
        )
        reason = {3: "trivial", 5: "loop", 6: "syntax", 7: "trivial"}.get(index)
        assert score.failures == (((0, reason),) if reason else ()), continuation
        assert (score.total, score.complete) == (1, 0 if reason else 1)
        assert score.ended == (1 if index in (0, 1, 4) else 0)


def test_the_shipped_model_is_small_and_says_what_it_is(shipped_model):
    files = {path.name: path.stat().st_size for path in shipped_model.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 12 * 2**20
    config = json.loads((shipped_model / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("qwen3", True)
    card = (shipped_model / "README.md").read_text()
    for said in ("held-out bits per byte", "PSF License", "Apache-2.0", "sha256", "scripts.train_shipped_model"):
        assert said in card


@pytest.mark.full
def test_the_shipped_model_completes_seventy_of_the_heads(shipped_model):
    from jaxengine import LLM, SamplingParams

    with LLM(str(shipped_model)) as llm:

        def generate(heads: list[str]) -> list[list[int]]:
            outputs = llm.generate(heads, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        score = score_heads(generate, llm.get_tokenizer().decode)
    assert score.complete >= 70, str(score)
