"""`paged_extend` for Hopper in Pallas Mosaic GPU: pages come by TMA, products run as wgmma.

There is a program for each multiprocessor, of three warpgroups of 128 threads, and each goes through a list of items.
An item is two units: 64 query tokens of a head each, of the same block and KV head. The third warpgroup, the producer,
copies queries and then tile after tile of K and V to shared memory. The other two, the consumers, share these tiles and
have a unit each; while one is in its softmax, the other has the tensor cores (Shah et al. 2024, FlashAttention-3).
Floats of 8 bits are copied as they are, and the producer widens them to float16 where the consumers read them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_tile
from pallas_kernels import paged_tile as tile
from pallas_kernels.mosaic_parts import name_alike
from pallas_kernels.mosaic_tile import COPY_LAYOUT, ROWS, SWIZZLE

CONSUMERS = 2
# A multiprocessor has 512 registers for a thread of each warpgroup together; copying needs few.
REGISTERS, REGISTERS_FLOAT8 = (232, 40), (224, 56)  # of a consumer and of the producer


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_kv: int  # keys in a tile
    stages: int  # tiles of K and of V in shared memory
    q_buffers: int = 2  # items whose queries are in shared memory
    as_bytes: bool = False  # how the kernel gets pools of 8 bits: as XLA has them, or a view would be a copy

    def __post_init__(self) -> None:
        tile.check_tuning({"block_kv": self.block_kv}, {"stages": self.stages, "q_buffers": self.q_buffers})
        if self.block_kv < 64:
            raise ValueError(f"{self} must have a block_kv of at least 64")

    @classmethod
    def from_shapes(cls, q, k_pages) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes): what fits in shared memory."""
        dim, narrow = q.shape[2], k_pages.dtype in tile.FLOAT8
        if dim > 128:
            return cls(block_kv=64, stages=1 if narrow else 2, q_buffers=1)
        return cls(block_kv=128, stages=2, q_buffers=1 if narrow and dim == 128 else 2)


def supports(q, k_pages, v_pages, scale: float) -> bool:
    """Whether the kernel takes these arrays (or anything with their shapes and dtypes)."""
    return len(q) >= ROWS and mosaic_tile.supports(q, k_pages, v_pages, scale)


