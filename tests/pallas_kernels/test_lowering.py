"""Every kernel lowers for CUDA, over a pairwise cover of shapes and options; no GPU needed."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as kernels
from jaxengine.layers.activation import ACTIVATIONS, ERF
from jaxengine.layers.ops import ops
from pallas_kernels import paged_decode_mosaic as decode_mosaic
from pallas_kernels import paged_extend_mosaic as mosaic
from tests.pallas_kernels.cases import pairwise
from tests.pallas_kernels.lowering import lower_for_cuda

paged_extend = sys.modules["pallas_kernels.paged_extend"]  # the package has the function under this name
CUSTOM_CALL, MOSAIC_CALL = "__gpu$xla.gpu.triton", "@mosaic_gpu_v2"
CASES = pairwise(
    {
        "dtype": ["bfloat16", "float16", "float32"],
        "cache": [None, "float8_e4m3fn", "float8_e5m2"],
        "head_dim": [32, 64, 80, 96, 128, 256],
        "group": [1, 3, 4, 7, 16],
        "page_size": [16, 64, 128],
        "window": [None, 100],
        "softcap": [None, 5.0],
        "sinks": [None, "bfloat16", "float32"],
        "queries": [1, 3, 8],
        "rows": [1, 256],
    }
)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def extend_structs(q, pool, rows):
    blocks = q.shape[0] // 16 + rows
    return q, pool, pool, ints(rows, 64), ints(blocks), ints(blocks), ints(rows), ints(rows), ints(rows)


def sinks(case, heads):
    return None if case["sinks"] is None else jnp.ones(heads, case["sinks"])


def name(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_attention_lowers(case):
    rows, kv_heads, dim, dtype = case["rows"], 2, case["head_dim"], case["dtype"]
    pool = jax.ShapeDtypeStruct((1024, kv_heads, case["page_size"], dim), case["cache"] or dtype)
    heads, table = kv_heads * case["group"], ints(rows, 64)
    options = {"scale": 0.1, "window": case["window"], "softcap": case["softcap"], "sinks": sinks(case, heads)}
    q = jax.ShapeDtypeStruct((rows, case["queries"], heads, dim), dtype)
    decode = partial(kernels.paged_decode, **options), q, pool, pool, table, ints(rows)
    q = jax.ShapeDtypeStruct((512, heads, dim), dtype)
    triton = partial(
        kernels.paged_extend, tuning=paged_extend.TuningConfig.from_shapes(q, pool, 16), block_q=16, **options
    )
    extend = triton, *extend_structs(q, pool, rows)
    calls = 2 if case["window"] is None else 1  # 100 keys are not cut into parts, which a second kernel would combine
    for (function, *args), expected in ((decode, calls), (extend, 1)):
        assert lower_for_cuda(function, *args).count(CUSTOM_CALL) == expected
        program = str(jax.make_jaxpr(function)(*args))
        # HIGHEST makes Triton's float32 products IEEE, otherwise they are TF32.
        exact = program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
        assert exact == (program.count("dot_general[") if dtype == "float32" else 0)


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float16"], "cache": [None, "float8_e4m3fn", "float8_e5m2"],
              "head_dim": [64, 128, 256], "group": [1, 3, 4, 7, 16], "page_size": [8, 16, 128], "window": [None, 100],
              "softcap": [None, 5.0], "queries": [1, 3], "sinks": [None, "bfloat16"], "rows": [1, 8, 256]}),
    ids=name,
)  # fmt: skip
def test_decode_by_mosaic_lowers(case):
    rows, cache = case["rows"], case["cache"] or case["dtype"]
    pool = jax.ShapeDtypeStruct((1024, 2, case["page_size"], case["head_dim"]), cache)
    q = jax.ShapeDtypeStruct((rows, case["queries"], 2 * case["group"], case["head_dim"]), case["dtype"])
    options = {"scale": 0.1, "window": case["window"], "softcap": case["softcap"]}
    options |= {"sinks": sinks(case, q.shape[2])}
    options |= {"tuning": decode_mosaic.TuningConfig.from_shapes(q, pool)}
    text = lower_for_cuda(partial(kernels.paged_decode, **options), q, pool, pool, ints(rows, 64), ints(rows))
    assert text.count(MOSAIC_CALL) == 1 and CUSTOM_CALL not in text
    assert ("dot_general" in text) == (case["window"] is None)  # puts parts together: 100 keys are not cut into any


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float16"], "cache": [None, "float8_e4m3fn", "float8_e5m2"],
              "head_dim": [64, 128, 256], "group": [1, 3, 4],
              "page_size": [8, 16, 128], "window": [None, 100], "softcap": [None, 5.0], "block_q": [16, 64, 128],
              "sinks": [None, "bfloat16"]}),
    ids=name,
)  # fmt: skip
def test_extend_lowers_for_hopper(case):
    pool = jax.ShapeDtypeStruct((1024, 2, case["page_size"], case["head_dim"]), case["cache"] or case["dtype"])
    q = jax.ShapeDtypeStruct((100, 2 * case["group"], case["head_dim"]), case["dtype"])
    options = {name: case[name] for name in ("window", "softcap", "block_q")}
    extend = partial(kernels.paged_extend, scale=0.1, sinks=sinks(case, q.shape[1]), **options)
    text = lower_for_cuda(extend, *extend_structs(q, pool, 3), q)
    assert text.count(MOSAIC_CALL) == text.count("output_operand_alias<") == 1


@pytest.mark.parametrize("name", ["decode", "extend"])
def test_kernels_in_mosaic_are_the_same_however_many_were_lowered_before(name):
    """Or another order of steps would miss the compilation cache."""
    pool, q = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((1024, 2, 16, 64), (100, 4, 64)))
    each = jax.ShapeDtypeStruct((100, 1, 4, 64), "bfloat16")
    texts = []
    for _ in range(2):
        extend = partial(kernels.paged_extend, scale=0.1, block_q=16), *extend_structs(q, pool, 3), q
        decode = partial(kernels.paged_decode, scale=0.1, tuning=decode_mosaic.TuningConfig.from_shapes(each, pool))
        decode = decode, each, pool, pool, ints(100, 64), ints(100)
        texts.append(lower_for_cuda(*(extend if name == "extend" else decode)))
    assert texts[0] == texts[1] and MOSAIC_CALL in texts[0]


@pytest.mark.parametrize(
    "tokens, dim, dtype, page_size, card, scale",
    [
        (100, 128, "float8_e4m3fn", 16, "NVIDIA L40", 0.1),
        (100, 96, "float8_e4m3fn", 16, "NVIDIA H200", 0.1),
        (100, 128, "bfloat16", 16, "NVIDIA A100-SXM4-80GB", 0.1),
        (100, 128, "bfloat16", 16, "NVIDIA B200", 0.1),
        (100, 128, "float32", 16, "NVIDIA H200", 0.1),
        (100, 96, "bfloat16", 16, "NVIDIA H200", 0.1),
        (100, 128, "bfloat16", 24, "NVIDIA H200", 0.1),
        (63, 128, "bfloat16", 16, "NVIDIA H200", 0.1),
        (100, 128, "bfloat16", 16, "NVIDIA H200", -0.1),
    ],
)
def test_what_mosaic_does_not_take_is_left_to_triton(tokens, dim, dtype, page_size, card, scale):
    pool = jax.ShapeDtypeStruct((1024, 2, page_size, dim), dtype)
    q = jax.ShapeDtypeStruct((tokens, 4, dim), "bfloat16" if "float8" in dtype else dtype)
    extend = partial(kernels.paged_extend, block_q=64, scale=scale)
    text = lower_for_cuda(extend, *extend_structs(q, pool, 3), card=card)
    assert text.count(CUSTOM_CALL) == 1 and MOSAIC_CALL not in text
    if "H200" in card:
        with pytest.raises(ValueError, match="does not take"):
            lower_for_cuda(partial(extend, tuning=mosaic.TuningConfig(64, 2)), *extend_structs(q, pool, 3))


@pytest.mark.parametrize(
    "rows, heads, dim, dtype, page_size, scale",
    [
        (8, 4, 96, "float8_e4m3fn", 16, 0.1),
        (8, 4, 128, "float32", 16, 0.1),
        (8, 4, 96, "bfloat16", 16, 0.1),
        (8, 4, 128, "bfloat16", 24, 0.1),
        (8, 140, 128, "bfloat16", 16, 0.1),
        (8, 4, 128, "bfloat16", 16, -0.1),
    ],
)
def test_what_mosaic_does_not_take_of_decode(rows, heads, dim, dtype, page_size, scale):
    pool = jax.ShapeDtypeStruct((1024, 2, page_size, dim), dtype)
    q = jax.ShapeDtypeStruct((rows, 1, heads, dim), "bfloat16" if "float8" in dtype else dtype)
    args, decode = (q, pool, pool, ints(rows, 64), ints(rows)), partial(kernels.paged_decode, scale=scale)
    assert MOSAIC_CALL not in lower_for_cuda(decode, *args)
    with pytest.raises(ValueError, match="does not take"):
        lower_for_cuda(partial(decode, tuning=decode_mosaic.TuningConfig(64, 2, 1)), *args)


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float32"], "cache": [None, "float8_e4m3fn", "float8_e5m2"],
              "kv_heads": [1, 3, 8], "dim": [64, 96]}),
    ids=name,
)  # fmt: skip
def test_write_lowers_in_place(case):
    pool = jax.ShapeDtypeStruct((1024, case["kv_heads"], 16, case["dim"]), case["cache"] or case["dtype"])
    new = jax.ShapeDtypeStruct((7, case["kv_heads"], case["dim"]), case["dtype"])
    text = lower_for_cuda(kernels.kv_write, pool, pool, new, new, ints(7), ints(7))
    assert text.count(CUSTOM_CALL) == 1
    assert text.count("output_operand_alias<") == 2


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float32"], "kv_heads": [1, 3, 8], "group": [1, 3, 4], "dim": [64, 96],
              "pairs": [16, 32], "normed": [False, True], "cache": [None, "float8_e4m3fn", "float8_e5m2"]}),
    ids=name,
)  # fmt: skip
def test_rope_write_lowers_in_place(case):
    struct, kv_heads, dim, dtype = jax.ShapeDtypeStruct, case["kv_heads"], case["dim"], case["dtype"]
    pool, angle = struct((1024, kv_heads, 16, dim), case["cache"] or dtype), struct((7, case["pairs"]), jnp.float32)
    qkv, scales = struct((7, kv_heads * (case["group"] + 2), dim), dtype), [struct((dim,), dtype)] * 2 * case["normed"]
    function = partial(kernels.rope_write, eps=1e-5)
    text = lower_for_cuda(function, pool, pool, qkv, angle, angle, ints(7), ints(7), *scales)
    assert text.count(CUSTOM_CALL) == 1
    assert text.count("output_operand_alias<") == 2


def test_pools_whose_elements_have_no_numbers_are_refused():
    """Of one byte each they lie, in 2 to 4 GiB, beyond what the lowering's 32 bits with a sign can say."""
    q, new = jax.ShapeDtypeStruct((4, 1, 4, 128), "bfloat16"), jax.ShapeDtypeStruct((4, 2, 128), "bfloat16")
    qkv, angle = jax.ShapeDtypeStruct((4, 8, 128), "bfloat16"), jax.ShapeDtypeStruct((4, 64), "float32")

    def programs(pages):
        pool = jax.ShapeDtypeStruct((pages, 2, 16, 128), "float8_e4m3fn")
        yield kernels.kv_write, pool, pool, new, new, ints(4), ints(4)
        yield kernels.rope_write, pool, pool, qkv, angle, angle, ints(4), ints(4)
        yield partial(kernels.paged_decode, scale=0.1), q, pool, pool, ints(4, 8), ints(4)
        yield partial(kernels.paged_extend, scale=0.1, block_q=16), *extend_structs(new, pool, 4)

    for wrong, right in zip(programs(2**19 + 1), programs(2**19)):
        with pytest.raises(ValueError, match="at most 2 GiB, or of more than 4"):
            lower_for_cuda(*wrong)
        assert CUSTOM_CALL in lower_for_cuda(*right)
    assert all(CUSTOM_CALL in lower_for_cuda(*program) for program in programs(2**20 + 1))


