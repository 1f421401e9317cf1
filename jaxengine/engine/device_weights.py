"""The model's parameters as programs take them: flat leaves, which others of the same kind may replace."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxengine.config import ModelConfig
from jaxengine.errors import WeightsDeletedError
from jaxengine.models import build, logical_axes, one_share
from jaxengine.sharding import LAYER, axis_size, named_sharding, stacked_sharding


class DeviceWeights:
    """NNX is split once; programs close over what is static of it."""

    def __init__(
        self, model: ModelConfig, params: Mapping[str, jax.Array], max_model_len: int, mesh: Mesh, borrowed: bool
    ):
        """`params` are canonical or prepared. `borrowed`: somebody else may delete them."""
        self._model, self._max_model_len = one_share(model, mesh), max_model_len
        several = axis_size(mesh, LAYER) > 1
        self.axis = LAYER if several else None  # over which programs run on each device's share of the leaves
        self._graph, state = nnx.split(self._build(params))
        leaves, self._tree = jax.tree.flatten(state)
        places = {
            path: (stacked_sharding if path.startswith("layers.") else named_sharding)(mesh, axes)
            for path, axes in logical_axes(model, params).items()
        }
        self.specs: list[PartitionSpec] = [place.spec for place in jax.tree.leaves(nnx.state(self._build(places)))]
        self.take(leaves, borrowed)

    def _build(self, params: Mapping[str, Any]) -> nnx.Module:
        return build(self._model, params, self._max_model_len, self.axis)

    def module(self, leaves: Sequence[jax.Array]) -> Any:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))

    def flatten(self, params: Mapping[str, jax.Array]) -> list[jax.Array]:
        """The leaves of parameters with the shapes, dtypes and shardings of the first ones."""
        leaves, tree = jax.tree.flatten(nnx.state(self._build(params)))
        assert tree == self._tree  # type: ignore[operator]
        return leaves

    def take(self, leaves: list[jax.Array], borrowed: bool) -> None:
        """Steps run on these from now on; the old ones are freed unless somebody else holds them."""
        self.leaves = leaves
        # Shard by shard: an array of several devices tells of its first shard only.
        self._borrowed = [shard.data for leaf in leaves for shard in leaf.addressable_shards] if borrowed else []

    def drop(self) -> None:
        self.take([], borrowed=False)

    def check(self) -> None:
        """Raises WeightsDeletedError when borrowed ones are gone."""
        if any(leaf.is_deleted() for leaf in self._borrowed):
            raise WeightsDeletedError(
                "parameters that the engine borrowed were deleted, as a step of training does that donates them: call "
                "update_weights with the new ones after each such step, or make the engine with fuse_weights=True to "
                "have it keep a copy"
            )
