"""Grouped matrix products in plain XLA, the default on CPU: tiles of one group each, in a loop.

`jax.lax.ragged_dot` multiplies every row with every kernel there: with 128 of them that takes 20 to 90 times as long
(`python -m benchmarks.experts`).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxengine.layers.linear import precision

TILE_ROWS = 4, 64  # at least and at most


def grouped_matmul(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """See pallas_kernels."""
    return _in_tiles(x, (kernel,), sizes, lambda y: y)


def grouped_gated_matmul(
    x: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """See pallas_kernels."""
    return _in_tiles(x, (gate, up), sizes, lambda g, u: activation(g) * u)


def _in_tiles(
    x: jax.Array, kernels: Sequence[jax.Array], sizes: jax.Array, combine: Callable[..., jax.Array]
) -> jax.Array:
    rows, ends = len(x), jnp.cumsum(sizes)
    least, most = TILE_ROWS
    tile_rows = min(most, max(least, 1 << (rows // len(sizes)).bit_length()))
    x = jnp.pad(x, ((0, tile_rows), (0, 0)))  # the last tile may begin anywhere

    def one_tile(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, out = carry
        group = jnp.searchsorted(ends, start, side="right")
        tile = jax.lax.dynamic_slice_in_dim(x, start, tile_rows)
        products = [
            jnp.dot(tile, kernel[group], precision=precision(x.dtype), preferred_element_type=jnp.float32)
            for kernel in kernels
        ]
        # Rows beyond the group's are wrong here; the next tile, which begins with them, overwrites them.
        out = jax.lax.dynamic_update_slice_in_dim(out, combine(*products).astype(x.dtype), start, axis=0)
        return jnp.minimum(start + tile_rows, ends[group]), out

    start = jnp.zeros((), ends.dtype), jnp.zeros((len(x), kernels[0].shape[2]), x.dtype)
    return jax.lax.while_loop(lambda carry: carry[0] < ends[-1], one_tile, start)[1][:rows]