@pytest.mark.parametrize(
    "case", pairwise({"dtype": ["bfloat16", "float32"], "size": [64, 576, 4096], "parts": [None, 1, 4]}), ids=name
)
def test_add_rms_norm_lowers(case):
    x = jax.ShapeDtypeStruct((7, case["size"]), case["dtype"])
    y = x if case["parts"] is None else jax.ShapeDtypeStruct((case["parts"], *x.shape), jnp.float32)
    scale = jax.ShapeDtypeStruct((case["size"],), case["dtype"])
    assert lower_for_cuda(partial(kernels.add_rms_norm, eps=1e-5), x, y, scale).count(CUSTOM_CALL) == 1


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float16", "float32"], "size": [576, 4096, 8192], "devices": [2, 4, 8]}),
    ids=name,
)
def test_all_reduce_rms_norm_lowers(case):
    x = jax.ShapeDtypeStruct((7, case["size"]), case["dtype"])
    scale = jax.ShapeDtypeStruct((case["size"],), case["dtype"])
    peers = ints(case["devices"] + 1, 2), ints(kernels.workspace_words(case["devices"], 7, 4 * case["size"]))
    text = lower_for_cuda(partial(kernels.all_reduce_rms_norm, eps=1e-5), x, x, scale, *peers)
    assert text.count(CUSTOM_CALL) == 1


