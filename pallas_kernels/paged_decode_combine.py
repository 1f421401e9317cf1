"""What `paged_decode_mosaic` ends with: the parts of a row and KV head are put together, by a kernel through Triton."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile
from pallas_kernels.mosaic_tile import ALIGN
from pallas_kernels.paged_decode_streams import Work

COLUMNS = 32  # of a program
HELD = 2**13  # values of partial results that a program holds at a time


def combine(work: Work, partial_out: jax.Array, log_total: jax.Array, out: jax.Array, interpret: bool) -> jax.Array:
    """`out` [R * KH * N, D] with the N rows of each item (a row and KV head) that has several parts filled in.

    Stream s left partial_out [2 * S, N, D] and log2 of the weights' sums, log_total [2 * S, ROWS], at 2 * s, or at
    2 * s + 1 where it has the item's first unit. Row 0 of an item stands in log_total as it does in a tile of ALIGN.
    """
    rows, kv_heads = work.parts.shape
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, of_item=partial_out.shape[1], kv_heads=kv_heads),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid=(rows, kv_heads, out.shape[1] // COLUMNS),
        in_specs=[whole] * 5,
        out_specs=whole,
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_decode_combine",
    )(work.parts, work.first_stream, partial_out, log_total, out)


def _kernel(
    parts_ref,  # [R, KH]
    first_ref,  # [R, KH]
    partial_ref,  # [2 * S, of_item, D]
    log_total_ref,  # [2 * S, ROWS]
    _out,  # aliased to the output
    out_ref,  # [items * of_item, D]
    *,
    of_item: int,
    kv_heads: int,
):
    row, head, place = (pl.program_id(axis) for axis in range(3))
    parts, first = parts_ref[row, head], first_ref[row, head]

    @pl.when(parts > 1)
    def _():
        m, d = jnp.arange(pl.next_power_of_2(of_item)), place * COLUMNS + jnp.arange(COLUMNS)
        real, chunk = m < of_item, max(1, HELD // (m.size * d.size))
        start = (row * kv_heads + head) * of_item
        offset = tile.rem(start, ALIGN)

        def body(i, carry):
            out, top, total = carry
            index = i * chunk + jnp.arange(chunk)
            mask = (index < parts)[:, None] & real[None, :]
            slot = 2 * (first + index) + jnp.where(index == 0, 1, 0)
            logs = plt.load(log_total_ref.at[slot[:, None], (offset + m)[None, :]], mask=mask, other=tile.HIDDEN)
            at = (slot[:, None, None], m[None, :, None], d[None, None, :])
            values_mask = jnp.broadcast_to(mask[:, :, None], (chunk, m.size, d.size))
            values = plt.load(partial_ref.at[at], mask=values_mask, other=0)
            new_top = jnp.maximum(top, logs.max(axis=0))
            weight, decay = jnp.exp2(logs - new_top[None, :]), jnp.exp2(top - new_top)
            out = out * decay[:, None] + (values * weight[:, :, None]).sum(axis=0)
            return out, new_top, total * decay + weight.sum(axis=0)

        chunks = tile.div(parts + chunk - 1, chunk)
        out = tile.finish(jax.lax.fori_loop(0, chunks, body, tile.start(m.size, d.size)))
        at = ((start + m)[:, None], d[None, :])
        plt.store(out_ref.at[at], out.astype(out_ref.dtype), mask=jnp.broadcast_to(real[:, None], (m.size, d.size)))
