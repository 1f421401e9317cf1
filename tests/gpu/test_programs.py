"""The compiled programs with kernels in them, on the shipped model: memory, no copies of the cache, a second start."""

import pytest

from jaxengine import LLM, SamplingParams
from tests.compilation_cache import check_second_process_compiles_nothing
from tests.gpu.test_engine import prompts
from tests.programs import check_memory, check_no_pool_copies, compile_undonated, pool_copies

pytestmark = pytest.mark.gpu
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 256}
LARGER = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512}


@pytest.fixture(scope="module", params=[LIMITS, pytest.param(LARGER, marks=pytest.mark.full)], ids=["small", "larger"])
def llm(request, shipped_model):
    """One engine for all: to compile every program takes longer than what is asked of them."""
    options = {"warmup": True, "steps_per_call": 4, "kv_cache_memory_bytes": 2**28}
    with LLM(shipped_model, attention="triton", **options, **request.param) as llm:
        yield llm


@pytest.fixture
def runner(llm):
    return llm._runner


def test_no_compilation_after_warmup(llm):
    """The first test, as others compile what no engine runs."""
    every = [
        SamplingParams(temperature=0, max_tokens=9),
        SamplingParams(temperature=0.7, top_p=0.9, max_tokens=7),
        SamplingParams(top_k=5, logprobs=3, prompt_logprobs=2, max_tokens=5),
        SamplingParams(presence_penalty=1.0, logit_bias={5: 2.0}, n=2, max_tokens=6),
    ]
    asked = prompts(llm)
    llm.generate(asked, [every[i % len(every)] for i in range(len(asked))], use_tqdm=False)
    assert llm.get_metrics()["compilations_after_warmup"] == 0


def test_each_program_stays_within_the_planned_memory(runner):
    check_memory(runner)


def test_a_step_copies_no_pool(runner):
    check_no_pool_copies(runner)


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_a_copied_pool_is_found(runner, name):
    assert len(pool_copies(compile_undonated(runner, name), runner._cache)) >= 2 * runner.model.num_layers


def test_a_second_process_compiles_nothing(shipped_model, tmp_path):
    """The pages are planned from the free memory, as in production: a pool of another size would be compiled again."""
    check_second_process_compiles_nothing(
        shipped_model, tmp_path, "triton", stored=True, dtype="bfloat16", gpu_memory_utilization=0.2, **LIMITS
    )
