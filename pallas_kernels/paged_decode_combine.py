"""What `paged_decode_mosaic` ends with: the parts of a row and KV head are put together, by a second, short kernel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import paged_tile as tile
from pallas_kernels.mosaic_parts import name_alike
from pallas_kernels.mosaic_tile import ALIGN, ROWS
from pallas_kernels.paged_decode_streams import ALL, Stream, Work


def combine(work: Work, partial_out: jax.Array, log_total: jax.Array, out: jax.Array, interpret: bool) -> jax.Array:
    """See `combine_reference`. Both partial results are of ROWS streams at least, as so many are loaded at a time."""
    streams, (_, of_item, dim), out_ref = len(work.streams), partial_out.shape, jax.new_ref(out)
    plgpu.kernel(
        partial(_kernel, of_item=of_item, simulated=interpret),
        scratch_types=[plgpu.SMEM((dim,), out.dtype)],
        grid=(streams, of_item),
        grid_names=("stream", "query"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=4096),
        kernel_name="paged_decode_combine",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(work.streams, work.order, work.parts, partial_out.reshape(-1, 2, of_item, dim), log_total.reshape(-1, 2, ROWS),
      out_ref)  # fmt: skip
    return out_ref[...]


def _kernel(
    streams,  # [S, 9]
    order,  # [R]
    parts,  # [R, KH]
    values,  # [S or more, 2, of_item, D]
    logs,  # [S or more, 2, ROWS]
    out,  # [R * KH * of_item, D]
    staged,  # [D]
    *,
    of_item: int,
    simulated: bool,
):
    """One query of the stream's last item, if the stream has its first unit and the next one goes on with it.

    Tiles hold the parts of ROWS streams after that one, a part a row; all columns of a row have the part's log.
    """
    if not simulated:
        name_alike(streams)
    number, query = jax.lax.axis_index("stream"), jax.lax.axis_index("query")
    stream = Stream(*(streams[number, i] for i in range(len(Stream._fields))))

    @pl.when((stream.end < ALL) & ((stream.segments > 1) | (stream.segments == 1) & (stream.begin == 0)))
    def _():
        last, live = stream.item + stream.segments - 1, jnp.maximum(stream.live, 1)
        row, head = order[jax.lax.rem(last, live)], jax.lax.div(last, live)
        start, end = (row * parts.shape[1] + head) * of_item, number + parts[row, head]
        place, dim = tile.rem(start, ALIGN) + query, values.shape[3]
        whole, by_row, by_column = (plgpu.Layout.WGMMA, *(plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0)))
        load = partial(plgpu.load, optimized=False)

        def body(i, carry):
            result, top, total = carry
            begin = number + 1 + i * ROWS
            base = jnp.minimum(begin, values.shape[0] - ROWS)
            which = plgpu.broadcasted_iota(jnp.int32, (ROWS, dim), 0, layout=whole) + base
            inside = (which >= begin) & (which < end)
            log = jax.lax.broadcast_in_dim(load(logs.at[pl.ds(base, ROWS), 0, place], layout=by_row), (ROWS, dim), [0])
            log = jnp.where(inside, log, tile.HIDDEN)
            value = jnp.where(inside, load(values.at[pl.ds(base, ROWS), 0, query], layout=whole), 0.0)
            new_top = jnp.maximum(top, log.max(axis=0))
            decay, weight = jnp.exp2(top - new_top), jnp.exp2(log - jax.lax.broadcast_in_dim(new_top, log.shape, [1]))
            return result * decay + (value * weight).sum(axis=0), new_top, total * decay + weight.sum(axis=0)

        first = load(values.at[number, 1, query], layout=by_column)
        top, total = jnp.full((dim,), logs[number, 1, place]), jnp.ones((dim,), jnp.float32)
        carry = first, *(plgpu.layout_cast(x, by_column) for x in (top, total))
        result, _, total = jax.lax.fori_loop(0, tile.div(end - number - 2 + ROWS, ROWS), body, carry)
        staged[...] = (result / total).astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[start + query])
        plgpu.wait_smem_to_gmem(0)
