"""Real models through LLM, batched and decoding on their own: the greedy tokens of transformers."""

import json

import pytest

from jaxengine import LLM, SamplingParams
from tests.references import gguf_files, greedy, tiny

TIE = 1e-4


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.full)])
def test_smollm2_answers_as_transformers_does(smollm2, count):
    answers = gguf_files.load("smollm2")["answers"][:count]
    near_ties = json.loads((gguf_files.FOLDER / "smollm2_logits.json").read_text())["answers"]
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 16}  # few programs to compile
    with LLM(smollm2, kv_cache_memory_bytes=2**28, **limits) as llm:
        chats = [[{"role": "user", "content": answer["question"]}] for answer in answers]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    for answer, near, output in zip(answers, near_ties, outputs):
        assert output.prompt_token_ids == answer["prompt_ids"]
        tokens = output.outputs[0].token_ids
        assert len(tokens) == 64 or output.outputs[0].finish_reason == "stop"
        assert greedy.same_until_tie(tokens, answer["token_ids"][: len(tokens)], near["near_ties"], TIE)
    assert outputs[0].outputs[0].text == "The capital of France is Paris."


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.full)])
def test_the_shipped_model_continues_as_transformers_does(shipped_model, count):
    fixture = tiny.FOLDER / "shipped.json"
    if not fixture.exists():
        pytest.skip("make_shipped.py has not run: it writes tests/references/shipped.json")
    answers = json.loads(fixture.read_text())["answers"][:count]
    with LLM(shipped_model, dtype="float32", max_model_len=256, max_num_seqs=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        outputs = llm.generate([answer["prompt_ids"] for answer in answers], params, use_tqdm=False)
    for answer, output in zip(answers, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == 200
        assert greedy.same_until_tie(output.outputs[0].token_ids, answer["token_ids"], answer["near_ties"], TIE)
