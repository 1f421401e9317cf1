"""`paged_extend` for Hopper in Pallas Mosaic GPU: pages come by TMA, products run as wgmma.

A program has three warpgroups of 128 threads. One copies pages of K and V to shared memory, tile after tile; the other
two share these tiles. Each of the two has 64 query tokens of one head, and while one is in its softmax, the other has
the tensor cores (Shah et al. 2024, FlashAttention-3).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
    q_buffers: int = 2  # items whose queries are in shared memory

    def __post_init__(self) -> None:
        tile.check_tuning({"block_kv": self.block_kv}, {"stages": self.stages, "q_buffers": self.q_buffers})
        if self.block_kv < 64:
            raise ValueError(f"{self} must have a block_kv of at least 64")

    @classmethod
    def from_shapes(cls, q, k_pages) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes)."""
        return cls(block_kv=128, stages=2) if q.shape[2] <= 128 else cls(block_kv=64, stages=2, q_buffers=1)


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
    columns = SWIZZLE // dtype.itemsize
    units = pl.cdiv(block_q, ROWS) * (q.shape[1] // kv_heads)  # of a block and KV head: 64 tokens of a query head
    items = len(block_row) * kv_heads * pl.cdiv(units, CONSUMERS)
    programs = min(items, _multiprocessors())
    tiled = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE)
    kv = plgpu.SMEM((stages, block_kv, dim), dtype, transforms=tiled)
    copies = block_kv // min(page_size, block_kv)
    loaded = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    released = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    kernel = partial(_kernel, block_q=block_q, page_size=page_size, kv_heads=kv_heads, units=units, items=items,
                     programs=programs, scale=scale, window=window, softcap=softcap,
                     simulated=interpret is not None)  # fmt: skip
    out_ref = jax.new_ref(out)
    plgpu.kernel(
        kernel,
        scratch_types=[
            plgpu.SMEM((tuning.q_buffers, CONSUMERS, ROWS, dim), dtype, transforms=tiled),
            kv,
            kv,
            plgpu.SMEM((CONSUMERS, ROWS, columns), dtype),
            plgpu.Barrier(num_barriers=tuning.q_buffers),
            loaded,
            loaded,
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tuning.q_buffers),
            released,
            released,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_extend_mosaic",
        **({} if interpret is None else {"interpret": interpret}),
    )(block_row, block_start, q_start, q_len, lengths, page_table, q,
      k_pages.reshape(pages * kv_heads, page_size, dim), v_pages.reshape(pages * kv_heads, page_size, dim),
      out_ref)  # fmt: skip
    return out_ref[...]


def _multiprocessors() -> int:
    """Of the card, or of an H100 where there is none: a program may be lowered for another machine."""
    return getattr(jax.devices()[0], "core_count", 0) or 132


