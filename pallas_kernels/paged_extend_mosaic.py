"""`paged_extend` for Hopper in Pallas Mosaic GPU: pages come by TMA, products run as wgmma.

A program has three warpgroups of 128 threads. One copies pages of K and V to shared memory, tile after tile; the other
two share these tiles. Each of the two has 64 query tokens of one head, and while one is in its softmax, the other has
the tensor cores (Shah et al. 2024, FlashAttention-3).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import paged_tile as tile

ROWS = 64  # query tokens of a warpgroup: the rows of a wgmma
CONSUMERS = 2  # warpgroups that multiply
# Of the 512 registers that a thread of each warpgroup may have together; a copying thread needs few.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
SWIZZLE = 128  # bytes


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_kv: int  # keys in a tile
    stages: int  # tiles of K and of V in shared memory

    def __post_init__(self) -> None:
        tile.check_tuning({"block_kv": self.block_kv}, {"stages": self.stages})
        if self.block_kv < 64:
            raise ValueError(f"{self} must have a block_kv of at least 64")

    @classmethod
    def from_shapes(cls, q, k_pages) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes)."""
        return cls(block_kv=128 if q.shape[2] <= 128 else 64, stages=2)


def supports(q, k_pages, v_pages, scale: float) -> bool:
    """Whether the kernel takes these arrays (or anything with their shapes and dtypes)."""
    tokens, _, dim = q.shape
    page_size = k_pages.shape[2]
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k_pages.dtype == v_pages.dtype
        and dim in (64, 128, 256)
        and page_size >= 8
        and not page_size & (page_size - 1)
        and tokens >= ROWS
        and scale > 0
    )


