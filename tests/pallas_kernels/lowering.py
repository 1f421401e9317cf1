"""Lowering for CUDA on a machine without a GPU."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

H200 = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"))


def lower_for_cuda(function, *args, **kwargs) -> str:
    """StableHLO text of `function(*args)`, arrays or their ShapeDtypeStructs; raises what the real lowering raises."""
    with jax.sharding.use_abstract_mesh(H200):
        return jax.jit(function).trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).as_text()
