"""What the attention kernels in Mosaic GPU share: tiles in swizzled shared memory, online softmax, what they take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import paged_tile as tile

ROWS = 64  # of queries: the rows of a wgmma
ALIGN = 8  # rows that TMA copies to swizzled shared memory together
SWIZZLE = 128  # bytes
# Of an array (shape, dtype) on its way between global and swizzled shared memory: 16 bytes a thread, no bank conflicts.
COPY_LAYOUT = partial(plgpu.Layout.SMEM_GMEM_COPY, swizzle=SWIZZLE)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # of a number for each row of a product

Carry = tuple[jax.Array, jax.Array, jax.Array]  # weighted values [ROWS, D], top scores and total weights [ROWS]


def supports(q, k_pages, v_pages, scale: float) -> bool:
    """What both kernels ask of arrays (or anything with their shapes and dtypes)."""
    page_size, dim = k_pages.shape[2:]
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and k_pages.dtype == v_pages.dtype
        and k_pages.dtype in (q.dtype, *tile.FLOAT8)
        and dim in (64, 128, 256)
        and page_size >= 8
        and not page_size & (page_size - 1)
        and scale > 0  # the largest product is the largest score
    )


def check_supported(supported: bool, q, k_pages, scale: float) -> None:
    """Raises ValueError if it is not."""
    if not supported:
        raise ValueError(f"this kernel does not take {q.shape=} {q.dtype=} {k_pages.shape=} {k_pages.dtype=} {scale=}")


def swizzle(dtype) -> tuple:
    """How what the tensor cores read lies in shared memory."""
    tiling = plgpu.TilingTransform((ALIGN, SWIZZLE // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(SWIZZLE)  # type: ignore[abstract]


def swizzled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory for it."""
    return plgpu.SMEM(shape, dtype, transforms=swizzle(dtype))


def of_products(q, k_pages) -> Any:
    """The dtype in which products are computed, of float32 sums: for floats of 8 bits see `paged_tile.in_float16`."""
    return jnp.dtype(jnp.float16 if k_pages.dtype in tile.FLOAT8 else q.dtype)


def widen(narrow, wide, dtype) -> None:
    """wide [block_kv, D], swizzled, = narrow in plain order: floats of 8 bits of this dtype, or their bytes."""
    rows, dim = narrow.shape
    columns = min(dim, 128)
    in_warp = 256 // columns  # rows: a thread has 8 values of one, and the banks of shared memory do not conflict
    tiling = plgpu.Tiling(((4 * in_warp, columns), (in_warp, columns), (8,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    for row in range(0, rows, ROWS):
        for column in range(0, dim, columns):
            part = pl.ds(row, ROWS), pl.ds(column, columns)
            values = jax.lax.bitcast_convert_type(plgpu.load(narrow.at[part], layout=layout), dtype)
            wide[part] = values.astype(wide.dtype)
    plgpu.commit_smem()


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


def start(dim: int, sinks: jax.Array | None = None) -> Carry:
    """The carry before the first tile: the sinks, float32 [ROWS] or one, each of weight 1 and no value, or nothing."""
    top, total = (tile.HIDDEN, 0.0) if sinks is None else (sinks * tile.LOG2E, 1.0)
    return (
        plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), top, jnp.float32), BY_ROW),
        plgpu.layout_cast(jnp.full((ROWS,), total, jnp.float32), BY_ROW),
    )


def in_powers_of_two(scale: float, softcap: float | None) -> float:
    """What `capped` scores are multiplied by."""
    return tile.LOG2E if softcap else scale * tile.LOG2E


def capped(products: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    return jnp.tanh(products * (scale / softcap)) * softcap if softcap else products


def weigh(carry: Carry, scores: jax.Array, factor: float) -> tuple[Carry, jax.Array]:
    """One step of online softmax (Milakov, Gimelshein 2018) but for adding the values, and their weights.

    Scores of -inf weigh 0 for a query that has seen no key yet too, as the top score is finite. (A finite score would
    not do: in one instruction with the subtraction, its product with the factor is not rounded as the top score is.)
    """
    out, top, total = carry
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    decay = jnp.exp2(top - new_top)
    weight = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(new_top, scores.shape, [0]))
    out *= jax.lax.broadcast_in_dim(decay, out.shape, [0])
    return (out, new_top, total * decay + weight.sum(axis=1)), weight


def add_values(
    out: jax.Array, weight: jax.Array, values, simulated: bool, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """out + weight @ values in shared memory. `simulated`: interpret mode has no run_state, nor wgmma of registers."""
    if simulated:
        out += jnp.dot(weight, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        meanwhile()
        return out

    def multiply(accumulator):
        plgpu.wgmma(accumulator, weight, values)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(out))
