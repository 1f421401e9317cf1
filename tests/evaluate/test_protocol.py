"""OpenAI's bodies on a tiny model, against what the library itself answers."""

import json
from base64 import b64decode

import numpy as np
import pytest

from jaxengine import RequestError, SamplingParams, UnsupportedError
from jaxengine.evaluate.protocol import Server, job
from tests.tiny_llm import reference_logprobs, shared_llm

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
IDS = [11 * i % 590 + 3 for i in range(20)]
MESSAGES = [{"role": "user", "content": "hello"}]


def server(**defaults):
    return Server(shared_llm(), ["tiny", "other"], defaults)


def ask(url, body, key="k", **defaults):
    asked = job(server(**defaults), f"/v1/{url}", body, key)
    outputs = shared_llm().generate(list(asked.prompts), list(asked.params), use_tqdm=False)
    return json.loads(json.dumps(asked.respond(outputs), allow_nan=False))


def texts(response):
    return [choice["text"] for choice in response["choices"]]


# -- completions


def test_a_completion_is_what_generate_gives():
    want = shared_llm().generate(["def f", IDS], SamplingParams(**GREEDY), use_tqdm=False)
    found = ask("completions", {"prompt": "def f", "model": "other", "user": "me", **GREEDY})
    assert texts(found) == [want[0].outputs[0].text]
    assert (found["object"], found["model"], found["choices"][0]["finish_reason"]) == (
        "text_completion", "other", "length",
    )  # fmt: skip
    prompt = len(shared_llm().encode("def f"))
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6}
    assert texts(ask("completions", {"prompt": ["def f", "def f"], **GREEDY})) == [want[0].outputs[0].text] * 2
    assert texts(ask("completions", {"prompt": IDS, **GREEDY})) == [want[1].outputs[0].text]
    several = ask("completions", {"prompt": [IDS, IDS[:3]], "n": 2, **GREEDY})
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert texts(several)[:2] == [want[1].outputs[0].text] * 2


def test_defaults_hold_where_the_body_says_nothing():
    assert ask("completions", {"prompt": IDS, "temperature": None}, **GREEDY)["usage"]["completion_tokens"] == 6
    assert ask("completions", {"prompt": IDS, "max_tokens": 2}, **GREEDY)["usage"]["completion_tokens"] == 2
    assert ask("completions", {"prompt": IDS, "ignore_eos": True})["usage"]["completion_tokens"] == 16


def test_draws_depend_on_the_key_alone():
    body = {"prompt": IDS, "max_tokens": 12, "ignore_eos": True, "temperature": 2.0}
    first, again, other = (texts(ask("completions", body, key)) for key in ("a", "a", "b"))
    assert first == again != other
    pair = texts(ask("completions", body | {"prompt": [IDS, IDS]}, "a"))
    assert pair[0] != pair[1]
    assert texts(ask("completions", body | {"seed": 5}, "a")) == texts(ask("completions", body | {"seed": 5}, "b"))


def lm_eval_score(choice, context):
    """How `local-completions` of lm-evaluation-harness reads a choice of echo=true, logprobs=1, max_tokens=1."""
    own = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(own), all(value == max(top.values()) for value, top in zip(own, tops, strict=True))


