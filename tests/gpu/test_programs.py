"""The compiled programs with kernels in them, on the shipped model: memory, no copies of the cache, a second start."""

import pytest

from jaxengine import LLM
from tests.compilation_cache import check_second_process_compiles_nothing
from tests.programs import check_memory, check_no_pool_copies, compile_undonated, pool_copies

pytestmark = pytest.mark.gpu
LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512}


@pytest.fixture(scope="module")
def runner(shipped_model):
    with LLM(
        shipped_model, attention="triton", warmup=True, steps_per_call=4, kv_cache_memory_bytes=2**28, **LIMITS
    ) as llm:
        yield llm._runner


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
        shipped_model, tmp_path, "triton", dtype="bfloat16", gpu_memory_utilization=0.2, **LIMITS
    )
