"""Mesh, logical axes, and the one table of rules that maps them to mesh axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxengine.errors import ConfigError, UnsupportedError

TENSOR = "tensor"  # the mesh axis over which every layer is split

# Logical axis -> mesh axis. None: replicated. A mesh axis may appear once per array; collisions raise.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",  # flattened heads * head_dim of q
    "kv_heads": "tensor",
    "mlp": "tensor",
    "hidden": None,
    "position": None,
    "page": None,
    "norm": None,
    "rows": "data",
}


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the canonical layout: its shape and the logical axis of each dimension."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.shape=} and {self.axes=} differ in length")

    def padded(self, mesh: Mesh) -> "ParamSpec":
        """The same with a vocabulary that the devices divide; `models.prepare` sees to it that padding is not drawn."""
        devices = mesh.shape.get(TENSOR, 1)
        sizes = (size + -size % devices if axis == "vocab" else size for size, axis in zip(self.shape, self.axes))
        return ParamSpec(tuple(sizes), self.axes)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Its place on a mesh. A dimension that the devices do not divide is whole on each: see `padded`."""
        names = named_sharding(mesh, self.axes).spec
        return NamedSharding(
            mesh,
            PartitionSpec(*(n if n and size % mesh.shape[n] == 0 else None for n, size in zip(names, self.shape))),
        )


def create_mesh(tensor: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data x tensor` devices, the first ones unless `devices` names others.

    Raises ConfigError when there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < data * tensor:
        raise ConfigError(f"{tensor=} x {data=} needs {data * tensor} devices, there are {len(devices)}")
    grid = np.asarray(devices[: data * tensor]).reshape(data, tensor)
    return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


def one_axis(mesh: Mesh) -> Mesh:
    """The devices of a mesh of which no axis but `tensor` has several, as `create_mesh` has them.

    Raises UnsupportedError for other meshes.
    """
    if mesh.shape.get(TENSOR, 1) != mesh.size:
        raise UnsupportedError(
            f"mesh {dict(mesh.shape)}: only the axis {TENSOR!r} may have several devices, as in "
            f'Mesh(devices, ("{TENSOR}",)); for replicas make an engine for each group of devices'
        )
    return create_mesh(mesh.size, devices=mesh.devices.flatten().tolist())


@cache  # a fresh NamedSharding in each step defeats jit's fast dispatch path
def named_sharding(mesh: Mesh, axes: tuple[str | None, ...] = ()) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes; `()` replicates."""
    names = [None if axis is None else RULES[axis] for axis in axes]
    names = [name if name in mesh.axis_names else None for name in names]
    used = [name for name in names if name is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical {axes=} map two dimensions to one mesh axis: {names}")
    return NamedSharding(mesh, PartitionSpec(*names))


def on_each_device(function: Callable, arguments: tuple, specs: tuple, out: Any, mesh: Mesh) -> tuple[Callable, tuple]:
    """`function` as a program that each device runs on its share, and its arguments, which NumPy's are given whole.

    specs: of each argument, a PartitionSpec or a tree of them. out: the results' NamedShardings.
    """

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(mesh))

    # check_vma cannot know that what follows a sum is the same on all devices.
    out_specs = jax.tree.map(lambda sharding: sharding.spec, out)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return sharded, jax.tree.map(place, arguments)


# -- inside such a program, over an axis of the mesh; None: it runs on one device


def share_ids(size: int, axis: str | None, dtype=jnp.int32) -> jax.Array:
    """Where this device's `size` entries stand in an array that is split evenly over `axis`, [size]."""
    ids = jnp.arange(size, dtype=dtype)
    return ids if axis is None else ids + jax.lax.axis_index(axis).astype(dtype) * size


def gather(x: jax.Array, axis: str | None) -> jax.Array:
    """The whole of an array whose last dimension is split over `axis`."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)


def total(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum of what the devices of `axis` have."""
    return x if axis is None else jax.lax.psum(x, axis)
