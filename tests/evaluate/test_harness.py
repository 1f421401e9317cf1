"""lm-evaluation-harness on a tiny model, tasks from local files."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxengine import ConfigError, RequestError, SamplingParams
from tests.tiny_llm import OPTIONS, model_folder, shared_llm

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports


@pytest.fixture(scope="module")
def lm():
    from jaxengine.evaluate.harness import HarnessLM

    return HarnessLM(llm=shared_llm(), max_gen_toks=8)


def requests(*rows):
    return [SimpleNamespace(args=row) for row in rows]


DOCUMENTS = [
    {"question": f"def f{i}(x):", "choices": ["return x", "pass", "y = 1", "import"], "answer": i % 4} for i in range(6)
]
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                "metric_list": [{"metric": "byte_perplexity"}]},
    "until": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{question}}",
              "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
                  "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))
    return folder


def test_tasks_of_each_kind(lm, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)
    for document, sample in zip(DOCUMENTS, found["samples"]["choice"], strict=True):
        pairs = [(document["question"], " " + choice) for choice in document["choices"]]
        want = lm.llm.score(pairs, use_tqdm=False)
        for score, [[logprob, greedy]] in zip(want, sample["resps"], strict=True):
            assert (logprob, greedy) == (pytest.approx(score.logprob, abs=1e-3), score.is_greedy)
    best = [
        max(range(4), key=lambda i, s=sample: s["resps"][i][0][0]) == sample["doc"]["answer"]
        for sample in found["samples"]["choice"]
    ]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(sum(best) / 6)
    assert found["results"]["rolling"]["byte_perplexity,none"] > 1
    params = SamplingParams(temperature=0, max_tokens=5, stop=["\n\n"])
    outputs = lm.llm.generate([document["question"] for document in DOCUMENTS], params, use_tqdm=False)
    assert [sample["resps"] for sample in found["samples"]["until"]] == [[[o.outputs[0].text]] for o in outputs]


def test_the_command_line_finds_the_model(tasks, tmp_path):
    options = {"model": model_folder(), **OPTIONS}
    done = subprocess.run(
        [sys.executable, "-m", "jaxengine.evaluate.harness", "--model", "jaxengine", "--tasks", "choice",
         "--model_args", ",".join(f"{name}={value}" for name, value in options.items()),
         "--include_path", str(tasks), "--output_path", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [result] = tmp_path.rglob("results*.json")
    assert "acc,none" in json.loads(result.read_text())["results"]["choice"]


def test_boundaries_are_the_harness_own(lm):
    """Our pairs against TemplateLM's, which cuts them with this tokenizer."""
    from lm_eval.api.model import TemplateLM

    class Theirs(TemplateLM):
        eot_token_id = lm.llm.prefix_token()
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **_):
            return lm.llm.encode(string, add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests, **_):
            return [(context, continuation) for _, context, continuation in requests]

    rows = [("def f(x):", " return x"), ("import os  ", "x"), ("", "class A:"), ("a b ", " c"), ("x\n", "y")]
    assert Theirs().loglikelihood(requests(*rows), disable_tqdm=True) == lm._encode(rows, True)


def test_rolling_windows_are_the_harness_own():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from jaxengine.scoring import rolling_windows

    for length in range(30):
        for size in (1, 2, 7, 28, 30):
            tokens = list(range(length))
            want = map(make_disjoint_window, get_rolling_token_windows(tokens, -1, size, 1))
            assert list(rolling_windows(tokens, -1, size)) == list(want)


def test_long_contexts_lose_their_beginning(lm):
    long = "x y " * 300
    assert len(lm.loglikelihood(requests((long, " z")), disable_tqdm=True)) == 1
    assert len(lm.generate_until(requests((long, {"until": []})), disable_tqdm=True)) == 1


def test_a_bos_token_in_the_text_is_not_added_again(lm):
    tokenizer = lm.llm.get_tokenizer()
    bos = tokenizer.special_tokens["bos_token"]
    [plain, begun] = lm.loglikelihood(requests((bos + "def f", " x"), (bos + "def f", " x")), disable_tqdm=True)
    [[want]] = [lm.llm.loglikelihood([(bos + "def f", " x")], add_special_tokens=False, use_tqdm=False)]
    assert plain == begun == (pytest.approx(want[0], abs=1e-3), want[1])


def test_rolling_texts_get_what_the_tokenizer_puts_before_a_text(lm, monkeypatch):
    tokenizer, bos = lm.llm.get_tokenizer(), lm.llm.prefix_token()
    plain = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, special=True: [bos] * special + plain(text, False))
    texts = ["def f(x):", tokenizer.special_tokens["bos_token"] + "def f(x):"]
    [want] = lm.llm.loglikelihood_rolling([[bos, *plain(texts[0], False)]], use_tqdm=False)
    found = lm.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    assert found == [pytest.approx(want, abs=1e-3)] * 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"nonsense": 1}, "nonsense"), ({"do_sample": True, "temperature": 0.0}, "contradict"),
     ({"max_gen_toks": 256}, "leaves no room")],
)  # fmt: skip
def test_what_is_refused(lm, asked, message):
    with pytest.raises(RequestError, match=message):
        lm.generate_until(requests(("x", asked)), disable_tqdm=True)


def test_arguments_without_a_meaning():
    from jaxengine.evaluate.harness import HarnessLM

    with pytest.raises(ConfigError, match="device='cuda:1'"):
        HarnessLM(device="cuda:1")
    with pytest.raises(ConfigError, match="llm= is a whole engine"):
        HarnessLM("model", llm=shared_llm())


def test_chats(lm):
    chat = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(chat) == "user: hi\nassistant:"
    assert lm.chat_template(True) == lm.llm.get_tokenizer().chat_templates["default"]
    assert lm.chat_template(False) is None and "/" not in lm.tokenizer_name
    with pytest.raises(RequestError, match="no chat template 'other'"):
        lm.chat_template("other")
