"""The activation functions that configs name, in transformers' spelling."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

ERF = partial(jax.nn.gelu, approximate=False)  # the one that Triton, having no erf, cannot compute


def clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """(1 + up) * gate * sigmoid(alpha * gate), of a gate of at most `limit` and an up within +-limit: gpt_oss's.

    Computed in float32, in the dtype of `gate` again.
    """
    dtype = gate.dtype
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    up = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return ((1 + up) * gate * jax.nn.sigmoid(alpha * gate)).astype(dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": ERF,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": lambda x: jnp.maximum(
        x, 0
    ),  # jax.nn.relu has a derivative of its own, which kernels of jax 0.11 do not take
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0)),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
