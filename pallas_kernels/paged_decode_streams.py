"""How decode by Mosaic deals out its work, and puts together what comes back in parts.

All streams get as many units of keys, however unlike the rows are. A unit is a page, or a tile where that is less. All
units of all rows and KV heads stand in one line, head by head, and each stream has the next so many. Plain jax.numpy: a
step's layers share lengths, so XLA deals once for them all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import paged_tile as tile
from pallas_kernels.mosaic_tile import ALIGN

PRECISION = jax.lax.Precision.HIGHEST


def units(
    length: jax.Array, queries: int, page_size: int, window: int | None, unit: int
) -> tuple[int | jax.Array, jax.Array]:
    """The first key that a row of this length looks at, and how many units there are from it on."""
    base = tile.first_key(length - queries, window, page_size)
    return base, tile.div(length - base + unit - 1, unit)


class Work(NamedTuple):
    """How the units of R rows are dealt out to S streams. Rows have a rank: those with keys come first."""

    order: jax.Array  # int32 [R]: the row of each rank
    streams: jax.Array  # int32 [S, 9]: the fields of Stream
    first_stream: jax.Array  # int32 [R, KH]: which has the item's first unit
    parts: jax.Array  # int32 [R, KH]: how many have any


class Stream(NamedTuple):
    """Scalars. Item i is head i // live and row order[i % live]."""

    item: jax.Array  # its first
    segments: jax.Array
    begin: jax.Array  # of its first item, the first unit
    end: jax.Array  # of its last item, the unit behind; more than there are: all
    row: jax.Array  # of its first item
    length: jax.Array
    next_row: jax.Array  # of its second item, if there is one
    next_length: jax.Array
    live: jax.Array  # rows that have keys


def deal(lengths: jax.Array, counts: jax.Array, kv_heads: int, streams: int, cut: bool) -> Work:
    """Rows of these lengths [R] have counts [R] units for each KV head. `cut`: between units, or only between items."""
    rows = lengths.shape[0]
    index, live = jnp.arange(rows, dtype=jnp.int32), counts > 0
    before = (live[:, None] < live) | ((live[:, None] == live) & (index < index[:, None]))  # [r, other]
    rank = before.sum(axis=1, dtype=jnp.int32)
    order = jnp.max(jnp.where(rank == index[:, None], index, 0), axis=1)
    count = live.sum(dtype=jnp.int32)
    cost = counts if cut else live.astype(jnp.int32)
    start = jnp.sum(jnp.where(before, cost, 0), axis=1, dtype=jnp.int32)  # among the units of a head
    a_head = cost.sum(dtype=jnp.int32)
    each, more = kv_heads * a_head // streams, kv_heads * a_head % streams
    number = jnp.arange(streams + 1, dtype=jnp.int32)
    bound = number * each + jnp.minimum(number, more)
    # Where each bound lies; the last one behind the last item.
    head, within = bound // jnp.maximum(a_head, 1), bound % jnp.maximum(a_head, 1)
    at = jnp.maximum(jnp.sum(live & (start <= within[:, None]), axis=1, dtype=jnp.int32) - 1, 0)
    first_unit, row = (jnp.sum(jnp.where((rank == at[:, None]) & live, x, 0), axis=1) for x in (start, index))
    item, begin = head * count + at, within - first_unit
    segments = item[1:] - item[:-1] + (begin[1:] > 0)
    row, next_row = row[:-1], order[jnp.where(at[:-1] + 1 == count, 0, at[:-1] + 1)]
    each_stream = Stream(item[:-1], segments, begin[:-1], jnp.where(begin[1:] > 0, begin[1:], 2**30), row,
                         lengths[row], next_row, lengths[next_row], jnp.broadcast_to(count, (streams,)))  # fmt: skip

    def stream_of(unit_number):
        long = more * (each + 1)
        return jnp.where(unit_number < long, unit_number // (each + 1),
                         more + (unit_number - long) // jnp.maximum(each, 1))  # fmt: skip

    first = start[:, None] + jnp.arange(kv_heads, dtype=jnp.int32) * a_head
    first_stream = stream_of(first)
    parts = jnp.where(live[:, None], stream_of(first + cost[:, None] - 1) - first_stream + 1, 1)
    return Work(order, jnp.stack(each_stream, axis=1), first_stream, parts)


def combine(work: Work, partial_out: jax.Array, log_total: jax.Array, out: jax.Array) -> jax.Array:
    """`out` [R * KH * N, D] with the N rows of each item (a row and KV head) that has several parts filled in.

    Stream s left partial_out [2 * S, N, D] and log2 of the weights' sums, log_total [2 * S, .], at 2 * s, or at
    2 * s + 1 where it has the item's first unit. Row 0 of an item stands in log_total as it does in a tile of ALIGN.
    """
    stream, number = Stream(*work.streams.T), jnp.arange(len(work.streams))
    (_, kv_heads), (slots, of_item, dim) = work.parts.shape, partial_out.shape
    head = stream.item // jnp.maximum(stream.live, 1)
    item, first = stream.row * kv_heads + head, work.first_stream[stream.row, head]
    goes_on = (stream.segments > 0) & (stream.begin > 0)  # its first item began in an earlier stream, `first`
    begins = jnp.roll(goes_on & (first == number - 1), -1)  # its last item goes on in the next
    used, owner, item = (
        jnp.stack(pair, axis=1).reshape(slots)
        for pair in ((goes_on, begins), (first, number), (item, jnp.roll(item, -1)))
    )
    place = (item * of_item % ALIGN)[:, None] + jnp.arange(of_item)
    logs = jnp.where(used[:, None], jnp.take_along_axis(log_total, place, axis=1), tile.HIDDEN)
    mine = used & (owner == number[:, None])  # [S, 2 * S]
    top = jnp.max(jnp.where(mine[:, :, None], logs, tile.HIDDEN), axis=1)
    weight = jnp.exp2(logs - top[owner])
    total = jnp.sum(jnp.where(mine[:, :, None], weight, 0), axis=1)
    values = jnp.where(used[:, None, None], partial_out * weight[:, :, None], 0).reshape(slots, -1)
    sums = jnp.dot(mine.astype(jnp.float32), values, precision=PRECISION).reshape(-1, of_item, dim)
    sums = (sums / jnp.where(total == 0, 1, total)[:, :, None]).astype(out.dtype)
    cut = (work.parts.ravel() > 1)[:, None, None]
    return jnp.where(cut, sums[work.first_stream.ravel()], out.reshape(-1, of_item, dim)).reshape(out.shape)
