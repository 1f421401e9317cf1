import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.layers.linear import Linear, Projections


def random(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_with_and_without_bias(bias):
    params = {"kernel": random(16, 24)} | ({"bias": random(24)} if bias else {})
    x = random(5, 16)
    exact = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64) + np.asarray(params.get("bias", 0))
    transposed = {"kernel_t": params["kernel"].T} | {key: params[key] for key in params if key == "bias"}
    for linear in (Linear(params), Linear(transposed)):
        np.testing.assert_allclose(linear(x), exact, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(linear.logits(x), exact, rtol=1e-5, atol=1e-5)


def test_float32_products_ask_for_full_precision_and_bfloat16_ones_do_not():
    for dtype, asked in ((jnp.float32, True), (jnp.bfloat16, False)):
        linear = Linear({"kernel": random(4, 6, dtype=dtype)})
        for function in (linear, linear.logits):
            assert ("HIGHEST" in str(jax.make_jaxpr(function)(random(2, 4, dtype=dtype)))) == asked


def test_bfloat16_logits_are_not_rounded():
    linear, x = Linear({"kernel": random(64, 32, dtype=jnp.bfloat16)}), random(3, 64, dtype=jnp.bfloat16)
    assert linear(x).dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64)
    np.testing.assert_allclose(linear.logits(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_one_fused_product_equals_one_for_each_name(bias):
    widths = {"q_proj": 16, "k_proj": 8, "v_proj": 12}
    apart = {name: {"kernel": random(10, n)} | ({"bias": random(n)} if bias else {}) for name, n in widths.items()}
    kinds = apart["q_proj"]
    joined = {kind: jnp.concatenate([part[kind] for part in apart.values()], axis=-1) for kind in kinds}
    x, options = random(7, 10), ((*widths,), "qkv_proj", (*widths.values(),))
    fused, split = Projections({"qkv_proj": joined}, *options), Projections(apart, *options)
    assert hasattr(fused, "qkv_proj") and not hasattr(fused, "q_proj")
    for one, other, width in zip(fused(x), split(x), widths.values(), strict=True):
        assert one.shape == (7, width)
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
