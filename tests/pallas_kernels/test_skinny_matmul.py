"""Products of few rows: twins against NumPy, kernels against twins in interpret mode, choices, lowering for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from jaxengine.layers.activation import ACTIVATIONS, ERF
from pallas_kernels.skinny_matmul import TuningConfig, gated_tuning, split_tuning
from tests.pallas_kernels.cases import pairwise, relative_error
from tests.pallas_kernels.lowering import lower_for_cuda

LIMIT = {"float16": 2e-3, "bfloat16": 1e-2}


def inputs(rows, size, columns, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((rows, size)), rng.standard_normal((size, columns)) / size**0.5
    return x.astype(jnp.dtype(dtype)), kernel.astype(jnp.dtype(dtype))


def structs(rows, size, columns, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((rows, size), dtype), jax.ShapeDtypeStruct((size, columns), dtype)


def test_twins():
    x, kernel = inputs(8, 96, 64)
    wide = x.astype(np.float64), kernel.astype(np.float64)
    parts = kernels.split_matmul_reference(x, kernel, 3)
    assert parts.dtype == jnp.float32
    for i, part in enumerate(parts):
        np.testing.assert_allclose(part, wide[0][:, 32 * i :][:, :32] @ wide[1][32 * i :][:32], rtol=1e-4, atol=1e-5)
    gate, up = np.split(wide[0] @ wide[1], 2, axis=1)
    found = kernels.gated_matmul_reference(x, kernel, jax.nn.silu)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), gate / (1 + np.exp(-gate)) * up, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "dtype", "tuning"),
    [(8, "bfloat16", TuningConfig(64, 2, 3)), (24, "float16", TuningConfig(64, 3, 1, warpgroups=2))],
    ids=str,
)
def test_split_matmul(rows, dtype, tuning):
    x, kernel = inputs(rows, 192, 128, dtype)
    found = kernels.split_matmul(x, kernel, tuning=tuning, interpret=True)
    want = kernels.split_matmul_reference(x, kernel, tuning.parts)
    assert found.shape == want.shape == (tuning.parts, rows, 128) and found.dtype == jnp.float32
    assert relative_error(found, want) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "activation", "tuning"),
    [("bfloat16", "silu", TuningConfig(64, 2)), ("float16", "gelu_new", TuningConfig(64, 3, warpgroups=2))],
    ids=str,
)
def test_gated_matmul(dtype, activation, tuning):
    x, kernel = inputs(16, 192, 256, dtype)
    function = ACTIVATIONS[activation]
    found = kernels.gated_matmul(x, kernel, function, tuning=tuning, interpret=True)
    assert found.dtype == dtype
    assert relative_error(found, kernels.gated_matmul_reference(x, kernel, function)) < LIMIT[dtype]


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((64, 2048, 2048), 4),
        ((128, 8192, 2048), 4),
        ((16, 4096, 4096), 2),
        ((16, 9728, 2560), 2),  # three parts do not divide it into tiles
        ((16, 6144, 2560), 3),
        ((64, 8192, 8192), None),  # enough columns for all multiprocessors
        ((136, 2048, 2048), None),
        ((2, 2048, 2048), None),
        ((64, 2048, 256), None),  # too few
        ((64, 320, 2048), None),
    ],
    ids=str,
)
def test_what_is_split(shape, parts):
    found = split_tuning(*structs(*shape))
    assert (found and found.parts) == parts


@pytest.mark.parametrize(
    ("shape", "warpgroups"),
    [
        ((64, 2048, 2 * 8192), 1),
        ((8, 4096, 2 * 14336), 2),
        ((64, 1024, 2 * 3072), 1),
        ((72, 2048, 2 * 8192), None),
        ((64, 5120, 2 * 17408), None),  # more programs than multiprocessors
        ((64, 1024, 2 * 1024), None),
        ((64, 1024, 2 * 3104), None),
    ],
    ids=str,
)
def test_what_is_gated_in_one(shape, warpgroups):
    found = gated_tuning(*structs(*shape))
    assert (found and found.warpgroups) == warpgroups


def test_dtypes_that_are_left_to_xla():
    for function, shape in ((split_tuning, (64, 2048, 2048)), (gated_tuning, (64, 2048, 16384))):
        assert function(*structs(*shape, "float16")) and not function(*structs(*shape, "float32"))
        assert not function(structs(*shape)[0], structs(*shape, "float16")[1])


@pytest.mark.parametrize(
    "case",
    pairwise({"dtype": ["bfloat16", "float16"], "rows": [8, 24, 64, 128], "size": [2048, 8192],
              "columns": [1024, 2560, 4096]}),
    ids=lambda case: "-".join(map(str, case.values())),
)  # fmt: skip
def test_split_matmul_lowers(case):
    args = structs(case["rows"], case["size"], case["columns"], case["dtype"])
    texts = [lower_for_cuda(lambda x, kernel: kernels.split_matmul(x, kernel), *args) for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].count("@mosaic_gpu_v2") == 1, "or it would be compiled again"


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if ACTIVATIONS[name] is not ERF])
@pytest.mark.parametrize(("rows", "columns"), [(8, 2 * 14336), (64, 2 * 8192)])
def test_gated_matmul_lowers(activation, rows, columns):
    function = partial(kernels.gated_matmul, activation=ACTIVATIONS[activation])
    assert lower_for_cuda(function, *structs(rows, 2048, columns)).count("@mosaic_gpu_v2") == 1


def test_bad_input_is_named():
    x, kernel = inputs(8, 128, 128)
    tuning = TuningConfig(64, 2, 2)
    for match, call in (
        (r"x.shape=\(8, 128\) .* gains", lambda: kernels.split_matmul(x, kernel)),
        (r"x.shape=\(8, 64\) ", lambda: kernels.split_matmul(x[:, :64], kernel, tuning=tuning)),
        (r"x.shape=\(7, 128\) ", lambda: kernels.split_matmul(x[:7], kernel, tuning=tuning)),
        ("block_k=128", lambda: kernels.split_matmul(x, kernel, tuning=TuningConfig(128, 1, 2))),
        (r"\[K, 128 n\]", lambda: kernels.gated_matmul(x, kernel[:, :64], jax.nn.silu, tuning=TuningConfig(64, 2))),
        ("parts must be 1", lambda: kernels.gated_matmul(x, kernel, jax.nn.silu, tuning=tuning)),
        ("block_k=48", lambda: TuningConfig(48, 2)),
        ("block_k=32 .* 64", lambda: TuningConfig(32, 2)),
        ("stages=0", lambda: TuningConfig(64, 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
