"""Lowering for CUDA on a machine without a GPU."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh


def lower_for_cuda(function, *args, card: str = "NVIDIA H200", **kwargs) -> str:
    """StableHLO text of `function(*args)`, arrays or their ShapeDtypeStructs; raises what the real lowering raises."""
    device = AbstractDevice(device_kind=card, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).as_text()
