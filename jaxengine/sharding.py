"""Mesh, logical axes, and the one table of rules that maps them to mesh axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def create_mesh(tensor: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data x tensor` devices, the first ones unless `devices` names others.

    Raises ValueError when there are fewer devices than asked for.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < data * tensor:
        raise ValueError(f"{tensor=} x {data=} needs {data * tensor} devices, there are {len(devices)}")
    grid = np.asarray(devices[: data * tensor]).reshape(data, tensor)
    return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


@cache  # a fresh NamedSharding in each step defeats jit's fast dispatch path
def named_sharding(mesh: Mesh, axes: tuple[str | None, ...] = ()) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes; `()` replicates."""
    names = [None if axis is None else RULES[axis] for axis in axes]
    names = [name if name in mesh.axis_names else None for name in names]
    used = [name for name in names if name is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical {axes=} map two dimensions to one mesh axis: {names}")
    return NamedSharding(mesh, PartitionSpec(*names))