def test_what_lm_evaluation_harness_asks_for():
    llm = shared_llm()
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    said = llm.generate([IDS], params, use_tqdm=False)[0].outputs[0].token_ids
    prompts = [[*IDS, *said], [*IDS, *said[:4], said[4] ^ 1]]
    found = ask(
        "completions", {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    )
    scores = [lm_eval_score(choice, len(IDS)) for choice in found["choices"]]
    assert [greedy for _, greedy in scores] == [True, False]
    for prompt, (total, _), choice in zip(prompts, scores, found["choices"], strict=True):
        want = reference_logprobs("llama", prompt)[range(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:-1], want, atol=1e-4)
        assert total == pytest.approx(want[len(IDS) - 1 :].sum(), abs=1e-3)
        assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
        assert {len(column) for column in choice["logprobs"].values()} == {len(prompt) + 1}
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert choice["text"].startswith(llm.get_tokenizer().decode(prompt, skip_special_tokens=False)[:10])
    short = ask("completions", {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 0})
    for whole, part in zip(found["choices"], short["choices"], strict=True):
        np.testing.assert_allclose(
            part["logprobs"]["token_logprobs"][1:], whole["logprobs"]["token_logprobs"][1:-1], atol=1e-4
        )
    assert short["usage"]["completion_tokens"] == 0


def test_tokens_with_one_text_show_the_more_probable():
    """Bytes of several characters all read as the replacement character: greediness must not suffer."""
    from jaxengine.evaluate.protocol import _completion_logprobs
    from jaxengine.request import Logprobs

    part = Logprobs([7, 8], [(-3.0, 3, [9, 10], [-1.0, -2.0]), (-0.5, 1, [8, 7], [-0.5, -3.0])])
    found = _completion_logprobs([5], [part], lambda token: "�")
    assert found["token_logprobs"] == [None, -3.0, -0.5]
    assert found["top_logprobs"] == [None, {"�": -1.0}, {"�": -0.5}]
    named = ask("completions", {"prompt": IDS, "logprobs": 2, "return_tokens_as_token_ids": True, **GREEDY})
    assert named["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")


def test_impossible_tokens_are_valid_json():
    found = ask("completions", {"prompt": IDS, "logprobs": 0, "allowed_token_ids": [5], **GREEDY})
    assert all(np.isfinite(found["choices"][0]["logprobs"]["token_logprobs"]))
    from jaxengine.evaluate.protocol import NEVER, _completion_logprobs
    from jaxengine.request import Logprobs

    assert _completion_logprobs([], [Logprobs([7], [(-np.inf, 2, [], [])])], str)["token_logprobs"] == [NEVER]


# -- chat


def test_a_chat_is_what_chat_gives():
    llm = shared_llm()
    want = llm.chat(MESSAGES, SamplingParams(**GREEDY, logprobs=2), use_tqdm=False)[0].outputs[0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    body = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    for messages in (MESSAGES, parts):
        found = ask("chat/completions", {"messages": messages, **body})
        [choice] = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
        rows = choice["logprobs"]["content"]
        np.testing.assert_allclose([row["logprob"] for row in rows], want.logprobs.logprobs, atol=1e-4)
        assert all(row["top_logprobs"][0]["logprob"] == row["logprob"] for row in rows)
        assert all(len(row["top_logprobs"]) == 2 for row in rows)
    assert found["object"] == "chat.completion"
    limited = {**GREEDY, "max_tokens": None, "max_completion_tokens": 3}
    assert ask("chat/completions", {"messages": MESSAGES, **limited})["usage"]["completion_tokens"] == 3
    open_end = ask("chat/completions", {"messages": MESSAGES, "temperature": 0, "ignore_eos": True})
    assert open_end["usage"]["total_tokens"] == llm.max_model_len


# -- score


def test_a_score_is_what_score_gives():
    want = shared_llm().score([("def f", " x"), ("def f", " return y")], use_tqdm=False)
    found = ask("score", {"text_1": "def f", "text_2": [" x", " return y"]})
    assert [entry["score"] for entry in found["data"]] == [pytest.approx(score.logprob, abs=1e-3) for score in want]
    assert [entry["token_ids"] for entry in found["data"]] == [score.token_ids.tolist() for score in want]
    assert [entry["is_greedy"] for entry in found["data"]] == [score.is_greedy for score in want]
    one = ask("score", {"text_1": ["def f", "a b"], "text_2": [" x", " c"]})
    assert one["data"][0]["score"] == pytest.approx(want[0].logprob, abs=1e-3)
    long = ask("score", {"text_1": "x y " * 300, "text_2": " z", "truncate": True})
    assert long["usage"]["prompt_tokens"] == shared_llm().max_model_len + 1


# -- embeddings


def test_embeddings_are_what_embed_gives():
    llm = shared_llm()
    want = llm.embed(["def f", "x y"], pooling="mean", dimensions=8, use_tqdm=False)
    body = {"input": ["def f", "x y"], "pooling": "mean", "dimensions": 8}
    found = ask("embeddings", body)
    np.testing.assert_allclose([entry["embedding"] for entry in found["data"]], want, atol=1e-5)
    assert [entry["index"] for entry in found["data"]] == [0, 1]
    count = sum(map(len, llm.encode(["def f", "x y"])))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    packed = ask("embeddings", body | {"encoding_format": "base64"})["data"][1]["embedding"]
    np.testing.assert_allclose(np.frombuffer(b64decode(packed), "<f4"), want[1], atol=1e-5)
    [ids] = ask("embeddings", {"input": IDS, "normalize": False})["data"]
    np.testing.assert_allclose(ids["embedding"], llm.embed([IDS], normalize=False, use_tqdm=False)[0], atol=1e-4)


# -- what is refused


@pytest.mark.parametrize(
    ("url", "body", "error", "message"),
    [
        ("embeddings", {}, RequestError, "input=None must be"),
        ("embeddings", {"input": [[]]}, RequestError, "a text without tokens"),
        ("embeddings", {"input": "x", "encoding_format": "int8"}, RequestError, "encoding_format='int8'"),
        ("embeddings", {"input": "x", "dimensions": 0}, RequestError, "dimensions=0"),
        ("embeddings", {"input": "x", "temperature": 0}, RequestError, "no field"),
        ("responses", {}, UnsupportedError, "url='/v1/responses' is not among"),
        ("completions", None, RequestError, "body=None must be an object"),
        ("completions", {}, RequestError, "prompt=None must be"),
        ("completions", {"prompt": []}, RequestError, r"prompt=\[\] must be"),
        ("completions", {"prompt": [1.5]}, RequestError, "a prompt is a text"),
        ("completions", {"prompt": "x", "nonsense": 1}, RequestError, r"no field \['nonsense'\]; it has"),
        ("completions", {"prompt": "x", "model": "gpt"}, RequestError, "model='gpt' is not served"),
        ("completions", {"prompt": "x", "stream": True}, UnsupportedError, "stream=True is not supported"),
        ("completions", {"prompt": "x", "best_of": 3}, UnsupportedError, "best_of=3"),
        ("completions", {"prompt": "x", "temperature": -1}, RequestError, "temperature=-1"),
        ("completions", {"prompt": "x", "temperature": "1"}, RequestError, "temperature='1'"),
        ("completions", {"prompt": "x", "echo": 1}, RequestError, "echo=1 must be true or false"),
        ("completions", {"prompt": "x", "max_tokens": 0}, RequestError, "max_tokens=0 needs echo=true and logprobs"),
        ("completions", {"prompt": "x", "logprobs": -1}, RequestError, "logprobs=-1"),
        ("completions", {"prompt": "x", "logprobs": "1"}, RequestError, "logprobs='1'"),
        ("chat/completions", {"messages": []}, RequestError, r"messages=\[\] must be"),
        ("chat/completions", {"messages": "x"}, RequestError, "messages='x'"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 1}, RequestError, "needs logprobs=true"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{}]}, UnsupportedError, "tools="),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}},
         UnsupportedError, "response_format"),
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1},
         RequestError, "two names of one limit"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         UnsupportedError, "is not text"),
        ("score", {"text_1": "a"}, RequestError, "text_2=None must be"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, RequestError, "2 texts in text_1 for 1 in text_2"),
        ("score", {"text_1": "a", "text_2": " b", "temperature": 0}, RequestError, "no field"),
        ("score", {"text_1": "x y " * 300, "text_2": " z"}, RequestError, "exceed max_model_len"),
    ],
)  # fmt: skip
def test_what_is_refused(url, body, error, message):
    with pytest.raises(error, match=message):
        job(server(), f"/v1/{url}", body, "k")


def test_what_asks_for_nothing_is_taken():
    nothing = {"stream": False, "best_of": 1, "suffix": None, "tools": [], "response_format": {"type": "text"}}
    assert texts(ask("completions", {"prompt": "def f", **GREEDY, **nothing})) == texts(
        ask("completions", {"prompt": "def f", **GREEDY})
    )
