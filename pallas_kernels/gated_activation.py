"""activation(gate) * up in one pass, from the product that holds both side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile

BLOCK = 1024  # values of a program


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed only."""

    num_warps: int = 4

    def __post_init__(self) -> None:
        tile.check_tuning({"num_warps": self.num_warps}, {})


@partial(jax.jit, static_argnames=("activation", "tuning", "interpret"))
def gated_activation(
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    *,
    tuning: TuningConfig = TuningConfig(),
    interpret: bool = False,
) -> jax.Array:
    """activation(x[:, :F]) * x[:, F:], for x [T, 2 F] -> [T, F] (Shazeer 2020).

    `activation` is elementwise and computed in float32; its result is rounded to x's dtype, as the product is.
    ValueError for a shape that does not fit.
    """
    _check(x)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, activation=activation),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // 2), x.dtype),
        grid=(x.shape[0], pl.cdiv(x.shape[1] // 2, BLOCK)),
        in_specs=[whole],
        out_specs=whole,
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
        interpret=interpret,
        name="gated_activation",
    )(x)


@partial(jax.jit, static_argnames="activation")
def gated_activation_reference(x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The same as `gated_activation` in plain jax.numpy."""
    _check(x)
    gate, up = jnp.split(x, 2, axis=1)
    return activation(gate.astype(jnp.float32)).astype(x.dtype) * up


def _check(x) -> None:
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"{x.shape=} must be [tokens, 2 * width]")


def _kernel(x_ref, out_ref, *, activation: Callable[[jax.Array], jax.Array]):
    token, size = pl.program_id(0), out_ref.shape[1]
    i = pl.program_id(1) * BLOCK + jnp.arange(BLOCK)
    mask = i < size if size % BLOCK else None
    other = None if mask is None else 0
    gate, up = (plt.load(x_ref.at[token, i + start], mask=mask, other=other) for start in (0, size))
    active = activation(gate.astype(jnp.float32)).astype(x_ref.dtype)
    plt.store(
        out_ref.at[token, i], (active.astype(jnp.float32) * up.astype(jnp.float32)).astype(x_ref.dtype), mask=mask
    )
