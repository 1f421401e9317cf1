"""Canonical parameters as an Orbax checkpoint: the tree of their dotted paths, in the folder `params`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxengine.errors import CheckpointError
from jaxengine.models import flatten, nest
from jaxengine.sharding import ParamSpec, named_sharding
from jaxengine.weights.checkpoint import ORBAX, raise_faults


def save(folder: Path, params: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp  # takes half a second

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), nest(params))


def check(folder: Path, specs: Mapping[str, ParamSpec]) -> None:
    """Raises CheckpointError with everything that is not as `specs` say; reads no weights."""
    import orbax.checkpoint as ocp

    path = (folder / ORBAX).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = dict(flatten(checkpointer.metadata(path).item_metadata.tree))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CheckpointError(f"{path}: not a complete Orbax checkpoint: {error}") from error
    raise_unlike(path, {name: tuple(leaf.shape) for name, leaf in stored.items()}, specs)


def restore(folder: Path, specs: Mapping[str, ParamSpec], dtype: str, mesh: Mesh) -> dict[str, jax.Array]:
    """Straight to the devices and to `dtype`. Raises CheckpointError, see `check`."""
    import orbax.checkpoint as ocp

    check(folder, specs)
    path = (folder / ORBAX).absolute()
    want: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=named_sharding(mesh, spec.axes))
        for name, spec in specs.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return dict(flatten(checkpointer.restore(path, nest(want))))
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read, it may be damaged: {error}") from error


def raise_unlike(path: Path, shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, ParamSpec]) -> None:
    """Raises CheckpointError naming every canonical parameter that is missing, unexpected or of the wrong shape."""
    faults = [f"missing: {name}" for name in specs if name not in shapes]
    faults += [f"unexpected: {name} {list(shape)}" for name, shape in shapes.items() if name not in specs]
    faults += [
        f"of shape {list(shape)}, where the config says {list(specs[name].shape)}: {name}"
        for name, shape in shapes.items()
        if name in specs and shape != specs[name].shape
    ]
    raise_faults(path, faults)