def paged_extend_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    block_row: jax.Array,
    block_start: jax.Array,
    q_start: jax.Array,
    q_len: jax.Array,
    lengths: jax.Array,
    out: jax.Array,
    *,
    block_q: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tuning: TuningConfig | None = None,
    interpret=None,
) -> jax.Array:
    """See `paged_extend`, which checks the arguments; what `supports` takes, on a card of compute capability 9.0."""
    tuning = tuning or TuningConfig.from_shapes(q, k_pages)
    block_kv, stages = tuning.block_kv, tuning.stages
    (pages, kv_heads, page_size, dim), dtype = k_pages.shape, q.dtype
    units = pl.cdiv(block_q, ROWS) * (q.shape[1] // kv_heads)  # of a block and KV head: 64 tokens of a query head
    tiled = plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize)), plgpu.SwizzleTransform(SWIZZLE)
    kv = plgpu.SMEM((stages, block_kv, dim), dtype, transforms=tiled)
    copies = block_kv // min(page_size, block_kv)
    loaded = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    released = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    kernel = partial(_kernel, block_q=block_q, page_size=page_size, block_kv=block_kv, stages=stages, units=units,
                     scale=scale, window=window, softcap=softcap, simulated=interpret is not None)  # fmt: skip
    out_ref = jax.new_ref(out)
    plgpu.kernel(
        kernel,
        scratch_types=[
            plgpu.SMEM((CONSUMERS, ROWS, dim), dtype, transforms=tiled),
            kv,
            kv,
            plgpu.SMEM((CONSUMERS, ROWS, SWIZZLE // dtype.itemsize), dtype),
            loaded,
            loaded,
            released,
            released,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        grid=(len(block_row), kv_heads, pl.cdiv(units, CONSUMERS)),
        grid_names=("block", "kv_head", "pair"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_extend_mosaic",
        **({} if interpret is None else {"interpret": interpret}),
    )(block_row, block_start, q_start, q_len, lengths, page_table, q,
      k_pages.reshape(pages * kv_heads, page_size, dim), v_pages.reshape(pages * kv_heads, page_size, dim),
      out_ref)  # fmt: skip
    return out_ref[...]


def _kernel(
    block_row_ref,  # [NB]
    block_start_ref,  # [NB]
    q_start_ref,  # [R]
    q_len_ref,  # [R]
    lengths_ref,  # [R]
    table_ref,  # [R, W]
    q_ref,  # [T, H, D]
    k_ref,  # [pages * KH, page_size, D]
    v_ref,
    out_ref,  # [T, H, D]
    q_smem,  # [CONSUMERS, ROWS, D]: the queries, at last the output
    k_smem,  # [stages, block_kv, D]
    v_smem,
    rows_smem,  # [CONSUMERS, ROWS, 64]: output in plain order, for tiles that are not stored whole
    k_loaded,  # barriers, one a stage
    v_loaded,
    k_released,
    v_released,
    turn,  # barrier: the other consumer has issued its products
    *,
    block_q: int,
    page_size: int,
    block_kv: int,
    stages: int,
    units: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    simulated: bool,
):
    warpgroup = jax.lax.axis_index("warpgroup")
    # Long blocks first, so that the short ones even out when the multiprocessors end.
    block = block_row_ref.shape[0] - 1 - jax.lax.axis_index("block")
    kv_head, pair = jax.lax.axis_index("kv_head"), jax.lax.axis_index("pair")
    tokens, heads, dim = q_ref.shape
    kv_heads = jax.lax.axis_size("kv_head")
    group = heads // kv_heads
    row = block_row_ref[block]
    some_row = jnp.maximum(row, 0)
    row_start, row_len, length = q_start_ref[some_row], q_len_ref[some_row], lengths_ref[some_row]
    start = block_start_ref[block]
    end = jnp.minimum(start + block_q, row_start + row_len)
    context = length - row_len - row_start  # token t of q stands at position context + t

    # The program's keys: all that any of its tokens sees.
    first_token = start + ROWS * tile.div(CONSUMERS * pair, group)
    last_unit = jnp.minimum(CONSUMERS * pair + CONSUMERS, units) - 1
    end_token = jnp.minimum(start + ROWS * (tile.div(last_unit, group) + 1), end)
    key_start = tile.first_key(context + first_token, window, page_size)
    key_end = context + end_token
    steps = tile.div(key_end - key_start + block_kv - 1, block_kv)
    real = (row >= 0) & (first_token < end_token)

    @pl.when(real & (warpgroup == CONSUMERS))
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        rows = min(page_size, block_kv)  # of a copy
        absent = k_ref.shape[0]  # beyond the pool: the copy gives zeros

        @pl.loop(0, steps)
        def _(step):
            slot = tile.rem(step, stages)
            key = key_start + step * block_kv
            places = []
            for i in range(block_kv // rows):
                at = key + i * rows
                inside = at < key_end
                page = table_ref[row, jnp.where(inside, tile.div(at, page_size), 0)]
                places.append((jnp.where(inside, page * kv_heads + kv_head, absent), tile.rem(at, page_size)))
            for pool, smem, loaded, released in (
                (k_ref, k_smem, k_loaded, k_released),
                (v_ref, v_smem, v_loaded, v_released),
            ):

                @pl.when(step >= stages)
                def _(released=released):
                    plgpu.barrier_wait(released.at[slot])

                for i, (page, offset) in enumerate(places):
                    source = pool.at[page] if rows == page_size else pool.at[page, pl.ds(offset, rows)]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot, pl.ds(i * rows, rows)], loaded.at[slot])

    @pl.when(real & (warpgroup < CONSUMERS))
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        unit = CONSUMERS * pair + warpgroup
        head = kv_head * group + tile.rem(unit, group)
        tile_start = start + ROWS * tile.div(unit, group)
        tile_end = jnp.where(unit < units, jnp.minimum(tile_start + ROWS, end), tile_start)
        base = jnp.minimum(tile_start, tokens - ROWS)  # of the rows that are read: all of them must exist
        copied = plgpu.Layout.SMEM_GMEM_COPY((ROWS, dim), q_ref.dtype, SWIZZLE)
        queries = q_smem.at[warpgroup]
        queries[...] = plgpu.load(q_ref.at[pl.ds(base, ROWS), head], layout=copied, optimized=False)
        plgpu.commit_smem()

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        plgpu.barrier_wait(k_loaded.at[0])
        pl.when(warpgroup == 1)(take_turns)
        factor = tile.LOG2E if softcap else scale * tile.LOG2E

        def attend(step, carry, masked):
            out, top, total = carry
            slot = tile.rem(step, stages)

            def multiply_keys(accumulator):
                plgpu.wgmma(accumulator, queries, k_smem.at[slot].transpose((1, 0)))
                take_turns()
                return accumulator[...]

            scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, block_kv), jnp.float32))
            plgpu.barrier_arrive(k_released.at[slot])
            if softcap:
                scores = jnp.tanh(scores * (scale / softcap)) * softcap
            if masked:
                iota = partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, block_kv), layout=plgpu.Layout.WGMMA)
                ahead = iota(1) - iota(0) + (key_start + step * block_kv - context - base)  # keys after the query's own
                seen = ahead <= 0
                if window is not None:
                    seen &= ahead > -window
                scores = jnp.where(seen, scores, tile.HIDDEN)
            new_top = jnp.maximum(top, scores.max(axis=1) * factor)
            decay = jnp.exp2(top - new_top)
            weight = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(new_top, scores.shape, [0]))
            out *= jax.lax.broadcast_in_dim(decay, out.shape, [0])
            total = total * decay + weight.sum(axis=1)
            out, total, new_top, weight = jax.lax.optimization_barrier((out, total, new_top, weight.astype(q_ref.dtype)))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_loaded.at[slot])
            if masked:
                _clear_beyond(v_smem.at[slot], key_end - key_start - step * block_kv, clear)
            plgpu.barrier_wait(turn)

            def multiply_values(accumulator):
                plgpu.wgmma(accumulator, weight, v_smem.at[slot])

                @pl.when(step + 1 < steps)
                def _():
                    plgpu.barrier_wait(k_loaded.at[tile.rem(step + 1, stages)])

            if simulated:  # interpret mode knows no run_state, nor products of registers
                out += jnp.dot(weight, v_smem[slot], preferred_element_type=jnp.float32)
                plgpu.commit_smem()
                pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(k_loaded.at[tile.rem(step + 1, stages)]))
            else:
                out = pl.run_state(multiply_values)(plgpu.ACC.init(out))
            plgpu.barrier_arrive(v_released.at[slot])
            return out, new_top, total

        # What lies behind a row's last key in its page may be anything, NaN too. The second consumer gets its turn to
        # multiply after the first has had its own, so one of them clears it for both.
        clear = (warpgroup == 0) & (tile.div(key_end + page_size - 1, page_size) * page_size > length)
        by_row = plgpu.Layout.WGMMA.reduce(1)
        carry = (
            plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), tile.HIDDEN, jnp.float32), by_row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
        )
        # Tiles from whole_start to whole_end are seen whole by all queries.
        whole_end = tile.div(context + first_token + 1 - key_start, block_kv)
        if window is not None:
            hidden = jnp.maximum(context + end_token - window - key_start, 0)  # keys that some query sees no more
            whole_start = jnp.minimum(tile.div(hidden + block_kv - 1, block_kv), steps)
            whole_end = jnp.maximum(whole_start, whole_end)
            carry = jax.lax.fori_loop(0, whole_start, partial(attend, masked=True), carry)
        else:
            whole_start = 0
        carry = jax.lax.fori_loop(whole_start, whole_end, partial(attend, masked=False), carry)
        carry = jax.lax.fori_loop(whole_end, steps, partial(attend, masked=True), carry)
        pl.when(warpgroup == 0)(take_turns)

        out, _, total = carry
        result = (out * jax.lax.broadcast_in_dim(1 / total, out.shape, [0])).astype(q_ref.dtype)

        @pl.when(tile_end - tile_start == ROWS)
        def _():
            queries[...] = result
            out_ref[pl.ds(base, ROWS), head] = plgpu.load(queries, layout=copied)

        @pl.when((tile_start < tile_end) & (tile_end - tile_start < ROWS))
        def _():
            columns = rows_smem.shape[2]
            staged = rows_smem.at[warpgroup]
            for column in range(0, dim, columns):
                staged[...] = result[:, column : column + columns]
                plgpu.commit_smem()

                @pl.loop(tile_start - base, tile_end - base)
                def _(i, column=column):
                    plgpu.copy_smem_to_gmem(
                        staged.at[pl.ds(i, 1)], out_ref.at[pl.ds(base + i, 1), head, pl.ds(column, columns)]
                    )

                plgpu.wait_smem_to_gmem(0)


def _clear_beyond(values, count: jax.Array, when: jax.Array) -> None:
    """Zeros in the rows of values [block_kv, D] from `count` on, if `when` holds and there are any."""
    block_kv, dim = values.shape
    columns = SWIZZLE // values.dtype.itemsize
    layout = plgpu.Layout.SMEM_GMEM_COPY((ROWS, columns), values.dtype, SWIZZLE)

    @pl.when(when & (count < block_kv))
    def _():
        for row in range(0, block_kv, ROWS):
            inside = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=layout) + row < count
            for column in range(0, dim, columns):
                part = values.at[pl.ds(row, ROWS), pl.ds(column, columns)]
                part[...] = jnp.where(inside, plgpu.load(part, layout=layout), jnp.zeros((), values.dtype))
        plgpu.commit_smem()
