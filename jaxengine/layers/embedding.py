"""Token and position embeddings."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.sharding import Axis, share_ids, total


class Embedding(nnx.Module):
    """A table [entries, hidden], read by row; its rows may be split over a mesh axis."""

    def __init__(self, params: Mapping[str, jax.Array], axis: Axis | None = None):
        self.embedding, self.axis = nnx.Param(params["embedding"]), axis

    @jax.named_scope("embed")
    def __call__(self, ids: jax.Array, partial: bool = False) -> jax.Array:
        """ids int32 [tokens] -> [tokens, hidden]; `partial`: see `Linear`."""
        table = self.embedding[...]
        if self.axis is None:
            return table[ids]
        ids = ids - share_ids(len(table), self.axis)[0]
        own = (ids >= 0) & (ids < len(table))
        found = jnp.where(own[:, None], table[jnp.where(own, ids, 0)], 0)
        return found if partial else total(found, self.axis)