class Item(NamedTuple):
    """Scalars of a piece of work: a block and KV head, and two units of it."""

    real: jax.Array  # bool; the others are steps = 0 or nothing at all
    row: jax.Array
    kv_head: jax.Array
    pair: jax.Array
    start: jax.Array  # the block's tokens
    end: jax.Array
    length: jax.Array  # the row's keys
    context: jax.Array  # token t of q stands at position context + t
    first_token: jax.Array  # the tokens of the two units together
    end_token: jax.Array
    key_start: jax.Array  # the keys that any of them sees
    steps: jax.Array  # tiles of keys


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
    q_smem,  # [buffers, CONSUMERS, ROWS, D]: the queries of an item, at last its output
    k_smem,  # [stages, block_kv, D]
    v_smem,
    rows_smem,  # [CONSUMERS, ROWS, 64]: output in plain order, for units that are not stored whole
    q_loaded,  # barriers, one a buffer or stage
    k_loaded,
    v_loaded,
    q_released,
    k_released,
    v_released,
    turn,  # barrier: the other consumer has issued its products
    *,
    block_q: int,
    page_size: int,
    kv_heads: int,
    units: int,
    items: int,
    programs: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    simulated: bool,
):
    warpgroup, program = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("program")
    tokens, heads, dim = q_ref.shape
    group = heads // kv_heads
    (buffers, *_), (stages, block_kv, _) = q_smem.shape, k_smem.shape
    columns = rows_smem.shape[2]
    copied = partial(plgpu.Layout.SMEM_GMEM_COPY, dtype=q_ref.dtype, swizzle=SWIZZLE)

    def item(i) -> Item:
        # Items from long to short, dealt out to the programs to and fro.
        number = i * programs + jnp.where(tile.rem(i, 2) == 0, program, programs - 1 - program)
        pairs = pl.cdiv(units, CONSUMERS)
        block = block_row_ref.shape[0] - 1 - tile.div(number, kv_heads * pairs)
        kv_head, pair = tile.rem(tile.div(number, pairs), kv_heads), tile.rem(number, pairs)
        block = jnp.maximum(block, 0)
        row = block_row_ref[block]
        real, row = (number < items) & (row >= 0), jnp.maximum(row, 0)
        row_start, row_len, length = q_start_ref[row], q_len_ref[row], lengths_ref[row]
        start = block_start_ref[block]
        end = jnp.minimum(start + block_q, row_start + row_len)
        context = length - row_len - row_start
        first_token = start + ROWS * tile.div(CONSUMERS * pair, group)
        last_unit = jnp.minimum(CONSUMERS * pair + CONSUMERS, units) - 1
        end_token = jnp.minimum(start + ROWS * (tile.div(last_unit, group) + 1), end)
        real &= first_token < end_token
        key_start = jnp.where(real, tile.first_key(context + first_token, window, page_size), 0)
        steps = jnp.where(real, tile.div(context + end_token - key_start + block_kv - 1, block_kv), 0)
        return Item(real, row, kv_head, pair, start, end, length, context, first_token, end_token, key_start, steps)

    def place(unit, work: Item):
        """The head of a unit, its tokens, and the first of the ROWS that are read: all of them must exist."""
        start = work.start + ROWS * tile.div(unit, group)
        end = jnp.where(unit < units, jnp.minimum(start + ROWS, work.end), start)
        return work.kv_head * group + tile.rem(unit, group), start, end, jnp.minimum(start, tokens - ROWS)

    rounds = pl.cdiv(items, programs)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        rows = min(page_size, block_kv)  # of a copy
        absent = k_ref.shape[0]  # beyond the pool: the copy gives zeros

        def produce(i, carry):
            count, first = carry  # items and tiles so far
            work = item(i)
            buffer = tile.rem(count, buffers)

            @pl.when(work.real)
            def _():
                @pl.when(count >= buffers)
                def _():
                    plgpu.barrier_wait(q_released.at[buffer])

                for consumer in range(CONSUMERS):
                    head, _, _, base = place(CONSUMERS * work.pair + consumer, work)
                    for column in range(0, dim, columns):
                        part = q_ref.at[pl.ds(base, ROWS), head, pl.ds(column, columns)]
                        part = plgpu.load(part, layout=copied((ROWS, columns)), optimized=False)
                        q_smem[buffer, consumer, :, pl.ds(column, columns)] = part
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_loaded.at[buffer])

            @pl.loop(0, work.steps)
            def _(step):
                slot = tile.rem(first + step, stages)
                places = []
                for j in range(block_kv // rows):
                    at = work.key_start + step * block_kv + j * rows
                    inside = at < work.context + work.end_token
                    page = table_ref[work.row, jnp.where(inside, tile.div(at, page_size), 0)]
                    places.append((jnp.where(inside, page * kv_heads + work.kv_head, absent), tile.rem(at, page_size)))
                for pool, smem, loaded, released in (
                    (k_ref, k_smem, k_loaded, k_released),
                    (v_ref, v_smem, v_loaded, v_released),
                ):

                    @pl.when(first + step >= stages)
                    def _(released=released):
                        plgpu.barrier_wait(released.at[slot])

                    for j, (page, offset) in enumerate(places):
                        source = pool.at[page] if rows == page_size else pool.at[page, pl.ds(offset, rows)]
                        plgpu.copy_gmem_to_smem(source, smem.at[slot, pl.ds(j * rows, rows)], loaded.at[slot])

            return count + work.real, first + work.steps

        jax.lax.fori_loop(0, rounds, produce, (jnp.int32(0), jnp.int32(0)))

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        factor = tile.LOG2E if softcap else scale * tile.LOG2E

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def consume(i, carry):
            count, first = carry
            work = item(i)
            pl.when(work.real)(lambda: attend(work, tile.rem(count, buffers), first))
            return count + work.real, first + work.steps

        def attend(work: Item, buffer, first):
            head, unit_start, unit_end, base = place(CONSUMERS * work.pair + warpgroup, work)
            context, key_start, steps = work.context, work.key_start, work.steps
            key_end = context + work.end_token
            queries = q_smem.at[buffer, warpgroup]
            plgpu.barrier_wait(q_loaded.at[buffer])
            plgpu.barrier_wait(k_loaded.at[tile.rem(first, stages)])

            def body(step, carry, masked):
                out, top, total = carry
                slot = tile.rem(first + step, stages)

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
                    ahead = iota(1) - iota(0) + (key_start + step * block_kv - context - base)  # keys after the query's
                    seen = ahead <= 0
                    if window is not None:
                        seen &= ahead > -window
                    scores = jnp.where(seen, scores, tile.HIDDEN)
                new_top = jnp.maximum(top, scores.max(axis=1) * factor)
                decay = jnp.exp2(top - new_top)
                weight = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(new_top, scores.shape, [0]))
                out *= jax.lax.broadcast_in_dim(decay, out.shape, [0])
                total = total * decay + weight.sum(axis=1)
                weight = weight.astype(q_ref.dtype)
                # Before the other consumer's turn, not after it.
                out, total, new_top, weight = jax.lax.optimization_barrier((out, total, new_top, weight))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_loaded.at[slot])
                if masked:
                    _clear_beyond(v_smem.at[slot], key_end - key_start - step * block_kv, clear)
                plgpu.barrier_wait(turn)

                def wait_for_next_keys():
                    @pl.when(step + 1 < steps)
                    def _():
                        plgpu.barrier_wait(k_loaded.at[tile.rem(first + step + 1, stages)])

                def multiply_values(accumulator):
                    plgpu.wgmma(accumulator, weight, v_smem.at[slot])
                    wait_for_next_keys()

                if simulated:  # interpret mode knows no run_state, nor wgmma of registers
                    out += jnp.dot(weight, v_smem[slot], preferred_element_type=jnp.float32)
                    plgpu.commit_smem()
                    wait_for_next_keys()
                else:
                    out = pl.run_state(multiply_values)(plgpu.ACC.init(out))
                plgpu.barrier_arrive(v_released.at[slot])
                return out, new_top, total

            # What lies behind a row's last key in its page may be anything, NaN too. The second consumer gets its turn
            # to multiply after the first has had its own, so one of them clears it for both.
            clear = (warpgroup == 0) & (tile.div(key_end + page_size - 1, page_size) * page_size > work.length)
            by_row = plgpu.Layout.WGMMA.reduce(1)
            carry = (
                plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), tile.HIDDEN, jnp.float32), by_row),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
            )
            # Tiles from whole_start to whole_end are seen whole by all queries.
            whole_start, whole_end = 0, tile.div(context + work.first_token + 1 - key_start, block_kv)
            if window is not None:
                hidden = jnp.maximum(key_end - window - key_start, 0)  # keys that some query sees no more
                whole_start = jnp.minimum(tile.div(hidden + block_kv - 1, block_kv), steps)
                whole_end = jnp.maximum(whole_start, whole_end)
                carry = jax.lax.fori_loop(0, whole_start, partial(body, masked=True), carry)
            carry = jax.lax.fori_loop(whole_start, whole_end, partial(body, masked=False), carry)
            carry = jax.lax.fori_loop(whole_end, steps, partial(body, masked=True), carry)
            out, _, total = carry
            result = (out * jax.lax.broadcast_in_dim(1 / total, out.shape, [0])).astype(q_ref.dtype)

            @pl.when(unit_end - unit_start == ROWS)
            def _():
                queries[...] = result
                out_ref[pl.ds(base, ROWS), head] = plgpu.load(queries, layout=copied((ROWS, dim)))

            @pl.when((unit_start < unit_end) & (unit_end - unit_start < ROWS))
            def _():
                staged = rows_smem.at[warpgroup]
                for column in range(0, dim, columns):
                    staged[...] = result[:, column : column + columns]
                    plgpu.commit_smem()

                    @pl.loop(unit_start - base, unit_end - base)
                    def _(j, column=column):
                        target = out_ref.at[pl.ds(base + j, 1), head, pl.ds(column, columns)]
                        plgpu.copy_smem_to_gmem(staged.at[pl.ds(j, 1)], target)

                    plgpu.wait_smem_to_gmem(0)

            plgpu.barrier_arrive(q_released.at[buffer])

        pl.when(warpgroup == 1)(take_turns)
        jax.lax.fori_loop(0, rounds, consume, (jnp.int32(0), jnp.int32(0)))
        pl.when(warpgroup == 0)(take_turns)


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
