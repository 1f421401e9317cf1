import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxengine.layers.norm import LayerNorm, RMSNorm

BF16 = ml_dtypes.bfloat16


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [
        a.astype(np.float32) for a in (3 * rng.standard_normal((7, 96)) + 5, rng.standard_normal(96), rng.random(96))
    ]


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(arrays, eps):
    x, scale, _ = arrays
    exact = x.astype(np.float64)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(RMSNorm({"scale": jnp.asarray(scale)}, eps)(x), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm(arrays, eps):
    x, scale, bias = arrays
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + eps) * scale + bias
    norm = LayerNorm({"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, eps)
    np.testing.assert_allclose(norm(x), expected, rtol=2e-6, atol=2e-6)


def test_bfloat16_is_rounded_before_the_scale_as_in_transformers(arrays):
    x, scale = (array.astype(BF16) for array in arrays[:2])
    exact = x.astype(np.float32)
    normalized = (exact / np.sqrt((exact**2).mean(-1, keepdims=True) + np.float32(1e-6))).astype(BF16)
    out = RMSNorm({"scale": jnp.asarray(scale)}, 1e-6)(jnp.asarray(x))
    assert out.dtype == jnp.bfloat16
    rounded_once = (normalized.astype(np.float32) * scale.astype(np.float32)).astype(BF16)
    never = (exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * scale.astype(np.float32)).astype(BF16)
    assert (np.asarray(out) == rounded_once).mean() > 0.99  # an rsqrt's last bit may round another way
    assert (never != rounded_once).mean() > 0.1
