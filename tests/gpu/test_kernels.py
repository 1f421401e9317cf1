"""The compiled kernels against their references, which run in float32 on the CPU, over a pairwise cover of options.

All programs compile at once, in threads, before the first comparison.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from jaxengine.layers.activation import ACTIVATIONS, ERF
from pallas_kernels import paged_extend_mosaic as mosaic
from pallas_kernels.paged_decode import TuningConfig as DecodeTuning
from pallas_kernels.paged_extend import TuningConfig as ExtendTuning
from pallas_kernels.paged_tile import on_mosaic_card
from tests.pallas_kernels.cases import (
    Case,
    decode_inputs,
    extend_inputs,
    grouped_inputs,
    pairwise,
    relative_error,
    rope_write_inputs,
    write_inputs,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")]

# TF32 products would give about 3e-4; bfloat16 ones give 2e-3 to 6e-3.
LIMIT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2, "float8_e4m3fn": 2e-2, "float8_e5m2": 4e-2}
OPTIONS = {
    "dtype": ["bfloat16", "float32"],
    "head_dim": [64, 96, 128, 256],
    "group": [1, 2, 3, 4, 5, 6, 7, 8, 16],
    "page_size": [16, 32, 64, 128],
    "window": [None, 1, 100],
    "softcap": [None, 3.0],
    "sinks": [False, True],
    "kv_heads": [1, 2, 5],
}
LENGTHS = [(0, 1, 15, 16, 17, 600), (1, 1500, 0), (200, 33, 64, 0, 1, 1, 128, 65) * 8]
DECODE = [Case(**choice) for choice in pairwise({**OPTIONS, "queries": [1, 2, 3, 8], "lengths": LENGTHS})]
DECODE += [Case(head_dim=32, dtype="float16"), Case(head_dim=80, group=3, window=30, dtype="float16", queries=4)]
ROWS = [((0, 1, 200, 700), (0, 1, 33, 130)), ((300,), (300,))]  # lengths, new tokens
EXTEND = [
    Case(**choice, lengths=lengths, new_tokens=new_tokens)
    for choice in pairwise({**OPTIONS, "block_q": [8, 16, 64], "rows": ROWS}, seed=1)
    for lengths, new_tokens in [choice.pop("rows")]
]
EXTEND += [Case(head_dim=dim, group=3, dtype="float16", lengths=(1, 70), new_tokens=(0, 40)) for dim in (32, 80)]
# Ends of rows within tiles and pages of every kind, and a group and blocks that the tiles do not divide.
MANY_ROWS = {"lengths": (300, 65, 129, 70, 1000), "new_tokens": (300, 65, 129, 64, 2), "dtype": "bfloat16"}
EXTEND += [
    Case(head_dim=128, group=4, kv_heads=8, block_q=64, **MANY_ROWS),
    Case(head_dim=128, group=4, page_size=8, block_q=64, **MANY_ROWS),
    Case(head_dim=128, group=3, window=100, block_q=128, **MANY_ROWS),
    Case(head_dim=64, group=1, window=1, softcap=3.0, page_size=128, block_q=96, **MANY_ROWS),
    Case(head_dim=256, group=2, block_q=64, **MANY_ROWS),
    # More items than multiprocessors; tiles of which some queries see nothing.
    Case(head_dim=256, group=4, kv_heads=8, window=100, block_q=64, **MANY_ROWS),
    *(Case(head_dim=dim, group=2, window=200, block_q=128, **MANY_ROWS) for dim in (64, 128, 256)),
]
# Pools of floats of 8 bits.
FLOAT8 = {"cache": ["float8_e4m3fn", "float8_e5m2"], "dtype": ["bfloat16", "float16", "float32"]}
FLOAT8 |= {name: OPTIONS[name] for name in ("head_dim", "window", "softcap")}
FLOAT8 |= {"group": [1, 4, 7, 16], "page_size": [8, 16, 128], "sinks": [False, True]}
DECODE += [Case(**choice) for choice in pairwise(FLOAT8 | {"queries": [1, 3], "lengths": LENGTHS}, seed=2)]
EXTEND += [
    Case(**choice, lengths=lengths, new_tokens=new_tokens)
    for choice in pairwise(FLOAT8 | {"block_q": [16, 64], "rows": ROWS}, seed=3)
    for lengths, new_tokens in [choice.pop("rows")]
]
EXTEND += [Case(head_dim=128, group=4, kv_heads=8, block_q=64, cache=cache, **MANY_ROWS) for cache in FLOAT8["cache"]]
WRITE_OPTIONS = {name: OPTIONS[name] for name in ("dtype", "head_dim")} | {
    "page_size": [16, 128],
    "kv_heads": [1, 3, 8],
}
WRITE = [Case(**choice) for choice in pairwise(WRITE_OPTIONS)]
WRITE += [Case(**choice) for choice in pairwise(WRITE_OPTIONS | {name: FLOAT8[name] for name in ("cache", "dtype")})]
ROPE_OPTIONS = {name: OPTIONS[name] for name in ("dtype", "head_dim", "group")} | WRITE_OPTIONS
ROPE = [Case(**choice) for choice in pairwise(ROPE_OPTIONS)]
ROPE += [
    Case(**choice, kv_heads=3, page_size=16)
    for choice in pairwise({name: FLOAT8[name] for name in ("cache", "dtype", "head_dim", "group")})
]
HOPPER = on_mosaic_card()
BY_MOSAIC = [c for c in EXTEND if c.dtype != "float32" and c.head_dim in (64, 128, 256)]
OPS = {"paged_decode": DECODE, "paged_extend": EXTEND, "paged_extend by Mosaic": BY_MOSAIC if HOPPER else []}
OPS |= {"kv_write": WRITE, "rope_write": ROPE, "add_rms_norm": [case for case in WRITE if case.cache is None]}
ACTIVATED = [(name, dtype) for name in ACTIVATIONS if ACTIVATIONS[name] is not ERF for dtype in ("bfloat16", "float32")]
CASES = [(op, case) for op, cases in OPS.items() for case in cases]
# Decode steps (some groups without rows) and prompts, of widths that blocks divide and do not.
GROUPED = pairwise(
    {"dtype": ["bfloat16", "float16", "float32"], "size_in": [100, 256, 2048], "size_out": [72, 768], "count": [1, 2],
     "sizes": [(1, 0, 3, 0, 0, 2), (0,) * 60 + (2,) + (1, 0) * 30, (300, 0, 17, 128, 1, 640), (16, 15, 17) * 20]}
)  # fmt: skip
NONE = SimpleNamespace(params={})  # of a test without parameters
TUNED = Case(head_dim=128, group=4, dtype="bfloat16", window=500, lengths=(0, 1, 700, 30))
TUNINGS = [DecodeTuning(size, parts, num_warps=4, min_part=size) for size in (16, 64) for parts in (1, 2, 7)]


def compare(op: str, case: Case, seed: int, **tuning) -> tuple:
    """The kernel's result and the reference's on the same inputs."""
    op, _, by_mosaic = op.partition(" by ")
    kernel, reference = getattr(kernels, op), getattr(kernels, f"{op}_reference")
    if op == "kv_write":
        args, options = write_inputs(case, tokens=200, seed=seed), {}
    elif op == "rope_write":
        pairs, normed = case.head_dim // (4 if seed % 3 == 0 else 2), seed % 2 == 0
        args, options = rope_write_inputs(case, 200, pairs, normed, seed), {"eps": 1e-5}
    elif op == "add_rms_norm":
        x, y, (scale, *_) = np.random.default_rng(seed).standard_normal((3, 200, 37 * case.head_dim))
        args, options = tuple(array.astype(jnp.dtype(case.dtype)) for array in (x, y, scale)), {"eps": 1e-5}
    elif op == "paged_decode":
        args, options = decode_inputs(case, seed), case.options
    else:
        args, options = extend_inputs(case, seed), case.options | {"block_q": case.block_q}
        config = mosaic.TuningConfig.from_shapes(*args[:2]) if by_mosaic else None
        tuning = {"tuning": config or ExtendTuning.from_shapes(*args[:2], case.block_q)} | tuning
    out = kernel(*jax.device_put(args, jax.devices("gpu")[0]), **options, **tuning)
    return jax.device_get((out, reference(*jax.device_put(args, jax.devices("cpu")[0]), **options)))


def compare_grouped(case: dict) -> tuple:
    args = grouped_inputs(case["sizes"], case["size_in"], case["size_out"], case["dtype"], case["count"])
    name, options = (
        ("grouped_matmul", {}) if case["count"] == 1 else ("grouped_gated_matmul", {"activation": jax.nn.silu})
    )
    kernel, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    out = kernel(*jax.device_put(args, jax.devices("gpu")[0]), **options)
    return jax.device_get((out, reference(*jax.device_put(args, jax.devices("cpu")[0]), **options)))


def compare_activation(activation: str, dtype: str) -> tuple:
    x = np.random.default_rng(0).standard_normal((50, 2 * 1100)).astype(jnp.dtype(dtype))
    function = ACTIVATIONS[activation]
    out = kernels.gated_activation(jax.device_put(x, jax.devices("gpu")[0]), function)
    expected = kernels.gated_activation_reference(jax.device_put(x, jax.devices("cpu")[0]), function)
    return jax.device_get((out, expected))


@pytest.fixture(scope="module")
def comparisons(request) -> dict[tuple, Future]:
    """Of the tests that run: `-k` need not wait for others."""
    asked = [value for item in request.session.items for value in getattr(item, "callspec", NONE).params.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {which: pool.submit(compare, *which, seed) for seed, which in enumerate(CASES) if which in asked}
        found |= {which: pool.submit(compare_activation, *which) for which in ACTIVATED if which[0] in asked}
        found |= {tuple(case.items()): pool.submit(compare_grouped, case) for case in GROUPED if case in asked}
        return found | {tuning: pool.submit(compare, "paged_decode", TUNED, 0, tuning=tuning) for tuning in TUNINGS}


@pytest.mark.parametrize("which", CASES, ids=lambda which: f"{which[0]}-{which[1]}")
def test_kernel_equals_reference(which, comparisons):
    op, case = which
    out, expected = comparisons[which].result()
    if op == "kv_write":
        for got, want in zip(out, expected):
            assert got.dtype == want.dtype == (case.cache or case.dtype)
            np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
        return
    for got, want in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < LIMIT[got.dtype.name]
        if op == "rope_write":
            got, want = got.astype(np.float32), want.astype(np.float32)
            small = abs(want) < 16  # beside which those that saturate would hide any error
            assert relative_error(got[small], want[small]) < LIMIT[case.cache or case.dtype]


@pytest.mark.parametrize("activation, dtype", ACTIVATED)
def test_gated_activation_equals_reference(activation, dtype, comparisons):
    out, expected = comparisons[activation, dtype].result()
    assert out.dtype == dtype
    assert relative_error(out, expected) < LIMIT[dtype]


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: "-".join(str(value)[:20] for value in case.values()))
def test_grouped_matmul_equals_reference(case, comparisons):
    out, expected = comparisons[tuple(case.items())].result()
    assert out.dtype == case["dtype"]
    rows = sum(case["sizes"])
    assert relative_error(out[:rows], expected[:rows]) < LIMIT[case["dtype"]]


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: f"{tuning.block_kv}-{tuning.parts}")
def test_decode_tuning_keeps_the_result(tuning, comparisons):
    out, expected = comparisons[tuning].result()
    assert relative_error(out, expected) < LIMIT["bfloat16"]


@pytest.mark.skipif(not HOPPER, reason="needs Hopper")
@pytest.mark.parametrize("tuning", [(128, 2, 1), (64, 4, 2), (64, 3, 1)], ids=str)
def test_mosaic_tuning_keeps_the_result(tuning):
    case = Case(head_dim=128, group=4, block_q=64, **MANY_ROWS)
    out, expected = compare("paged_extend", case, 0, tuning=mosaic.TuningConfig(*tuning))
    assert relative_error(out, expected) < LIMIT["bfloat16"]


@pytest.mark.parametrize("head_dim, group, queries", [(128, 4, 1), (64, 5, 3), (256, 1, 8)])
def test_a_long_row_among_short_ones(head_dim, group, queries):
    case = Case(
        head_dim=head_dim, group=group, queries=queries, dtype="bfloat16", lengths=(30, 0, *[700] * 60, 9000, 700)
    )
    out, expected = compare("paged_decode", case, 0)
    assert relative_error(out, expected) < LIMIT["bfloat16"]


@pytest.mark.parametrize("gigabytes, cache", [(3.9, None), (5, None), (2, "float8_e4m3fn"), (5, "float8_e4m3fn")])
def test_large_pools(gigabytes, cache):
    """The kernels' offsets are 32 bits wide up to 4 GiB and 64 beyond: write the last pages, read them back."""
    case = Case(head_dim=128, kv_heads=8, group=2, dtype="bfloat16", cache=cache, lengths=(16,) * 6)
    q, k, v, table, lengths = decode_inputs(case)
    pages = int(gigabytes * 2**30) // k[0].nbytes
    shift = pages - len(k)  # page i of the small pools lies at i + shift in the large ones
    page = np.repeat(np.arange(shift + 1, pages - 1, dtype=np.int32), 16)
    offset = np.arange(page.size, dtype=np.int32) % 16
    k_pages, v_pages = (jnp.zeros((pages, 8, 16, 128), k.dtype) for _ in range(2))
    new = [pool[1:-1].swapaxes(1, 2).reshape(-1, 8, 128).astype(q.dtype) for pool in (k, v)]
    write = jax.jit(kernels.kv_write, donate_argnums=(0, 1)).lower(k_pages, v_pages, *new, page, offset).compile()
    assert "copy(" not in write.as_text(), "the pools are written in place"
    k_pages, v_pages = write(k_pages, v_pages, *new, page, offset)
    out = kernels.paged_decode(q, k_pages, v_pages, table + shift, lengths, **case.options)
    args = jax.device_put((q, k, v, table, lengths), jax.devices("cpu")[0])
    assert relative_error(out, kernels.paged_decode_reference(*args, **case.options)) < LIMIT["bfloat16"]