class Settings(NamedTuple):
    """What is known when the kernel is compiled, beside the shapes."""

    block_q: int
    kv_heads: int
    units: int  # of a block and KV head
    items: int
    programs: int
    scale: float
    window: int | None
    softcap: float | None
    float8: Any  # the dtype of pools of 8 bits, else None
    simulated: bool


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
    sinks: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tuning: TuningConfig,
    interpret: bool = False,
) -> jax.Array:
    """See `paged_extend`, which checks the arguments, for cards of compute capability 9.0.

    ValueError for what `supports` does not take. Interpret mode also checks for races, and is slow.
    """
    mosaic_tile.check_supported(supports(q, k_pages, v_pages, scale), q, k_pages, scale)
    (pages, kv_heads, page_size, dim), dtype = k_pages.shape, mosaic_tile.of_products(q, k_pages)
    float8 = k_pages.dtype if k_pages.dtype in tile.FLOAT8 else None
    k_pages, v_pages = (tile.kept(pool) if tuning.as_bytes else pool for pool in (k_pages, v_pages))
    units = pl.cdiv(block_q, ROWS) * (q.shape[1] // kv_heads)
    items = len(block_row) * kv_heads * pl.cdiv(units, CONSUMERS)
    programs = min(items, mosaic_tile.multiprocessors())
    settings = Settings(block_q, kv_heads, units, items, programs, scale, window, softcap, float8, interpret)
    swizzled = partial(mosaic_tile.swizzled, dtype=dtype)
    kv = swizzled((tuning.stages, tuning.block_kv, dim))
    copies = tuning.block_kv // min(page_size, tuning.block_kv)  # of a tile
    loaded = plgpu.Barrier(num_arrivals=copies if float8 is None else 1, num_barriers=tuning.stages)
    released = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tuning.stages)
    narrow_scratch: list[Any] = []
    if float8 is not None:
        narrow_scratch = [plgpu.SMEM((2, tuning.block_kv, dim), k_pages.dtype),
                          plgpu.Barrier(num_arrivals=copies, num_barriers=2)]  # fmt: skip
    out_ref = jax.new_ref(out)  # what is there stays where no block writes
    plgpu.kernel(
        partial(_kernel, settings),
        scratch_types=[
            swizzled((tuning.q_buffers, CONSUMERS, ROWS, dim)),
            kv,
            kv,
            plgpu.SMEM((CONSUMERS, ROWS, SWIZZLE // q.dtype.itemsize), q.dtype),
            plgpu.Barrier(num_barriers=tuning.q_buffers),
            loaded,
            loaded,
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tuning.q_buffers),
            released,
            released,
            plgpu.Barrier(num_arrivals=CONSUMERS),
            *narrow_scratch,
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_extend_mosaic",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(block_row, block_start, q_start, q_len, lengths, page_table, q,
      k_pages.reshape(pages * kv_heads, page_size, dim), v_pages.reshape(pages * kv_heads, page_size, dim),
      sinks, out_ref)  # fmt: skip
    return out_ref[...]


class Refs(NamedTuple):
    block_row: Any  # [NB]
    block_start: Any  # [NB]
    q_start: Any  # [R]
    q_len: Any  # [R]
    lengths: Any  # [R]
    table: Any  # [R, W]
    q: Any  # [T, H, D]
    k: Any  # [pages * KH, page_size, D]
    v: Any
    sinks: Any  # [H], or None
    out: Any  # [T, H, D]
    # Shared memory.
    q_smem: Any  # [buffers, CONSUMERS, ROWS, D]: the queries of an item, at last its output
    k_smem: Any  # [stages, block_kv, D]
    v_smem: Any
    rows_smem: Any  # [CONSUMERS, ROWS, 64]: output in plain order, of units that are not stored whole
    # Barriers, one a buffer or stage.
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    q_released: Any
    k_released: Any
    v_released: Any
    turn: Any  # one barrier: a consumer has issued its products, the other has its softmax behind it
    # Where K and V are floats of 8 bits.
    narrow_smem: Any = None  # [2, block_kv, D]: the next tile of each
    narrow_loaded: Any = None


class Item(NamedTuple):
    """Scalars."""

    real: jax.Array  # bool; an item that is not has no steps
    row: jax.Array
    kv_head: jax.Array
    pair: jax.Array  # of units
    start: jax.Array  # the block's tokens
    end: jax.Array
    length: jax.Array  # the row's keys
    context: jax.Array  # token t of q stands at position context + t
    first_token: jax.Array  # the tokens of the two units together
    end_token: jax.Array
    key_start: jax.Array  # the keys that any of them sees
    steps: jax.Array  # tiles of keys


class Unit(NamedTuple):
    """Scalars."""

    head: jax.Array
    start: jax.Array  # its tokens, none for the second unit where there is but one
    end: jax.Array
    base: jax.Array  # the first of the ROWS tokens that are read: all of them must exist


def _item(refs: Refs, settings: Settings, i: jax.Array) -> Item:
    """The program's i-th."""
    program, programs, pairs = jax.lax.axis_index("program"), settings.programs, pl.cdiv(settings.units, CONSUMERS)
    # Dealt out to the programs to and fro: where items come from long to short, all get about as much.
    number = i * programs + jnp.where(tile.rem(i, 2) == 0, program, programs - 1 - program)
    block = jnp.minimum(tile.div(number, settings.kv_heads * pairs), refs.block_row.shape[0] - 1)
    kv_head, pair = tile.rem(tile.div(number, pairs), settings.kv_heads), tile.rem(number, pairs)
    row = refs.block_row[block]
    real, row = (number < settings.items) & (row >= 0), jnp.maximum(row, 0)
    row_start, row_len, length = refs.q_start[row], refs.q_len[row], refs.lengths[row]
    start = refs.block_start[block]
    end = jnp.minimum(start + settings.block_q, row_start + row_len)
    context = length - row_len - row_start
    group = refs.q.shape[1] // settings.kv_heads
    first_token = start + ROWS * tile.div(CONSUMERS * pair, group)
    last_unit = jnp.minimum(CONSUMERS * pair + CONSUMERS, settings.units) - 1
    end_token = jnp.minimum(start + ROWS * (tile.div(last_unit, group) + 1), end)
    real &= first_token < end_token
    block_kv = refs.k_smem.shape[1]
    key_start = jnp.where(real, tile.first_key(context + first_token, settings.window, refs.k.shape[1]), 0)
    steps = jnp.where(real, tile.div(context + end_token - key_start + block_kv - 1, block_kv), 0)
    return Item(real, row, kv_head, pair, start, end, length, context, first_token, end_token, key_start, steps)


def _unit(refs: Refs, settings: Settings, item: Item, consumer: int | jax.Array) -> Unit:
    tokens, heads, _ = refs.q.shape
    group, unit = heads // settings.kv_heads, CONSUMERS * item.pair + consumer
    start = item.start + ROWS * tile.div(unit, group)
    end = jnp.where(unit < settings.units, jnp.minimum(start + ROWS, item.end), start)
    return Unit(item.kv_head * group + tile.rem(unit, group), start, end, jnp.minimum(start, tokens - ROWS))


def _kernel(settings: Settings, *refs) -> None:
    if not settings.simulated:
        name_alike(refs[0])
    warpgroup = jax.lax.axis_index("warpgroup")
    pl.when(warpgroup == CONSUMERS)(partial(_produce, Refs(*refs), settings))
    pl.when(warpgroup < CONSUMERS)(partial(_consume, Refs(*refs), settings, warpgroup))


def _for_each_item(refs: Refs, settings: Settings, function) -> None:
    """function(item, first, buffer, reused) for each item of the program that is real, in order.

    `first`: the number of its first tile among all of the program's; `buffer`: of its queries, `reused`: by this item.
    """
    buffers = refs.q_smem.shape[0]

    def body(i, carry):
        count, first = carry
        item = _item(refs, settings, i)
        pl.when(item.real)(lambda: function(item, first, tile.rem(count, buffers), count >= buffers))
        return count + item.real, first + item.steps

    jax.lax.fori_loop(0, pl.cdiv(settings.items, settings.programs), body, (jnp.int32(0), jnp.int32(0)))


def _registers(settings: Settings) -> tuple[int, int]:
    return REGISTERS if settings.float8 is None else REGISTERS_FLOAT8


def _produce(refs: Refs, settings: Settings) -> None:
    plgpu.set_max_registers(_registers(settings)[1], action="decrease")
    dim, columns, (stages, block_kv, _) = refs.q.shape[2], refs.rows_smem.shape[2], refs.k_smem.shape
    absent, page_size, _ = refs.k.shape  # a copy from beyond the pool gives zeros
    rows = min(page_size, block_kv)  # of a copy
    layout = COPY_LAYOUT((ROWS, columns), refs.q.dtype)

    def copy_queries(item: Item, buffer):
        for consumer in range(CONSUMERS):
            unit = _unit(refs, settings, item, consumer)
            for column in range(0, dim, columns):
                # Not by TMA, which takes tiles of 8 rows only from a multiple of 8 on.
                part = refs.q.at[pl.ds(unit.base, ROWS), unit.head, pl.ds(column, columns)]
                part = plgpu.load(part, layout=layout, optimized=False)
                part = part if part.dtype == refs.q_smem.dtype else tile.in_float16(part)
                refs.q_smem[buffer, consumer, :, pl.ds(column, columns)] = part
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.q_loaded.at[buffer])

    def find_tile(item: Item, step):
        """The page and the offset in it for each copy of the tile."""
        places = []
        for i in range(block_kv // rows):
            key = item.key_start + step * block_kv + i * rows
            inside = key < item.context + item.end_token
            page = refs.table[item.row, jnp.where(inside, tile.div(key, page_size), 0)]
            places.append((jnp.where(inside, page * settings.kv_heads + item.kv_head, absent),
                           tile.rem(key, page_size)))  # fmt: skip
        return places

    def copy_tile(pool, places, smem, loaded):
        for i, (page, offset) in enumerate(places):
            source = pool.at[page] if rows == page_size else pool.at[page, pl.ds(offset, rows)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(i * rows, rows)], loaded)

    def copy_item(item: Item, first, buffer, reused):
        narrow = settings.float8 is not None
        if narrow:
            places = find_tile(item, 0)
            for i, pool in enumerate((refs.k, refs.v)):
                copy_tile(pool, places, refs.narrow_smem.at[i], refs.narrow_loaded.at[i])
        pl.when(reused)(lambda: plgpu.barrier_wait(refs.q_released.at[buffer]))
        copy_queries(item, buffer)

        @pl.loop(0, item.steps)
        def _(step):
            slot = tile.rem(first + step, stages)
            places = find_tile(item, step + 1 if narrow else step)
            of_k = refs.k, refs.k_smem, refs.k_loaded, refs.k_released
            of_v = refs.v, refs.v_smem, refs.v_loaded, refs.v_released
            for i, (pool, smem, loaded, released) in enumerate((of_k, of_v)):
                pl.when(first + step >= stages)(partial(plgpu.barrier_wait, released.at[slot]))
                if not narrow:
                    copy_tile(pool, places, smem.at[slot], loaded.at[slot])
                    continue
                source, copied = refs.narrow_smem.at[i], refs.narrow_loaded.at[i]
                plgpu.barrier_wait(copied)
                mosaic_tile.widen(source, smem.at[slot], settings.float8)
                plgpu.barrier_arrive(loaded.at[slot])
                pl.when(step + 1 < item.steps)(partial(copy_tile, pool, places, source, copied))

    _for_each_item(refs, settings, copy_item)


def _consume(refs: Refs, settings: Settings, warpgroup: jax.Array) -> None:
    plgpu.set_max_registers(_registers(settings)[0], action="increase")

    def in_turn(function):
        """The second consumer goes through it a turn behind the first."""
        pl.when(warpgroup == 1)(partial(_take_turns, refs))
        function()
        pl.when(warpgroup == 0)(partial(_take_turns, refs))

    def attend(item: Item, first, buffer, _):
        unit, queries = _unit(refs, settings, item, warpgroup), refs.q_smem.at[buffer, warpgroup]
        plgpu.barrier_wait(refs.q_loaded.at[buffer])
        plgpu.barrier_wait(refs.k_loaded.at[tile.rem(first, refs.k_smem.shape[0])])
        out, total = _attend(refs, settings, item, unit, queries, first, warpgroup)
        result = (out * jax.lax.broadcast_in_dim(1 / total, out.shape, [0])).astype(refs.q.dtype)
        count = unit.end - unit.start
        pl.when(count == ROWS)(partial(_store_whole, refs, unit, queries, result))
        pl.when((count > 0) & (count < ROWS))(partial(_store_rows, refs, unit, refs.rows_smem.at[warpgroup], result))
        plgpu.barrier_arrive(refs.q_released.at[buffer])

    if refs.q_smem.shape[0] > 1:
        in_turn(partial(_for_each_item, refs, settings, attend))
    else:  # the first cannot begin an item before the second has ended the last: their queries share the buffer
        _for_each_item(refs, settings, lambda *item: in_turn(partial(attend, *item)))


def _take_turns(refs: Refs) -> None:
    plgpu.barrier_arrive(refs.turn)
    plgpu.barrier_wait(refs.turn)


def _attend(
    refs: Refs, settings: Settings, item: Item, unit: Unit, queries, first: jax.Array, warpgroup: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The unit's weighted values [ROWS, D] and total weights [ROWS]."""
    (stages, block_kv, dim), page_size, dtype = refs.k_smem.shape, refs.k.shape[1], refs.k_smem.dtype
    scale, window, softcap = settings.scale, settings.window, settings.softcap
    factor = mosaic_tile.in_powers_of_two(scale, softcap)
    context, key_start, steps = item.context, item.key_start, item.steps
    key_end = context + item.end_token
    # What lies behind a row's last key in its page may be anything, NaN too. The second consumer gets its turn to
    # multiply after the first has had its own, so the first clears it for both.
    clear = (warpgroup == 0) & (tile.div(key_end + page_size - 1, page_size) * page_size > item.length)

    def body(step, carry, masked):
        """masked: some query of the item does not see some key of this tile."""
        slot = tile.rem(first + step, stages)

        def multiply_keys(accumulator):
            plgpu.wgmma(accumulator, queries, refs.k_smem.at[slot].transpose((1, 0)))
            _take_turns(refs)
            return accumulator[...]

        scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, block_kv), jnp.float32))
        plgpu.barrier_arrive(refs.k_released.at[slot])
        scores = mosaic_tile.capped(scores, scale, softcap)
        if masked:
            iota = partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, block_kv), layout=plgpu.Layout.WGMMA)
            ahead = iota(1) - iota(0) + (key_start + step * block_kv - context - unit.base)  # of the query's own key
            seen = ahead <= 0
            if window is not None:
                seen &= ahead > -window
            scores = jnp.where(seen, scores, -jnp.inf)
        (out, top, total), weight = mosaic_tile.weigh(carry, scores, factor)
        # All of it before the turn, not between the products.
        out, total, top, weight = jax.lax.optimization_barrier((out, total, top, weight.astype(dtype)))
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.v_loaded.at[slot])
        values = refs.v_smem.at[slot]
        if masked:
            mosaic_tile.clear_beyond(values, key_end - key_start - step * block_kv, clear)
        plgpu.barrier_wait(refs.turn)

        def wait_for_next_keys():
            next_slot = tile.rem(first + step + 1, stages)
            pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(refs.k_loaded.at[next_slot]))

        out = mosaic_tile.add_values(out, weight, values, settings.simulated, wait_for_next_keys)
        plgpu.barrier_arrive(refs.v_released.at[slot])
        return out, top, total

    carry = mosaic_tile.start(dim, None if refs.sinks is None else refs.sinks[unit.head].astype(jnp.float32))
    whole_start: int | jax.Array = 0
    whole_end = tile.div(context + item.first_token + 1 - key_start, block_kv)
    if window is not None:
        hidden = jnp.maximum(key_end - window - key_start, 0)  # keys that some query sees no more
        whole_start = jnp.minimum(tile.div(hidden + block_kv - 1, block_kv), steps)
        whole_end = jnp.maximum(whole_start, whole_end)
        carry = jax.lax.fori_loop(0, whole_start, partial(body, masked=True), carry)
    carry = jax.lax.fori_loop(whole_start, whole_end, partial(body, masked=False), carry)
    out, _, total = jax.lax.fori_loop(whole_end, steps, partial(body, masked=True), carry)
    return out, total


def _store_whole(refs: Refs, unit: Unit, staged, result: jax.Array) -> None:
    """With pools of 8 bits by way of float16, which is coarser than bfloat16 below 6e-5 only."""
    staged[...] = result.astype(staged.dtype)
    loaded = plgpu.load(staged, layout=COPY_LAYOUT(result.shape, staged.dtype)).astype(result.dtype)
    refs.out[pl.ds(unit.base, ROWS), unit.head] = loaded


def _store_rows(refs: Refs, unit: Unit, staged, result: jax.Array) -> None:
    """The unit's own rows, one by one: the others are other rows' tokens."""
    columns = staged.shape[1]
    for column in range(0, result.shape[1], columns):
        staged[...] = result[:, column : column + columns]
        plgpu.commit_smem()

        @pl.loop(unit.start - unit.base, unit.end - unit.base)
        def _(i, column=column):
            target = refs.out.at[pl.ds(unit.base + i, 1), unit.head, pl.ds(column, columns)]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(i, 1)], target)

        plgpu.wait_smem_to_gmem(0)
