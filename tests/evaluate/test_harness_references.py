"""The answers of lm-evaluation-harness's own model `hf`, with the model that ships with the package."""

import pytest

from benchmarks import local_tasks
from jaxengine import LLM, SamplingParams
from tests.references import harness

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def llm(shipped_model):
    with LLM(shipped_model, dtype="float32", max_num_seqs=16) as llm:
        yield llm


def assert_answers(task, answers):
    for found, want in zip(answers, harness.fixture()["results"][task]["answers"], strict=True):
        if isinstance(want, list):
            assert (found[0], found[1]) == (pytest.approx(want[0], abs=TOLERANCE), want[1])
        else:
            assert found == (want if isinstance(want, str) else pytest.approx(want, abs=TOLERANCE * 10))


def test_log_likelihoods(llm):
    """Among them a context that is too long, an empty one, and one that ends in spaces."""
    rows = harness.fixture()["documents"]["choice"]
    pairs = [(row["context"], choice) for row in rows for choice in row["choices"]]
    assert_answers("choice", llm.loglikelihood(pairs, truncate=True, use_tqdm=False))


def test_rolling_log_likelihoods(llm):
    texts = [row["text"] for row in harness.fixture()["documents"]["rolling"]]
    assert max(len(ids) for ids in llm.encode(texts)) > llm.max_model_len
    assert_answers("rolling", llm.loglikelihood_rolling(texts, use_tqdm=False))


def test_generated_text(llm):
    asked = harness.TASKS["until"]["generation_kwargs"]
    params = SamplingParams(temperature=0, stop=asked["until"], max_tokens=asked["max_gen_toks"])
    rows = harness.fixture()["documents"]["until"]
    outputs = llm.generate([row["context"] for row in rows], params, use_tqdm=False)
    assert_answers("until", [output.outputs[0].text for output in outputs])


@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
def test_the_harness_own_results(llm, tmp_path):
    pytest.importorskip("lm_eval")
    from jaxengine.evaluate.harness import HarnessLM

    lm, folder = HarnessLM(llm=llm), local_tasks.write_tasks(tmp_path, harness.TASKS, harness.fixture()["documents"])
    for task, want in harness.fixture()["results"].items():
        found = local_tasks.evaluate(lm, folder, task)
        assert_answers(task, found["answers"])
        exact = 1e-4 if task == "rolling" else 0  # perplexities; shares of right answers are the same floats
        assert found["metrics"] == pytest.approx(want["metrics"], rel=exact)
