"""Mesh, logical axes, and the one table of rules that maps them to mesh axes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxengine.errors import ConfigError, UnsupportedError

type Axis = str | tuple[str, ...]  # of a mesh; several count as one, of which the first varies slowest

AXES = DATA, STAGE, EXPERT, TENSOR = "data", "stage", "expert", "tensor"
LAYER = (EXPERT, TENSOR)  # the mesh axes over which every layer is split; DATA divides requests, STAGE layers

# Logical axis -> mesh axis. None: replicated. A mesh axis may appear once per array; collisions raise.
RULES: dict[str, Axis | None] = {
    "vocab": LAYER,
    "heads": LAYER,  # flattened heads * head_dim of q
    "kv_heads": LAYER,
    "mlp": LAYER,
    "expert": EXPERT,
    "expert_mlp": TENSOR,
    "router": None,
    "hidden": None,
    "position": None,
    "page": (DATA, STAGE),
    "norm": None,
    "rows": DATA,  # of a step, or slots, or tokens
}


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the canonical layout: its shape, the logical axis of each dimension, and the layer it is of."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    layer: tuple[int, int] | None = None  # of how many; None: of none, all stages have it

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.shape=} and {self.axes=} differ in length")

    def padded(self, mesh: Mesh) -> "ParamSpec":
        """The same with a vocabulary that the devices divide; `models.prepare` sees to it that padding is not drawn."""
        devices = axis_size(mesh, RULES["vocab"])
        sizes = (size + -size % devices if axis == "vocab" else size for size, axis in zip(self.shape, self.axes))
        return replace(self, shape=tuple(sizes))

    def on_stage(self, mesh: Mesh) -> Mesh:
        """The part of a mesh that has it."""
        stages = axis_size(mesh, STAGE)
        if self.layer is None or stages == 1:
            return mesh
        layer, layers = self.layer
        stage = layer * stages // layers
        return Mesh(mesh.devices[:, stage : stage + 1], mesh.axis_names, axis_types=mesh.axis_types)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Its place on a mesh. A dimension that the devices do not divide is whole on each: see `padded`."""
        mesh = self.on_stage(mesh)
        names = named_sharding(mesh, self.axes).spec
        return NamedSharding(
            mesh,
            PartitionSpec(*(n if size % axis_size(mesh, n) == 0 else None for n, size in zip(names, self.shape))),
        )


def create_mesh(
    tensor: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None, expert: int = 1, stage: int = 1
) -> Mesh:
    """A mesh of `data x stage x expert x tensor` devices, the first ones unless `devices` names others.

    Raises ConfigError when there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    needed = data * stage * expert * tensor
    if len(devices) < needed:
        sizes = f"{tensor=} x {expert=} x {stage=} x {data=}"
        raise ConfigError(f"{sizes} needs {needed} devices, there are {len(devices)}")
    grid = np.asarray(devices[:needed]).reshape(data, stage, expert, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def as_created(mesh: Mesh) -> Mesh:
    """The devices of a mesh of which no axes but `create_mesh`'s have several, as that has them.

    Raises UnsupportedError for other meshes.
    """
    if axis_size(mesh, AXES) != mesh.size:
        raise UnsupportedError(
            f"mesh {dict(mesh.shape)}: only the axes {', '.join(AXES)} may have several devices, as in "
            f' Mesh(devices, ("{DATA}", "{TENSOR}"))'
        )
    order = sorted(range(mesh.devices.ndim), key=lambda i: (*AXES, mesh.axis_names[i]).index(mesh.axis_names[i]))
    devices = mesh.devices.transpose(order).flatten().tolist()
    data, stage, expert, tensor = (mesh.shape.get(name, 1) for name in AXES)
    return create_mesh(tensor, data, devices, expert, stage)


def axis_size(mesh: Mesh, axis: Axis | None) -> int:
    """Its devices; 1 for axes that the mesh has not."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)


@cache  # a fresh NamedSharding in each step defeats jit's fast dispatch path
def named_sharding(mesh: Mesh, axes: tuple[str | None, ...] = ()) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes; `()` replicates."""
    names = [_present(mesh, None if axis is None else RULES[axis]) for axis in axes]
    used = [axis for name in names for axis in ((name,) if isinstance(name, str) else name or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"logical {axes=} map two dimensions to one mesh axis: {names}")
    return NamedSharding(mesh, PartitionSpec(*names))


def stacked_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """The same of arrays with these axes, one of each stage, one after another in their first dimension."""
    found = named_sharding(mesh, axes)
    if axis_size(mesh, STAGE) == 1:
        return found
    first, *others = found.spec
    inner = (first,) if isinstance(first, str) else first or ()
    return NamedSharding(mesh, PartitionSpec((STAGE, *inner), *others))


def _present(mesh: Mesh, axis: Axis | None) -> Axis | None:
    """The part of it that the mesh has."""
    if axis is None or isinstance(axis, str):
        return axis if axis in mesh.axis_names else None
    found = tuple(name for name in axis if name in mesh.axis_names)
    return found if len(found) > 1 else found[0] if found else None


def on_each_device(function: Callable, arguments: tuple, specs: tuple, out: Any, mesh: Mesh) -> tuple[Callable, tuple]:
    """`function` as a program that each device runs on its share, and its arguments, NumPy's with their places.

    specs: of each argument, a PartitionSpec or a tree of them. out: the results' NamedShardings.
    """

    def place(argument: Any, spec: Any) -> Any:
        if not isinstance(argument, np.ndarray | np.generic):
            return argument
        return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=NamedSharding(mesh, spec))

    # check_vma cannot know that what follows a sum is the same on all devices.
    out_specs = jax.tree.map(lambda sharding: sharding.spec, out)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return sharded, tuple(map(place, arguments, specs))


# -- inside such a program, over an axis of the mesh; None: it runs on one device


def share_ids(size: int, axis: Axis | None, dtype=jnp.int32) -> jax.Array:
    """Where this device's `size` entries stand in an array that is split evenly over `axis`, [size]."""
    ids = jnp.arange(size, dtype=dtype)
    return ids if axis is None else ids + jax.lax.axis_index(axis).astype(dtype) * size


def gather(x: jax.Array, axis: Axis | None, dimension: int = -1) -> jax.Array:
    """The whole of an array of which a dimension is split over `axis`."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=dimension % x.ndim, tiled=True)


def once(x: jax.Array, axis: Axis | None) -> jax.Array:
    """x on the first device of `axis`, zeros on the others: what sums to x."""
    return x if axis is None else jnp.where(jax.lax.axis_index(axis) == 0, x, 0)


def total[T: (jax.Array, list[jax.Array])](x: T, axis: Axis | None) -> T:
    """The sum of what the devices of `axis` have."""
    return x if axis is None else jax.lax.psum(x, axis)
