"""Paged attention in plain XLA, the default on CPU: online softmax over blocks of pages, as many as the rows have.

Loops with a trip count that is only known at run time are cheap on CPU, so one program serves every length.
"""

import jax
import jax.numpy as jnp

from jaxengine.kv_cache import Pool
from jaxengine.layers.linear import precision

BLOCK_BYTES = 2**20  # of the keys that one step of the loop gathers: they stay in the processor's cache
BLOCK_TOKENS = 128  # of these, where they are all of one row
NOTHING = -1e30  # score of a key that is not seen
ITEM_TOKENS, ROW_ITEMS = 32, 4  # decode: tokens of an item, at least a page; items a step of the loop, for each row


def paged_decode(
    q, k_pages, v_pages, page_table, lengths, *, sinks=None, scale, window=None, softcap=None
) -> jax.Array:
    """See pallas_kernels.paged_decode: q [R, Q, H, D], page_table [R, W], lengths [R] -> [R, Q, H, D].

    All rows' pages are one list of items, of which each step of the loop takes some: no row waits for a longer.
    """
    rows, queries, heads, dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    k_pages, v_pages = Pool(k_pages), Pool(v_pages)
    q = q.reshape(rows, queries, kv_heads, -1, dim).swapaxes(1, 2).reshape(rows, kv_heads, -1, dim)
    positions = jnp.repeat(lengths[:, None] - queries + jnp.arange(queries), heads // kv_heads, axis=1)
    per_item = max(1, ITEM_TOKENS // page_size)
    size = per_item * page_size
    count = max(1, min(BLOCK_BYTES // (4 * kv_heads * size * dim), ROW_ITEMS * rows))
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % per_item))).reshape(rows, -1, per_item)
    first = jnp.zeros_like(lengths)  # item of each row
    if window is not None:
        first = jnp.maximum(lengths - queries + 1 - window, 0) // size
    items = (lengths + size - 1) // size - first
    ends = jnp.cumsum(items)

    def body(i, carry):
        out, top, total = carry
        item = i * count + jnp.arange(count)
        # Behind the last item come keys that the last row does not see.
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right", method="compare_all"), rows - 1)
        own = row == jnp.arange(rows)[:, None]  # [R, items]
        block = item - (ends - items)[row] + first[row]
        keys = block[:, None] * size + jnp.arange(size)
        pages = table.at[row, block].get(mode="clip")
        scores, v = _scores(q[row], k_pages, v_pages, pages, keys, positions[row], scale, window, softcap)
        new_top = jnp.maximum(top, jnp.where(own[..., None, None], scores.max(-1), NOTHING).max(1))
        # Of a query that has seen nothing yet the weights are 1: they decay to 0 with the first key that it sees.
        weight, decay = jnp.exp(scores - new_top[row][..., None]), jnp.exp(top - new_top)

        def add_up(x):  # [items, ...] -> [R, ...]
            y = _dot("ri,ix->rx", own.astype(jnp.float32), x.reshape(count, -1))
            return y.reshape(rows, *x.shape[1:])

        out = out * decay[..., None] + add_up(_dot("rhms,rhsd->rhmd", weight.astype(q.dtype), v))
        return out, new_top, total * decay + add_up(weight.sum(-1))

    out = _softmax(body, 0, (ends[-1] + count - 1) // count, q, sinks)
    return out.reshape(rows, kv_heads, queries, -1, dim).swapaxes(1, 2).reshape(rows, queries, heads, dim)


def paged_extend(
    q, k_pages, v_pages, page_table, block_row, block_start, q_start, q_len, lengths, out=None,
    *, block_q, sinks=None, scale, window=None, softcap=None,
) -> jax.Array:  # fmt: skip
    """See pallas_kernels.paged_extend: q [T, H, D] -> [T, H, D], `out` or zeros for tokens in no block."""
    tokens, heads, dim = q.shape
    k_pages, v_pages = Pool(k_pages), Pool(v_pages)
    kv_heads = k_pages.shape[1]
    group = heads // kv_heads
    padding = ((0, block_q), (0, 0), (0, 0))
    padded = jnp.pad(q, padding)

    def body(block, out):
        row, start = block_row[block], block_start[block]
        query = jax.lax.dynamic_slice_in_dim(padded, start, block_q).reshape(block_q, kv_heads, group, dim)
        query = query.swapaxes(0, 1).reshape(1, kv_heads, -1, dim)
        index = start + jnp.arange(block_q)
        inside = index < q_start[row] + q_len[row]
        position = jnp.where(inside, lengths[row] - q_len[row] + index - q_start[row], -1)
        first = 0 if window is None else jnp.maximum(lengths[row] - q_len[row] + start - q_start[row] + 1 - window, 0)
        result = _attend(query, k_pages, v_pages, page_table[row][None], jnp.repeat(position, group)[None],
                         first, jnp.max(position) + 1, scale, window, softcap, sinks)  # fmt: skip
        result = result.reshape(kv_heads, block_q, group, dim).swapaxes(0, 1).reshape(block_q, heads, dim)
        old = jax.lax.dynamic_slice_in_dim(out, start, block_q)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(inside[:, None, None], result, old), start, 0)

    blocks = jnp.sum(block_row >= 0)
    return jax.lax.fori_loop(0, blocks, body, jnp.zeros_like(padded) if out is None else jnp.pad(out, padding))[:tokens]


def _attend(q, k_pages, v_pages, table, positions, first, end, scale, window, softcap, sinks):
    """A row's q [1, KH, M, D] at positions [1, M] against keys first..end of its pages [1, W] -> [1, KH, M, D]."""
    kv_heads, page_size, dim = k_pages.shape[1:]
    # At least two blocks: with one, XLA changes the layout of the pool, which copies all of it.
    limits = BLOCK_BYTES // (4 * kv_heads * page_size * dim), BLOCK_TOKENS // page_size, table.shape[1] // 2
    per_block = max(1, min(limits))
    block = per_block * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block)))

    def body(i, carry):
        out, top, total = carry
        pages = jax.lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=1)
        keys = i * block + jnp.arange(block)[None]
        scores, v = _scores(q, k_pages, v_pages, pages, keys, positions, scale, window, softcap)
        new_top = jnp.maximum(top, scores.max(-1))
        weight, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)  # see paged_decode
        out = out * decay[..., None] + _dot("rhms,rhsd->rhmd", weight.astype(q.dtype), v)
        return out, new_top, total * decay + weight.sum(-1)

    return _softmax(body, first // block, (end + block - 1) // block, q, sinks)


def _softmax(body, start, stop, q, sinks):
    """Loops over sums of weighted values, the largest scores and sums of weights of q [R, KH, M, D] -> as q."""
    shape = q.shape[:3]
    top, total = jnp.full(shape, NOTHING), jnp.zeros(shape)
    if sinks is not None:  # [H]: a score of weight 1, without a value, before the first key
        sinks = sinks.astype(jnp.float32).reshape(shape[1], 1, -1)  # M is tokens x H / KH
        sinks = jnp.broadcast_to(sinks, (shape[1], shape[2] // sinks.shape[2], sinks.shape[2]))
        top, total = jnp.broadcast_to(sinks.reshape(shape[1:]), shape), jnp.ones(shape)
    carry = jnp.zeros(q.shape, jnp.float32), top, total
    out, top, total = jax.lax.fori_loop(start, stop, body, carry)
    return (out * jnp.where(top > NOTHING, 1 / total, 0)[..., None]).astype(q.dtype)  # 0 where no key was seen


def _scores(q, k_pages, v_pages, pages, keys, positions, scale, window, softcap):
    """q [R, KH, M, D] at positions [R, M] against the keys [R, S] of its pages [R, P] -> scores [R, KH, M, S], and the
    keys' values [R, KH, S, D].
    """
    # Keys of one head side by side are multiplied fastest.
    k, v = (
        pool.read(pages).swapaxes(1, 2)
        .reshape(*q.shape[:2], keys.shape[1], -1).astype(q.dtype)
        for pool in (k_pages, v_pages)
    )  # fmt: skip
    scores = _dot("rhmd,rhsd->rhms", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = keys[:, None, None] <= positions[:, None, :, None]
    if window is not None:
        seen &= keys[:, None, None] > positions[:, None, :, None] - window
    # Keys that no query of the row sees may be another request's, and NaN, which a weight of 0 does not stop.
    return jnp.where(seen, scores, NOTHING), jnp.where(seen.any(axis=(1, 2))[:, None, :, None], v, 0)


def _dot(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)
