"""What is refused, and how the refusal reads."""

import numpy as np
import pytest

from jaxengine import (
    LLM,
    BeamSearchParams,
    ConfigError,
    MemoryPlanError,
    RequestError,
    SamplingParams,
    UnsupportedError,
)
from tests.tiny_llm import OPTIONS, VOCAB, fresh_llm, model_folder, shared_llm, write_model


@pytest.fixture(scope="module")
def llm():
    return shared_llm()


BAD_PROMPTS = [
    ("", "has no tokens"),
    ([[]], "is empty"),
    ([VOCAB], f"token id {VOCAB} is out of range: the vocabulary has {VOCAB} tokens"),
    ([5, -1], "token id -1 is out of range"),
    ([3] * 256, "a prompt of 256 tokens leaves no room for output within max_model_len=256"),
    ("\ud800", "not valid Unicode"),
    (5, "prompts=5 must be a text"),
    ([1.5], "not float"),
    ([True], "not bool"),
    (np.zeros((2, 2)), "not ndarray"),
    ({"text": "a"}, r"\['text'\]"),
    ({"cache_salt": "a"}, "needs 'prompt' or 'prompt_token_ids'"),
    ({"prompt": 5}, "prompt=5"),
    ({"prompt_token_ids": "abc"}, "prompt_token_ids='abc'"),
    ({"prompt": "a", "cache_salt": 5}, "cache_salt=5"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=[message for _, message in BAD_PROMPTS])
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, use_tqdm=False)
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, stream=True)  # at once, not when the first output is asked for


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids holds 600, the vocabulary ends at 599"),
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids holds 600"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias holds 600"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"min_tokens": 256, "max_tokens": 300}, "min_tokens=256"),
    ],
)
def test_fields_beyond_the_model(llm, fields, message):
    with pytest.raises(RequestError, match=message):
        llm.generate("hello", SamplingParams(**fields), use_tqdm=False)


def test_prompts_to_be_scored_may_have_a_token_more(llm):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, repetition_penalty=1.1)
    [output] = llm.generate([[3] * 257], params, use_tqdm=False)
    assert len(output.prompt_logprobs.logprobs) == 256
    with pytest.raises(RequestError, match="a prompt of 258 tokens does not fit within max_model_len=256"):
        llm.generate([[3] * 258], params, use_tqdm=False)


def test_fields_out_of_range():
    for name, value in {"temperature": -1, "top_p": 0, "n": 0, "max_tokens": 0, "seed": 2**64, "min_p": 2}.items():
        with pytest.raises(RequestError, match=f"{name}={value}"):
            SamplingParams(**{name: value})
    with pytest.raises(UnsupportedError, match="structured_outputs"):
        SamplingParams(structured_outputs={"json": "{}"})


def test_the_engine_goes_on_after_refusals(llm):
    running = llm.generate("hello", SamplingParams(max_tokens=50, ignore_eos=True), stream=True)
    next(running)
    for prompt, _ in BAD_PROMPTS:
        with pytest.raises(RequestError):
            llm.generate(prompt, use_tqdm=False)
    *_, last = running
    assert len(last.outputs[0].token_ids) == 50


def test_a_request_that_outgrows_the_pool():
    with fresh_llm(pages=8) as llm:
        with pytest.raises(RequestError, match=r"needs \d+ pages of KV cache, there are 7; lower max_tokens"):
            llm.generate([[5] * 30], SamplingParams(max_tokens=40), use_tqdm=False)
        [output] = llm.generate([[5] * 30], SamplingParams(max_tokens=27, ignore_eos=True), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 27


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code"),
        ({"tensor_parallel_size": 2}, ConfigError, "needs 2 devices, there are 1"),
        ({"tensor_parallel_size": 0}, ConfigError, "tensor_parallel_size=0 must be a positive integer"),
        ({"data_parallel_size": 2}, ConfigError, "needs 2 devices, there are 1"),
        ({"quantization": "fp8"}, UnsupportedError, "quantization='fp8'"),
        ({"max_modellen": 5}, ConfigError, "max_modellen"),
        ({"generation_config": "vllm"}, ConfigError, "generation_config='vllm'"),
        ({"max_model_len": 257}, ConfigError, "max_model_len=257 exceeds the 256"),
        ({"max_model_len": 1}, ConfigError, "max_model_len=1 must hold"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, ConfigError, "max_num_batched_tokens=4"),
        ({"block_size": 12}, ConfigError, "page_size=12"),
        ({"attention": "triton"}, ConfigError, "'triton' needs an NVIDIA GPU, this is a cpu; use 'auto' or 'xla'"),
        ({"attention": "mosaic"}, ConfigError, "'mosaic' needs an NVIDIA GPU, this is a cpu; use 'auto' or 'xla'"),
        ({"kv_cache_memory_bytes": 1}, MemoryPlanError, r"1 bytes are left .* need 8,192"),
        ({"warmup": True, "enforce_eager": True}, ConfigError, "warmup"),
        ({"logprobs_mode": "both"}, ConfigError, "logprobs_mode='both'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        LLM(model_folder(), **({} if "block_size" in options else {"page_size": 8}), **options)


@pytest.mark.parametrize("name", ["apply_model"])
def test_what_is_not_built_yet(llm, name):
    with pytest.raises(UnsupportedError, match=f"LLM.{name} is not built yet; "):
        getattr(llm, name)("anything", some=1)


def test_a_model_without_tokenizer(tmp_path):
    folder = write_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with LLM(folder, **OPTIONS) as llm:
        llm._runner._programs = shared_llm()._runner._programs
        params = SamplingParams(temperature=0, max_tokens=3, detokenize=False)
        want = shared_llm().generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids
        assert llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids == want
        for call in (lambda: llm.generate("hello", params), lambda: llm.generate([5], SamplingParams()),
                     lambda: llm.encode("hello"), lambda: llm.chat([{"role": "user", "content": "hi"}])):  # fmt: skip
            with pytest.raises(RequestError, match="tokenizer"):
                call()
        [beams] = llm.beam_search([[5, 6]], BeamSearchParams(beam_width=1, max_tokens=3))
        assert beams.sequences[0].tokens == [5, 6, *want] and beams.sequences[0].text is None


def test_another_tokenizer_and_the_generation_config(tmp_path):
    folder = write_model(tmp_path / "model", do_sample=False, max_new_tokens=9, eos_token_id=[2, 77])
    with LLM(folder, tokenizer=model_folder(), **OPTIONS) as llm:
        llm._runner._programs = shared_llm()._runner._programs
        defaults = llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.max_tokens) == (0.0, 9)
        assert len(llm.generate("hello", use_tqdm=False)[0].outputs[0].token_ids) == 9
        params = SamplingParams(temperature=0, logit_bias={77: 1e4})
        assert llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids == [77]
    with LLM(folder, generation_config="off", **OPTIONS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        assert llm.frontend.eos_token_ids == (2,)
