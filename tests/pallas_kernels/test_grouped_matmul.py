"""The grouped products: twins and XLA's against NumPy, kernels against twins in interpret mode, lowering for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from jaxengine.layers.activation import ACTIVATIONS, ERF
from jaxengine.layers.ops import ops
from pallas_kernels.grouped_matmul import TuningConfig
from tests.pallas_kernels.cases import grouped_inputs, naive_grouped, pairwise, relative_error
from tests.pallas_kernels.lowering import lower_for_cuda

CUSTOM_CALL = "__gpu$xla.gpu.triton"
LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}
# Groups without rows first, last and between; of one row; of more than a tile; of a whole tile; no row at all.
SIZES = [(0, 3, 0, 70, 16, 1, 0), (1,), (0, 0, 0)]


def call(op, args, **options):
    """grouped_matmul for one kernel, grouped_gated_matmul for two; rows of the groups."""
    name = {3: "grouped_matmul", 4: "grouped_gated_matmul"}[len(args)]
    options |= {"activation": jax.nn.silu} if len(args) == 4 else {}
    return np.asarray(jax.jit(partial(op(name), **options))(*args))[: args[-1].sum()]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_each_row_has_its_groups_product(implementation, count, sizes):
    args = grouped_inputs(sizes, 24, 12, "float32", count)
    out = call(lambda name: getattr(ops(implementation), name), args)
    assert out.shape == (sum(sizes), 12)
    assert relative_error(out, naive_grouped(*args).reshape(out.shape)) < 1e-6


def test_the_reference_leaves_other_rows_zero():
    out = kernels.grouped_matmul_reference(*grouped_inputs((2, 0), 8, 8, "float32", 1))
    assert np.asarray(out)[:2].all() and not np.asarray(out)[2:].any()


@pytest.mark.parametrize(
    "sizes, size_in, size_out, dtype, count",
    [(SIZES[0], 80, 72, "bfloat16", 2), (SIZES[0], 32, 64, "float32", 1), (SIZES[1], 64, 64, "bfloat16", 2),
     (SIZES[2], 16, 16, "float32", 1)],
)  # fmt: skip
def test_kernel_equals_reference(sizes, size_in, size_out, dtype, count):
    args = grouped_inputs(sizes, size_in, size_out, dtype, count)
    out = call(lambda name: getattr(kernels, name), args, interpret=True)
    expected = call(lambda name: getattr(kernels, f"{name}_reference"), args)
    assert out.dtype == dtype and out.shape == (sum(sizes), size_out)
    assert relative_error(out, expected) < LIMIT[dtype]


def test_a_tile_writes_rows_of_its_group_only():
    """On a GPU the next group's tile may have written them before. What nobody writes is NaN in interpret mode."""
    x, kernel, sizes = grouped_inputs((3, 0, 20), 16, 16, "float32", 1)
    out = np.asarray(kernels.grouped_matmul(np.nan_to_num(x, nan=1.0), kernel, sizes, interpret=True))
    assert np.isfinite(out[:23]).all() and np.isnan(out[23:]).all()


def test_tiles_change_only_rounding():
    args = grouped_inputs((20, 0, 37), 100, 50, "float32", 2)
    outs = [
        call(lambda name: getattr(kernels, name), args, tuning=TuningConfig(*blocks, num_warps=4), interpret=True)
        for blocks in ((16, 16, 16), (32, 64, 64))
    ]
    assert 0 < relative_error(*outs) < 1e-5


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float16", "float32"], "rows": [2, 512, 65536], "groups": [1, 5, 128],
              "size_in": [100, 2048], "size_out": [70, 768], "count": [1, 2]}),
    ids=lambda case: "-".join(map(str, case.values())),
)  # fmt: skip
def test_lowers(case):
    x = jax.ShapeDtypeStruct((case["rows"], case["size_in"]), case["dtype"])
    kernel = jax.ShapeDtypeStruct((case["groups"], case["size_in"], case["size_out"]), case["dtype"])
    function = [kernels.grouped_matmul, partial(kernels.grouped_gated_matmul, activation=jax.nn.silu)][
        case["count"] - 1
    ]
    args = x, *[kernel] * case["count"], jax.ShapeDtypeStruct((case["groups"],), jnp.int32)
    assert lower_for_cuda(function, *args).count(CUSTOM_CALL) == 1
    program = str(jax.make_jaxpr(function)(*args))
    # HIGHEST makes Triton's float32 products IEEE, otherwise they are TF32.
    exact = program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert exact == (case["count"] if case["dtype"] == "float32" else 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_lowers(activation):
    x, kernel = jax.ShapeDtypeStruct((7, 64), "bfloat16"), jax.ShapeDtypeStruct((3, 64, 64), "bfloat16")
    function = partial(ops("triton").grouped_gated_matmul, activation=ACTIVATIONS[activation])
    text = lower_for_cuda(function, x, kernel, kernel, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert text.count(CUSTOM_CALL) == 1
    erf = ACTIVATIONS[activation] is ERF  # which Triton cannot compute: XLA does, between two products
    assert text.count("call @grouped_matmul(") == (2 if erf else 0)


def test_bad_input_is_named():
    x, kernel, sizes = grouped_inputs((2, 1), 8, 4, "float32", 1)
    for match, args in (
        (r"x.shape=\(8, 7\)", (x[:, :7], kernel, sizes)),
        (r"\(2, 8, 4\), \(2, 8, 3\)", (x, kernel, kernel[..., :3], sizes)),
        (r"sizes.shape=\(1,\) must be \[2\]", (x, kernel, sizes[:1])),
        ("float32.* and kernels of .*float16", (x, kernel.astype(np.float16), sizes)),
    ):
        for suffix, options in (("", {"interpret": True}), ("_reference", {})):
            with pytest.raises(ValueError, match=match):
                call(lambda name: getattr(kernels, name + suffix), args, **options)  # noqa: B023
    for match, blocks in (("block_out=48", (16, 48, 16)), ("at least 16", (8, 16, 16))):
        with pytest.raises(ValueError, match=match):
            TuningConfig(*blocks, num_warps=4)
