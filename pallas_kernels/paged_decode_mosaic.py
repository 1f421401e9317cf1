"""`paged_decode` for Hopper in Pallas Mosaic GPU: pages come by TMA, products run as wgmma.

Not the default, as Triton's is quicker (the table of both: benchmarks/README.md), but free of Triton.

The keys of all rows and KV heads are dealt out evenly to streams (`paged_decode_streams`): a few in each program, a
program on each multiprocessor. So a stream reads as much as any other, however unlike the rows are. It is two
warpgroups: the producer copies tile after tile of K and V to shared memory, far ahead, and the consumer attends. What a
stream has of an item (a row and KV head) is a segment; where that is not all of the item, its result is partial, and
XLA puts the parts together afterwards (30 us). The consumer widens floats of 8 bits to float16, a tile of V
while it multiplies by K, the next of K while by V.
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
from pallas_kernels.mosaic_tile import ALIGN, ROWS, SWIZZLE
from pallas_kernels.paged_decode_streams import Stream, combine, deal, units

MIN_CUT = 256  # keys: where no row can have more, none is cut
IDS = 128  # entries of the page table in a copy
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 216, 40  # a multiprocessor has 512 for a thread of each warpgroup together


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_kv: int  # keys in a tile
    stages: int  # tiles of K and of V in shared memory, for each stream
    consumers: int  # streams of a program, one or two
    as_bytes: bool = False  # how the kernel gets pools of 8 bits: as XLA has them, or a view would be a copy

    def __post_init__(self) -> None:
        tile.check_tuning({"block_kv": self.block_kv}, {"stages": self.stages, "consumers": self.consumers})
        if self.block_kv < 64 or self.consumers > 2:
            raise ValueError(f"{self} must have a block_kv of at least 64 and one or two consumers")

    @classmethod
    def from_shapes(cls, q, k_pages) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes): what fits in shared memory."""
        dim = q.shape[3]
        return cls(64, 2, 1) if dim == 256 else cls(64, 2, 2) if dim == 128 else cls(64, 4, 2)


class Settings(NamedTuple):
    """What is known when the kernel is compiled, beside the shapes."""

    queries: int
    group: int
    kv_heads: int
    consumers: int
    streams: int
    cut: bool
    scale: float
    window: int | None
    softcap: float | None
    float8: Any  # the dtype of pools of 8 bits, else None
    simulated: bool


def _q_rows(of_item: int) -> int:
    """The rows, a multiple of ALIGN from one on, that hold any item's queries."""
    offset = ALIGN - min(ALIGN, of_item & -of_item)  # the largest
    return pl.cdiv(offset + of_item, ALIGN) * ALIGN


