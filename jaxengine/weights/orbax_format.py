"""Trees of arrays as Orbax keeps them: canonical ones out; in, of any layout, what is needed, each to its devices."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jaxengine.config import ModelConfig, ParamRule
from jaxengine.errors import CheckpointError
from jaxengine.models import nest, param_specs
from jaxengine.weights.rules import SAME, Leaf, apply, find_leaves

FOLDER = "params"  # of the canonical parameters that `save` writes, beside config.json
CHUNK_BYTES = (
    2**30
)  # of arrays in a trainer's layout that the devices hold beside the weights; a larger one comes alone


class Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    place: str  # in the tree, as jax.tree_util.keystr spells it

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Tree:
    """Arrays on disk, of which only the metadata are read."""

    path: Path
    structure: Any = field(repr=False)  # the whole tree, metadata as leaves
    arrays: Mapping[str, Stored]  # by dotted name; the nodes `value` that NNX puts around arrays are left out
    mapping: Mapping[str, ParamRule] | None = None  # see find_leaves

    def leaves(self, config: ModelConfig) -> dict[str, Leaf]:
        """Every canonical parameter. Raises CheckpointError with every fault there is."""
        return find_leaves(self.path, self.arrays, config, self.mapping)


_Job = tuple[Stored, ParamRule, list[str]]  # an array, its rule, and the parameters that it becomes


def save(folder: Path, params: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp  # takes half a second

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / FOLDER).absolute(), nest(params))


def read_tree(path: Path) -> Tree:
    """All arrays of the tree that Orbax keeps in this folder. Raises CheckpointError for a folder that is damaged."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        try:
            structure = checkpointer.metadata(path.absolute()).item_metadata.tree
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CheckpointError(f"{path}: not a complete Orbax checkpoint: {error}") from error
    arrays: dict[str, Stored] = {}
    for place, leaf in tree_leaves_with_path(structure):
        name = keystr(place, simple=True, separator=".").removesuffix(".value")
        if name in arrays:
            raise CheckpointError(f"{path}: two arrays are called {name}")
        if hasattr(leaf, "shape"):  # not a string
            arrays[name] = Stored(tuple(leaf.shape), leaf.dtype, keystr(place))
    return Tree(path, structure, arrays)


def restore(
    tree: Tree, config: ModelConfig, dtype: str, mesh: Mesh, report: Callable[[int, int], None]
) -> dict[str, jax.Array]:
    """The canonical parameters in `dtype` on `mesh`; of the tree nothing else is read.

    What has its canonical layout is read straight to where it belongs. Any other array is read once, a share by each
    device, and rearranged there. Raises CheckpointError, also for data that are damaged.
    """
    leaves, specs = tree.leaves(config), param_specs(config)
    params: dict[str, jax.Array] = {}
    for batch in _batches(leaves):
        want = {
            source.place: jax.ShapeDtypeStruct(
                source.shape,
                dtype if rule == SAME else source.dtype,
                sharding=specs[paths[0]].sharding(mesh) if rule == SAME else _spread(source.shape, mesh),
            )
            for source, rule, paths in batch
        }
        found = _read(tree, want)
        for source, rule, paths in batch:
            array = found.pop(source.place)
            if rule == SAME:
                params[paths[0]] = array
            else:
                shardings = tuple(specs[path].sharding(mesh) for path in paths)
                params |= zip(paths, jax.block_until_ready(_program(rule, dtype, shardings)(array)), strict=True)
        report(len(params), len(specs))
    return {path: params[path] for path in specs}


def _batches(leaves: Mapping[str, Leaf]) -> Iterator[list[_Job]]:
    """What to read at a time: first all that stays as it is."""
    paths: dict[str, list[str]] = {}  # by place; the parts of an array in their order
    for path, leaf in sorted(leaves.items(), key=lambda item: item[1].index):
        paths.setdefault(leaf.source.place, []).append(path)
    jobs = [(leaves[those[0]].source, leaves[those[0]].rule, those) for those in paths.values()]
    batch = [job for job in jobs if job[1] == SAME]
    filled = CHUNK_BYTES  # they have their own place, nothing may join them
    for source, rule, those in (job for job in jobs if job[1] != SAME):
        size = source.size * jnp.dtype(source.dtype).itemsize
        if batch and filled + size > CHUNK_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append((source, rule, those))
        filled += size
    if batch:
        yield batch


def _spread(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Over all devices along the longest axis that they divide evenly; every device has all of it if none is."""
    axes = [i for i, length in enumerate(shape) if length % mesh.size == 0]
    names: list[Any] = [None] * len(shape)
    if axes:
        names[max(axes, key=lambda i: shape[i])] = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(*names))


@cache
def _program(rule: ParamRule, dtype: str, shardings: tuple[NamedSharding, ...]) -> Callable[[Any], list[jax.Array]]:
    return jax.jit(lambda x: [part.astype(dtype) for part in apply(rule, x)], out_shardings=list(shardings))


def _read(tree: Tree, want: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays at these places, each of its dtype and on its sharding."""
    import orbax.checkpoint as ocp

    target = tree_map_with_path(lambda place, leaf: want.get(keystr(place), ocp.PLACEHOLDER), tree.structure)
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            found = checkpointer.restore(
                tree.path.absolute(),
                args=ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)),
            )
        except Exception as error:
            raise CheckpointError(f"{tree.path}: cannot be read, it may be damaged: {error}") from error
    return {keystr(place): leaf for place, leaf in tree_leaves_with_path(found) if isinstance(leaf, jax.Array)}
