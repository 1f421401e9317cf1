"""Kernels that nothing uses yet: the last tests of the folder, as an illegal instruction would fail those behind it."""

import jax
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.paged_decode_mosaic import TuningConfig
from pallas_kernels.paged_tile import on_mosaic_card
from tests.pallas_kernels.cases import Case, decode_inputs, pairwise, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu" or not on_mosaic_card(), reason="needs Hopper"),
]

LIMIT = {"float16": 2e-3, "bfloat16": 1e-2}
# More work than streams and less, rows that are cut and are not, several segments a stream and chunks of the table.
OPTIONS = {
    "head_dim": [64, 128, 256],
    "group": [1, 3, 4, 7, 16],
    "page_size": [8, 16, 64, 128],
    "window": [None, 1, 100, 2000],
    "softcap": [None, 3.0],
    "kv_heads": [1, 2, 5, 8],
    "queries": [1, 2, 3],
    "dtype": ["bfloat16", "float16"],
    "lengths": [(0, 1, 15, 16, 17, 5000, 0, 64), (3000,) * 8, (200, 33, 64, 0, 1, 1, 128, 65) * 20, (0,) * 8],
}
CASES = [Case(**choice) for choice in pairwise(OPTIONS, seed=2)]
CASES += [Case(head_dim=128, group=4, kv_heads=8, dtype="bfloat16", lengths=(30, 0, *[700] * 60, 9000, 700))]


def check_decode(case: Case, tuning: TuningConfig | None = None) -> None:
    args = decode_inputs(case)
    tuning = tuning or TuningConfig.from_shapes(*args[:2])
    on_gpu, on_cpu = (jax.device_put(args, jax.devices(platform)[0]) for platform in ("gpu", "cpu"))
    outs = [jax.device_get(kernels.paged_decode(*on_gpu, **case.options, tuning=tuning)) for _ in range(3)]
    expected = jax.device_get(kernels.paged_decode_reference(*on_cpu, **case.options))
    assert outs[0].dtype == case.dtype
    assert relative_error(outs[0], expected) < LIMIT[case.dtype]
    for out in outs:  # partial results are put together in the same order each time
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_by_mosaic(case):
    check_decode(case)


@pytest.mark.parametrize("tuning", [(64, 1, 2), (64, 3, 1), (128, 1, 2)], ids=str)
def test_decode_by_mosaic_keeps_its_result_under_any_tuning(tuning):
    case = Case(head_dim=128, group=4, kv_heads=8, dtype="bfloat16", window=500, lengths=(0, 1, 3000, 30) * 40)
    check_decode(case, TuningConfig(*tuning))