def supports(q, k_pages, v_pages, scale: float) -> bool:
    """Whether the kernel takes these arrays (or anything with their shapes and dtypes)."""
    fits = _q_rows(q.shape[1] * q.shape[2] // k_pages.shape[1]) <= ROWS
    return fits and mosaic_tile.supports(q, k_pages, v_pages, scale)


def paged_decode_mosaic(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    sinks: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tuning: TuningConfig,
    interpret: bool = False,
) -> jax.Array:
    """See `paged_decode`, which checks the arguments, for cards of compute capability 9.0.

    ValueError for what `supports` does not take. Interpret mode also checks for races, and is slow.
    """
    mosaic_tile.check_supported(supports(q, k_pages, v_pages, scale), q, k_pages, scale)
    (pages, kv_heads, page_size, dim), dtype, out_dtype = k_pages.shape, mosaic_tile.of_products(q, k_pages), q.dtype
    float8 = k_pages.dtype if k_pages.dtype in tile.FLOAT8 else None
    if tuning.as_bytes:
        k_pages, v_pages = tile.kept(k_pages), tile.kept(v_pages)
    q = q if dtype == q.dtype else tile.in_float16(q)
    rows, queries, heads, _ = q.shape
    group, consumers, stages = heads // kv_heads, tuning.consumers, tuning.stages
    of_item, programs = queries * group, mosaic_tile.multiprocessors()
    streams = programs * consumers
    keys = page_table.shape[1] * page_size
    if window is not None:
        keys = min(keys, window + queries - 1 + page_size)
    cut = keys > MIN_CUT
    settings = Settings(queries, group, kv_heads, consumers, streams, cut, scale, window, softcap, float8, interpret)
    unit = min(page_size, tuning.block_kv)
    page_table = jnp.pad(page_table, ((0, 0), (0, max(IDS - page_table.shape[1], -page_table.shape[1] % 4))))
    work = deal(lengths, units(lengths, queries, page_size, window, unit)[1], kv_heads, streams, cut)
    # An item's queries lie side by side.
    q = q.reshape(rows, queries, kv_heads, group, dim).swapaxes(1, 2).reshape(-1, dim)
    padding = -len(q) % ALIGN
    q = jnp.pad(q, ((0, padding), (0, 0))) if padding else q
    if sinks is not None:  # for each row of an item, and room for those of a tile around it
        sinks = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, 1, group), queries, axis=1)
        sinks = jnp.pad(sinks.ravel(), (ALIGN, ROWS))
    columns, swizzled = SWIZZLE // dtype.itemsize, partial(mosaic_tile.swizzled, dtype=dtype)
    kv = swizzled((consumers, stages, tuning.block_kv, dim))
    wide: Any = []
    if float8 is not None:
        kv, wide = plgpu.SMEM(kv.shape, k_pages.dtype), [swizzled((consumers, tuning.block_kv, dim))] * 2
    copies = tuning.block_kv // unit  # of a tile
    loaded = plgpu.Barrier(num_arrivals=copies, num_barriers=consumers * stages)
    released = plgpu.Barrier(num_barriers=consumers * stages)
    out_type = [jax.ShapeDtypeStruct(q.shape, out_dtype)]
    if cut:
        out_type += [jax.ShapeDtypeStruct((2 * streams, of_item, dim), jnp.float32),
                     jax.ShapeDtypeStruct((2 * streams, ROWS), jnp.float32)]  # fmt: skip
    padded, *partial_results = plgpu.kernel(
        partial(_kernel, settings),
        out_type=out_type,
        scratch_types=[
            swizzled((consumers, 2, ROWS, dim)),
            plgpu.RefUnion(
                plgpu.SMEM((consumers, ROWS, columns), out_dtype),
                plgpu.SMEM((consumers, ROWS, columns // 2), jnp.float32),
            ),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
            plgpu.SMEM((consumers, 2, IDS), jnp.int32),
            kv,
            kv,
            plgpu.Barrier(num_barriers=2 * consumers),
            plgpu.Barrier(num_barriers=2 * consumers),
            loaded,
            loaded,
            released,
            released,
            *wide,
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=2 * consumers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="paged_decode_mosaic",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(work.streams, work.order, lengths, page_table, q,
      k_pages.reshape(pages * kv_heads, page_size, dim), v_pages.reshape(pages * kv_heads, page_size, dim),
      sinks)  # fmt: skip
    out = padded[: len(padded) - padding]
    if cut:
        partial_out, log_total = partial_results
        out = combine(work, partial_out, log_total, out)
    return out.reshape(rows, kv_heads, queries, group, dim).swapaxes(1, 2).reshape(rows, queries, heads, dim)


class Refs(NamedTuple):
    streams: Any  # [S, 9]
    order: Any  # [R]
    lengths: Any  # [R]
    table: Any  # [R, W]
    q: Any  # [items * of_item, D]
    k: Any  # [pages * KH, page_size, D]
    v: Any
    sinks: Any  # [ALIGN + KH * of_item + ROWS], or None
    out: Any  # as q
    partial: Any  # [2 * S, of_item, D]
    log_total: Any  # [2 * S, ROWS]
    # Shared memory, for each consumer.
    q_smem: Any  # [2, ROWS, D]
    out_smem: Any  # [ROWS, 64]
    partial_smem: Any  # [ROWS, 32], in the same place
    log_smem: Any  # [ROWS]
    ids_smem: Any  # [2, IDS]
    k_smem: Any  # [stages, block_kv, D]
    v_smem: Any
    # Barriers.
    q_loaded: Any
    ids_loaded: Any
    k_loaded: Any
    v_loaded: Any
    k_released: Any
    v_released: Any
    # In shared memory, where K and V are floats of 8 bits: what the tensor cores read, for each consumer.
    k_wide: Any = None  # [block_kv, D]
    v_wide: Any = None


class Segment(NamedTuple):
    """Scalars."""

    row: jax.Array
    kv_head: jax.Array
    length: jax.Array
    key_start: jax.Array
    key_end: jax.Array
    steps: jax.Array
    begins: jax.Array  # bool: it has the item's first unit
    slot: jax.Array  # of partial results, -1: it is all of the item


def _kernel(settings: Settings, *args) -> None:
    if not settings.simulated:
        name_alike(args[0])
    ins, scratch = (args[:11], args[11:]) if settings.cut else ((*args[:9], None, None), args[9:])
    refs = Refs(*(*ins, scratch[0], *scratch[1], *scratch[2:]))
    warpgroup, consumers = jax.lax.axis_index("warpgroup"), settings.consumers
    pl.when(warpgroup < consumers)(partial(_consume, refs, settings, warpgroup))
    pl.when(warpgroup >= consumers)(partial(_produce, refs, settings, warpgroup - consumers))


def _for_each_segment(refs: Refs, settings: Settings, worker: jax.Array, function) -> None:
    """state = function(segment, first, following, state) for each in turn, at the very first function(None, 0, ..., 0).

    `first`: the number of the segment's first tile among all of the stream's; `following`: whether there is another
    segment, its row, KV head and first key. A row and its length are read two segments ahead.
    """
    number = jax.lax.axis_index("program") * settings.consumers + worker
    stream = Stream(*(refs.streams[number, i] for i in range(len(Stream._fields))))
    page_size, block_kv = refs.k.shape[1], refs.k_smem.shape[2]
    unit = min(page_size, block_kv)

    def after(rank):
        return jnp.where(rank + 1 == stream.live, 0, rank + 1)

    def body(i, carry):
        first, kv_head, rank, row, length, next_row, next_length, state = carry
        next_rank = after(rank)
        later_row = refs.order[after(next_rank)]
        later_length = refs.lengths[later_row]
        base, count = units(length, settings.queries, page_size, settings.window, unit)
        begin = jnp.where(i == 0, stream.begin, 0)
        end = jnp.minimum(jnp.where(i == stream.segments - 1, stream.end, count), count)
        begins = begin == 0
        slot = jnp.where(begins & (end == count), -1, 2 * number + jnp.where(begins, 1, 0))
        steps = tile.div((end - begin) * unit + block_kv - 1, block_kv)
        key_end = jnp.minimum(length, base + end * unit)
        segment = Segment(row, kv_head, length, base + begin * unit, key_end, steps, begins, slot)
        next_start = units(next_length, settings.queries, page_size, settings.window, unit)[0]
        kv_head += (next_rank == 0).astype(jnp.int32)
        state = function(segment, first, (i + 1 < stream.segments, next_row, kv_head, next_start), state)
        return first + steps, kv_head, next_rank, next_row, next_length, later_row, later_length, state

    live = jnp.maximum(stream.live, 1)
    kv_head, rank = jax.lax.div(stream.item, live), jax.lax.rem(stream.item, live)
    start = units(stream.length, settings.queries, page_size, settings.window, unit)[0] + stream.begin * unit
    begin = (stream.segments > 0, stream.row, kv_head, start)
    carry = (jnp.int32(0), kv_head, rank, stream.row, stream.length, stream.next_row, stream.next_length)
    jax.lax.fori_loop(0, stream.segments, body, (*carry, function(None, 0, begin, jnp.int32(0))))


def _produce(refs: Refs, settings: Settings, worker: jax.Array) -> None:
    if settings.consumers > 1:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    _, stages, block_kv, _ = refs.k_smem.shape
    absent, page_size, _ = refs.k.shape  # a copy from beyond the pool gives zeros
    rows = min(page_size, block_kv)  # of a copy
    reach = IDS // 2 * page_size // block_kv  # tiles whose pages a chunk of the table has, wherever they begin

    def first_id(key):
        """Of a chunk of the table that begins with this key's page: plain copies begin at multiples of 16 bytes."""
        return tile.div(key, 4 * page_size) * 4

    def fetch(chunk, when, row, key):
        """Has the table's entries from this key's on copied, as chunk number `chunk`."""
        buffer = tile.rem(chunk, 2)
        part = refs.table.at[row, pl.ds(first_id(key), IDS)]
        plgpu.commit_smem()  # what was there has been read

        @pl.when(when)
        def _():
            plgpu.copy_gmem_to_smem(part, refs.ids_smem.at[worker, buffer], refs.ids_loaded.at[2 * worker + buffer])

    def copy_segment(segment: Segment | None, first, following, chunk):
        if segment is None:
            when, row, _head, key = following
            fetch(chunk, when, row, key)
            return chunk

        def copy_chunk(i, chunk):
            begin, end = i * reach, jnp.minimum((i + 1) * reach, segment.steps)
            buffer, more = tile.rem(chunk, 2), end < segment.steps
            chunk_key = segment.key_start + begin * block_kv
            when, next_row, _head, next_key = following
            fetch(chunk + 1, more | when, jnp.where(more, segment.row, next_row),
                  jnp.where(more, chunk_key + reach * block_kv, next_key))  # fmt: skip
            plgpu.barrier_wait(refs.ids_loaded.at[2 * worker + buffer])

            @pl.loop(begin, end)
            def _(step):
                place = tile.rem(first + step, stages)
                slot = worker * stages + place
                key = segment.key_start + step * block_kv
                pages = []
                for i in range(block_kv // rows):
                    inside = key + i * rows < segment.key_end
                    number = tile.div(key, page_size) - first_id(chunk_key) + i
                    page = refs.ids_smem[worker, buffer, number]
                    pages.append(jnp.where(inside, page * settings.kv_heads + segment.kv_head, absent))
                for pool, smem, loaded, released in (
                    (refs.k, refs.k_smem, refs.k_loaded, refs.k_released),
                    (refs.v, refs.v_smem, refs.v_loaded, refs.v_released),
                ):
                    pl.when(first + step >= stages)(partial(plgpu.barrier_wait, released.at[slot]))
                    for i, page in enumerate(pages):
                        source = pool.at[page]
                        if rows < page_size:
                            source = pool.at[page, pl.ds(tile.rem(key, page_size), rows)]
                        plgpu.copy_gmem_to_smem(source, smem.at[worker, place, pl.ds(i * rows, rows)], loaded.at[slot])

            return chunk + 1

        return jax.lax.fori_loop(0, tile.div(segment.steps + reach - 1, reach), copy_chunk, chunk)

    _for_each_segment(refs, settings, worker, copy_segment)


def _consume(refs: Refs, settings: Settings, worker: jax.Array) -> None:
    if settings.consumers > 1:
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    of_item = settings.queries * settings.group
    dim, q_rows = refs.q.shape[1], _q_rows(of_item)

    def fetch(count, when, row, kv_head, _key):
        """Has the queries of segment number `count` copied."""
        buffer = tile.rem(count, 2)
        source = refs.q.at[pl.ds(tile.div((row * settings.kv_heads + kv_head) * of_item, ALIGN) * ALIGN, q_rows)]

        @pl.when(when)
        def _():
            target = refs.q_smem.at[worker, buffer, pl.ds(0, q_rows)]
            plgpu.copy_gmem_to_smem(source, target, refs.q_loaded.at[2 * worker + buffer])

    def attend(segment: Segment | None, first, following, count):
        if segment is None:
            fetch(count, *following)
            return count
        fetch(count + 1, *following)
        buffer = tile.rem(count, 2)
        start = (segment.row * settings.kv_heads + segment.kv_head) * of_item
        offset = tile.rem(start, ALIGN)
        plgpu.barrier_wait(refs.q_loaded.at[2 * worker + buffer])
        out, top, total = _attend(refs, settings, segment, worker, refs.q_smem.at[worker, buffer], offset, first)
        safe = jnp.where(total == 0, 1.0, total)
        out = out * jax.lax.broadcast_in_dim(1 / safe, out.shape, [0])
        plgpu.commit_smem()  # every warp is done with the queries
        mine = pl.ds(offset, of_item)

        def store(values, staged, target):
            columns = staged.shape[1]
            for column in range(0, dim, columns):
                staged[...] = values[:, column : column + columns]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged.at[mine], target.at[:, pl.ds(column, columns)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store_whole():
            store(out.astype(refs.out.dtype), refs.out_smem.at[worker], refs.out.at[pl.ds(start, of_item)])

        def store_partial():
            logs = refs.log_smem.at[worker]
            logs[...] = jnp.where(total == 0, tile.HIDDEN, top + jnp.log2(safe))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(logs, refs.log_total.at[segment.slot])
            store(out, refs.partial_smem.at[worker], refs.partial.at[segment.slot])

        if settings.cut:
            pl.when(segment.slot < 0)(store_whole)
            pl.when(segment.slot >= 0)(store_partial)
        else:
            store_whole()
        return count + 1

    _for_each_segment(refs, settings, worker, attend)
    _store_zeros(refs, settings, worker)


def _store_zeros(refs: Refs, settings: Settings, worker: jax.Array) -> None:
    """The stream's share of the output of rows without keys."""
    number = jax.lax.axis_index("program") * settings.consumers + worker
    live, of_item = refs.streams[number, Stream._fields.index("live")], settings.queries * settings.group
    empty = (refs.order.shape[0] - live) * settings.kv_heads
    mine = tile.div(jnp.maximum(empty - number + settings.streams - 1, 0), settings.streams)

    @pl.when(mine > 0)
    def _():
        staged = refs.out_smem.at[worker]
        plgpu.commit_smem()
        staged[...] = plgpu.layout_cast(jnp.zeros(staged.shape, staged.dtype), plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        @pl.loop(0, mine)
        def _(i):
            item = number + i * settings.streams
            row = refs.order[live + tile.div(item, settings.kv_heads)]
            start = (row * settings.kv_heads + tile.rem(item, settings.kv_heads)) * of_item
            for column in range(0, refs.out.shape[1], staged.shape[1]):
                target = refs.out.at[pl.ds(start, of_item), pl.ds(column, staged.shape[1])]
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, of_item)], target)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend(
    refs: Refs, settings: Settings, segment: Segment, worker: jax.Array, queries, offset: jax.Array, first: jax.Array
) -> mosaic_tile.Carry:
    """What the segment's keys give, not divided by the total weights."""
    _, stages, block_kv, dim = refs.k_smem.shape
    scale, window, softcap = settings.scale, settings.window, settings.softcap
    factor = mosaic_tile.in_powers_of_two(scale, softcap)
    iota = partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, block_kv), layout=plgpu.Layout.WGMMA)
    narrow = settings.float8 is not None

    def widen(narrow, wide, loaded, released, step):
        """Has the tile ready for the tensor cores, and the place of its bytes free for the next."""
        slot = tile.rem(first + step, stages)
        barrier = worker * stages + slot
        plgpu.barrier_wait(loaded.at[barrier])
        mosaic_tile.widen(narrow.at[worker, slot], wide.at[worker], settings.float8)
        plgpu.barrier_arrive(released.at[barrier])

    widen_keys = partial(widen, refs.k_smem, refs.k_wide, refs.k_loaded, refs.k_released)
    widen_values = partial(widen, refs.v_smem, refs.v_wide, refs.v_loaded, refs.v_released)

    def body(step, carry):
        slot = tile.rem(first + step, stages)
        barrier = worker * stages + slot
        key = segment.key_start + step * block_kv
        keys = refs.k_wide.at[worker] if narrow else refs.k_smem.at[worker, slot]
        values = refs.v_wide.at[worker] if narrow else refs.v_smem.at[worker, slot]

        def multiply_keys(accumulator):
            plgpu.wgmma(accumulator, queries, keys.transpose((1, 0)))
            if narrow:
                widen_values(step)
            return accumulator[...]

        def widen_next_keys():
            if narrow:
                pl.when(step + 1 < segment.steps)(partial(widen_keys, step + 1))

        if not narrow:
            plgpu.barrier_wait(refs.k_loaded.at[barrier])
        scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, block_kv), jnp.float32))
        if not narrow:
            plgpu.barrier_arrive(refs.k_released.at[barrier])
        scores = mosaic_tile.capped(scores, scale, softcap)
        seen = iota(1) < segment.key_end - key
        if settings.queries > 1 or window is not None:
            query = tile.div(jnp.maximum(iota(0) - offset, 0), settings.group) if settings.queries > 1 else 0
            ahead = iota(1) - query + (key - segment.length + settings.queries)  # of the query's own key
            seen &= ahead <= 0
            if window is not None:
                seen &= ahead > -window
        (out, top, total), weight = mosaic_tile.weigh(carry, jnp.where(seen, scores, -jnp.inf), factor)
        weight = weight.astype(queries.dtype)
        if not narrow:
            plgpu.barrier_wait(refs.v_loaded.at[barrier])
        mosaic_tile.clear_beyond(values, segment.length - key, True)
        out = mosaic_tile.add_values(out, weight, values, settings.simulated, widen_next_keys)
        if not narrow:
            plgpu.barrier_arrive(refs.v_released.at[barrier])
        return out, top, total

    sinks = None
    if refs.sinks is not None:  # they count once for an item
        place = ALIGN + segment.kv_head * (settings.queries * settings.group) - offset
        sinks = plgpu.load(refs.sinks.at[pl.ds(place, ROWS)], layout=mosaic_tile.BY_ROW, optimized=False)
        sinks += jnp.where(segment.begins, 0, tile.HIDDEN)
    if narrow:
        widen_keys(0)
    return jax.lax.fori_loop(0, segment.steps, body, mosaic_tile.start(dim, sinks))
