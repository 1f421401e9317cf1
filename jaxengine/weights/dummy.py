"""Random weights: the same for a seed and a parameter's name, different for each layer, made where they stay."""

import math
from collections.abc import Mapping
from functools import cache
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxengine.sharding import ParamSpec

DEVIATION = 0.02  # transformers' initializer_range


def random_params(specs: Mapping[str, ParamSpec], dtype: str, mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Uniform around 0, scales of norms around 1. Nothing passes through the host."""
    return {
        path: _program(spec.shape, dtype, float(path.endswith(".scale")), spec.sharding(mesh))(
            np.uint32(seed & 0xFFFFFFFF), np.uint32(crc32(path.encode()))
        )
        for path, spec in specs.items()
    }


@cache  # parameters of one shape share a program, which is compiled once
def _program(shape: tuple[int, ...], dtype: str, mean: float, sharding: NamedSharding):
    def draw(seed: jax.Array, name: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), name)
        limit = DEVIATION * math.sqrt(3)
        return (mean + jax.random.uniform(key, shape, jnp.float32, -limit, limit)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
