"""What the attention kernels in Mosaic GPU share: tiles in swizzled shared memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of queries: the rows of a wgmma
ALIGN = 8  # rows that TMA copies to swizzled shared memory together
SWIZZLE = 128  # bytes
# Of an array (shape, dtype) on its way between global and swizzled shared memory: 16 bytes a thread, no bank conflicts.
COPY_LAYOUT = partial(plgpu.Layout.SMEM_GMEM_COPY, swizzle=SWIZZLE)


def swizzled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory for what the tensor cores read."""
    tiling = plgpu.TilingTransform((ALIGN, SWIZZLE // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))  # type: ignore[abstract]


def multiprocessors() -> int:
    """Of this machine's card; of an H100 where the program is lowered for a card that is not here."""
    return getattr(jax.devices()[0], "core_count", 0) or 132


def clear_beyond(values, count: jax.Array, when: bool | jax.Array) -> None:
    """Zeros in the rows of values [block_kv, D] from `count` on, if `when` holds and there are any."""
    block_kv, dim = values.shape
    columns = SWIZZLE // values.dtype.itemsize
    layout = COPY_LAYOUT((ROWS, columns), values.dtype)

    @pl.when(when & (count < block_kv))
    def _():
        for row in range(0, block_kv, ROWS):
            inside = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=layout) + row < count
            for column in range(0, dim, columns):
                part = values.at[pl.ds(row, ROWS), pl.ds(column, columns)]
                part[...] = jnp.where(inside, plgpu.load(part, layout=layout), jnp.zeros((), values.dtype))
        plgpu.commit_smem()
