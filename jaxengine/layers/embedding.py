"""Token and position embeddings."""

from collections.abc import Mapping

import jax
from flax import nnx


class Embedding(nnx.Module):
    """A table [entries, hidden], read by row."""

    def __init__(self, params: Mapping[str, jax.Array]):
        self.embedding = nnx.Param(params["embedding"])

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int32 [tokens] -> [tokens, hidden]."""
        return self.embedding[...][ids]
