"""RMSNorm and LayerNorm, computed in float32 and returned in the input's dtype."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Zhang & Sennrich 2019. x / rms(x) * scale over the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


class RMSNorm(nnx.Module):
    """`rms_norm` with a parameter."""

    def __init__(self, params: Mapping[str, jax.Array], eps: float):
        self.scale, self.eps = nnx.Param(params["scale"]), eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
    """Ba et al. 2016. (x - mean) / std * scale + bias over the last axis."""

    def __init__(self, params: Mapping[str, jax.Array], eps: float):
        self.scale, self.bias, self.eps = nnx.Param(params["scale"]), nnx.Param(params["bias"]), eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
