"""The prototype kernel lowers for CUDA, and what it is compared with and timed beside compute the same."""

from functools import partial

import jax
import pytest

from benchmarks.persistent_layer import engines, error, persistent, plan_of, random_layers
from benchmarks.persistent_plan import Plan, layer_reference
from tests.pallas_kernels.lowering import lower_for_cuda

TINY = partial(Plan, hidden=256, heads=4, kv_heads=2, dim=64, inner=256, programs=2, parts=2)


@pytest.mark.parametrize("normed", [False, True])
def test_the_float32_layer_and_the_engines_operations_agree(normed):
    plan = TINY(rows=2, normed=normed)
    layers = random_layers(plan, 37, 1)
    (qkv, hidden), written = jax.jit(partial(engines, plan, "reference"))(*layers)
    k_pages, v_pages = layers.pools[0]
    inputs = layers.rest._replace(weights=layers.weights[0], k_pages=k_pages, v_pages=v_pages)
    expected, *pools = layer_reference(plan, inputs)
    assert error(qkv, expected.products[-1]) < 1e-2 and error(hidden, expected.hidden[-1]) < 1e-2
    for found, before, after in zip(written[0], layers.pools[0], pools):
        assert error(found, after) < 1e-3 < error(found, before)


def test_the_kernel_lowers_for_cuda_once_for_all_layers_but_the_first():
    plan = TINY(rows=1, normed=True, flight=2, stamped=True)
    layers = jax.eval_shape(lambda: random_layers(plan, 37, 3))
    text = lower_for_cuda(partial(persistent, plan), *layers)
    assert 1 <= text.count("@mosaic_gpu_v2") <= 2


def test_shapes_that_do_not_fit_are_refused():
    for model in ("llama8b", "llama1b", "qwen3-0.6b"):
        assert plan_of(model, rows=8).stages >= 4
    with pytest.raises(ValueError, match="units of its products"):
        TINY(rows=9)
    with pytest.raises(ValueError, match="programs=128"):
        plan_of("tiny", rows=1)
