"""How decode by Mosaic deals out its work: all streams get as many units of keys, however unlike the rows are.

A unit is a page, or a tile where that is less. All units of all rows and KV heads stand in one line, head by head, and
each stream has the next so many. Plain jax.numpy: a step's layers share lengths, so XLA computes it once for them all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import paged_tile as tile


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
