"""The memory plan: pages for one group and for several, within the budget."""

from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine import EngineConfig, MemoryPlanError
from jaxengine.kv_cache import CacheGroup
from jaxengine.memory import CPU_CACHE_BYTES, GIB, Sizes, compiling_bytes, plan_pages, temporary_bytes
from tests.tiny_llm import shared_llm

SIZES = Sizes(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256, page_size=16)
FULL = CacheGroup((0, 1), None, 2, 16)
WINDOW = CacheGroup((2,), 32, 2, 16)
BYTES = {"full": 2 * 2 * 2 * 16 * 16 * 4, "window": 2 * 2 * 16 * 16 * 4}


def device(platform="cpu", **stats):
    return SimpleNamespace(platform=platform, memory_stats=lambda: stats or None)


def plan(groups, *where, sizes=SIZES, reserved=0, cache="float32", **config):
    model = shared_llm().model_config
    return plan_pages(EngineConfig(**config), model, groups, sizes, cache, reserved, where or [device()])


def test_enough_for_every_row_and_no_more_on_a_cpu():
    assert plan([FULL]) == (4 * 16 + 1,)
    # A window of 32 and a step of 64 tokens: 6 pages, and one that they may reach into.
    assert plan([FULL, WINDOW]) == (65, 4 * 7 + 1)
    assert plan([FULL], kv_cache_memory_bytes=10**12) == (65,)


def test_a_budget_is_shared_in_proportion():
    budget = (65 * BYTES["full"] + 29 * BYTES["window"]) // 2
    full, window = plan([FULL, WINDOW], kv_cache_memory_bytes=budget)
    assert 28 <= full <= 34 and 12 <= window <= 16


@given(st.integers(1, 10**6), st.sampled_from([[FULL], [WINDOW], [FULL, WINDOW], [WINDOW, FULL]]))
def test_the_budget_holds(budget, groups):
    page_bytes = [group.page_bytes(16, "float32") for group in groups]
    if budget < 2 * sum(page_bytes):
        with pytest.raises(MemoryPlanError, match=f"{2 * sum(page_bytes):,}"):
            plan(groups, kv_cache_memory_bytes=budget)
    else:
        pages = plan(groups, kv_cache_memory_bytes=budget)
        assert min(pages) >= 2 and sum(count * size for count, size in zip(pages, page_bytes)) <= budget


def test_the_fullest_of_several_gpus_decides():
    full, free = (device("gpu", bytes_limit=60 * GIB, bytes_in_use=used * GIB) for used in (50, 5))
    assert plan([FULL], free, full) == plan([FULL], full, free) == plan([FULL], full) < plan([FULL], free)


@pytest.mark.parametrize("cache", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits_give_twice_the_pages_of_16(cache):
    budget = 2 * 2 * 16 * 2 * 16 * 2 * 40  # 40 pages of bfloat16
    assert plan([FULL], cache="bfloat16", kv_cache_memory_bytes=budget) == (40,)
    assert plan([FULL], cache=cache, kv_cache_memory_bytes=budget) == (65,)  # what the rows can fill
    assert plan([FULL], cache=cache, kv_cache_memory_bytes=budget // 2) == (40,)


def test_triton_gets_no_pool_of_single_bytes_between_2_and_4_gib(monkeypatch, caplog):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    page, gpu = 2 * 16 * 16, partial(device, "gpu", bytes_in_use=0)
    for gib, cache, pool, attention in (
        (7, "float8_e4m3fn", 7 / 4, "triton"), (12, "float8_e4m3fn", 2, "triton"), (20, "float8_e4m3fn", 5, "triton"),
        (12, "bfloat16", 1.5, "triton"), (12, "float8_e4m3fn", 3, "xla"),
    ):  # fmt: skip
        caplog.clear()
        options = {"gpu_memory_utilization": 0.9, "attention": attention}
        [pages] = plan([FULL], gpu(bytes_limit=gib * GIB), cache=cache, **options)
        assert abs(pages * page / GIB - pool) < 0.02
        assert ("stay unused" in caplog.text) == (pool == 2)


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr("jaxengine.memory.CPU_CACHE_BYTES", 40 * BYTES["full"])
    assert plan([FULL]) == (40,) and plan([FULL], device(), device()) == (20,)


def test_what_a_gpu_has_left(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)  # the command line sets it
    gpu = device("gpu", bytes_limit=int(0.75 * 80 * GIB), bytes_in_use=20 * GIB)
    [pages] = plan([FULL], gpu, reserved=GIB, gpu_memory_utilization=0.5)
    assert abs(pages * BYTES["full"] - 19 * GIB) < GIB // 10  # more than every row fills: the rest is prefix cache
    [most] = plan([FULL], gpu, reserved=GIB)
    assert abs(most * BYTES["full"] - 39 * GIB) < GIB // 10  # jax has 60 GiB of the 72 asked for
    with pytest.raises(MemoryPlanError, match=r"20\.00 GiB are in use.*close"):
        plan([FULL], gpu, reserved=GIB, gpu_memory_utilization=0.2)


def test_a_fraction_that_jax_was_given(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    gpu = device("gpu", bytes_limit=int(0.9 * 80 * GIB), bytes_in_use=0)
    [pages] = plan([FULL], gpu, gpu_memory_utilization=0.9)
    assert abs(pages * BYTES["full"] - 72 * GIB) < GIB // 10


def test_a_cpu_gives_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setattr("jaxengine.memory._free_host_bytes", lambda: 100 * BYTES["full"])
    assert plan([FULL]) == (25,)
    monkeypatch.setattr("jaxengine.memory._free_host_bytes", lambda: 10**15)
    many = Sizes(max_num_seqs=10**4, max_num_batched_tokens=10**4, max_model_len=10**5, page_size=16)
    [pages] = plan([FULL], sizes=many)
    assert pages == CPU_CACHE_BYTES // BYTES["full"]


def test_the_runner_is_told_the_bound_for_temporaries():
    """That each program keeps to it is in engine/test_programs.py."""
    runner = shared_llm()._runner
    assert runner.temporary_bytes == temporary_bytes(runner.model, Sizes(8, 32, 256, 8), "float32", "xla")


def test_compiling_needs_a_copy_of_the_largest_matrix_and_two_results():
    model = shared_llm().model_config  # hidden 64, vocabulary 600, inner 96
    head, gate_up = 4 * 64 * 600 + 8 * 128 * 600, 4 * 64 * 192 + 8 * 4096 * 192
    assert head <= compiling_bytes(model, Sizes(8, 32, 256, 8), "float32") - 2**26 <= 2 * head
    assert gate_up <= compiling_bytes(model, Sizes(8, 4096, 256, 8), "float32") - 2**26 <= 2 * gate_up


def test_free_memory_that_differs_a_little_gives_the_same_pages(monkeypatch):
    """Another pool shape would make every program another, that no compilation cache knows."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    starts = [device("gpu", bytes_limit=72 * GIB, bytes_in_use=20 * GIB + used) for used in (2**20, 2**20 + 4096)]
    assert plan([FULL], starts[0]) == plan([FULL], starts[1])
