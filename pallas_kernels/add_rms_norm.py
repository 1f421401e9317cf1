"""A residual sum and its RMS norm in one pass: the sum is needed twice, and XLA would launch a kernel for each."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed only."""

    num_warps: int

    def __post_init__(self) -> None:
        tile.check_tuning({"num_warps": self.num_warps}, {})

    @classmethod
    def from_shapes(cls, x) -> "TuningConfig":
        """The choice for this array (or anything with its shape): a 16-byte load for each thread."""
        return cls(max(1, min(16, pl.next_power_of_2(x.shape[1]) // 256)))


@partial(jax.jit, static_argnames=("eps", "tuning", "interpret"))
def add_rms_norm(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    tuning: TuningConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x + y, and that over its root mean square (Zhang & Sennrich 2019), times `scale`.

    x, y [T, E] of one dtype, which the sum is rounded to first; scale [E]. Or y is float32 [P, T, E], parts that are
    added up. Returns two arrays like x. ValueError for shapes that do not fit.
    """
    _check(x, y, scale)
    tuning = tuning or TuningConfig.from_shapes(x)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return tuple(
        pl.pallas_call(
            partial(_kernel, eps=eps),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
            grid=(x.shape[0],),
            in_specs=[whole] * 3,
            out_specs=[whole] * 2,
            compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
            interpret=interpret,
            name="add_rms_norm",
        )(x, y, scale)
    )


@partial(jax.jit, static_argnames="eps")
def add_rms_norm_reference(x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """The same as `add_rms_norm` in plain jax.numpy."""
    _check(x, y, scale)
    total = x + y if y.ndim == 2 else (x.astype(jnp.float32) + y.sum(axis=0)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(x.dtype) * scale


def _check(x, y, scale) -> None:
    whole = y.shape == x.shape and y.dtype == x.dtype
    parts = y.ndim == 3 and y.shape[0] > 0 and y.shape[1:] == x.shape and y.dtype == jnp.float32
    if x.ndim != 2 or not (whole or parts) or scale.shape != x.shape[1:]:
        raise ValueError(
            f"{x.shape=} {x.dtype=} {y.shape=} {y.dtype=} {scale.shape=} must be [T, E], [T, E] or parts, float32 "
            "[P, T, E], and [E]"
        )


def _kernel(x_ref, y_ref, scale_ref, sum_ref, norm_ref, *, eps: float):
    token, size = pl.program_id(0), x_ref.shape[1]
    e = jnp.arange(pl.next_power_of_2(size))
    mask = e < size if e.size > size else None
    parts = [()] if len(y_ref.shape) == 2 else [(part,) for part in range(y_ref.shape[0])]
    x, scale, *ys = (
        plt.load(ref, mask=mask, other=None if mask is None else 0)
        for ref in (x_ref.at[token, e], scale_ref.at[e], *(y_ref.at[(*part, token, e)] for part in parts))
    )
    total = (x.astype(jnp.float32) + sum(y.astype(jnp.float32) for y in ys)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    normed = (wide * jax.lax.rsqrt((wide * wide).sum() / size + eps)).astype(x.dtype)
    scaled = (normed.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)
    plt.store(sum_ref.at[token, e], total, mask=mask)
    plt.store(norm_ref.at[token, e], scaled, mask=mask)
