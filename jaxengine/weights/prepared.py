"""Parameters as the step runs them, and whose they are."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxengine.config import EngineConfig
from jaxengine.errors import MemoryPlanError
from jaxengine.models import prepare
from jaxengine.weights.checkpoint import Checkpoint
from jaxengine.weights.loading import load_params


class Prepared(NamedTuple):
    params: dict[str, jax.Array]  # see models.prepare
    borrowed: bool  # somebody else's, who may delete them


def load_prepared(
    checkpoint: Checkpoint,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    on_tensor: Callable[[int, int], None] | None = None,
    remedy: str = "",
) -> Prepared:
    """`config` is resolved. Raises MemoryPlanError, which ends with `remedy`, when they do not fit."""
    fuse = bool(config.fuse_weights)
    try:
        params = load_params(checkpoint, config.dtype, mesh, seed=config.seed, borrow=not fuse, on_tensor=on_tensor)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        # What prepare no longer needs is free only when it is done, and the memory plan counts what is free.
        params = jax.block_until_ready(prepare(checkpoint.config, params, fuse, on_cpu, mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryPlanError(f"the weights do not fit into the device's memory ({error}); {remedy}") from error
    return Prepared(params, checkpoint.format == "memory" and not fuse)