@pytest.mark.parametrize("size", [1028, 64])
def test_all_reduce_rms_norm_refuses_rows_that_threads_cannot_share(size):
    x = jnp.zeros((7, size), jnp.bfloat16)
    peers = jnp.zeros((3, 2), jnp.int32), jnp.zeros(kernels.workspace_words(2, 7, 2 * size), jnp.int32)
    with pytest.raises(ValueError, match="must have a multiple of 16 bytes"):
        kernels.all_reduce_rms_norm(x, x, x[0], *peers, eps=1e-5)
    with pytest.raises(ValueError, match=r"y.shape=\(7, 30\)"):
        kernels.all_reduce_rms_norm(x, x[:, :30], x[0], *peers, eps=1e-5)


@pytest.mark.parametrize(("devices", "rows", "lengthened"), [(2, 6, 0), (1, 7, 0), (2, 7, 2**29)])
def test_all_reduce_rms_norm_refuses_memory_that_rows_do_not_fit(devices, rows, lengthened):
    x, scale = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((7, 4096), (4096,)))
    peers = ints(devices + 1, 2), ints(kernels.workspace_words(devices, rows, 8192) + lengthened)
    with pytest.raises(ValueError, match=r"workspace.shape=\(\d+,\): of two devices at least; \d+ words"):
        lower_for_cuda(partial(kernels.all_reduce_rms_norm, eps=1e-5), x, x, scale, *peers)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if ACTIVATIONS[name] is not ERF])
@pytest.mark.parametrize("dtype, size", [("bfloat16", 3072), ("float32", 1100)])
def test_gated_activation_lowers(activation, dtype, size):
    x = jax.ShapeDtypeStruct((7, 2 * size), dtype)
    function = partial(kernels.gated_activation, activation=ACTIVATIONS[activation])
    assert lower_for_cuda(function, x).count(CUSTOM_CALL) == 1


def test_what_triton_cannot_compute_is_left_to_xla():
    x = jax.ShapeDtypeStruct((7, 64), jnp.float32)
    assert CUSTOM_CALL not in lower_for_cuda(partial(ops("triton").gated_activation, activation=ERF), x)
    with pytest.raises(NotImplementedError, match="erfc"):
        lower_for_cuda(partial(kernels.gated_activation, activation=ERF), x)
