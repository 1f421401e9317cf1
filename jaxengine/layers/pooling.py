"""Hidden states, pooled: what embeddings are made of."""

import jax
import jax.numpy as jnp


def pooled_sums(hidden: jax.Array, row: jax.Array, rows: int) -> jax.Array:
    """hidden [T, E]; row int32 [T], -1 = no row -> the sums of each row's hidden states, float32 [rows, E]."""
    states = jnp.where((row >= 0)[:, None], hidden.astype(jnp.float32), 0)  # padding may be NaN
    return jax.ops.segment_sum(states, jnp.maximum(row, 0), num_segments=rows)
