"""Paged attention in plain XLA, the default on CPU: online softmax over blocks of pages, up to the longest row's.

Loops with a trip count that is only known at run time are cheap on CPU, so one program serves every length.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxengine.layers.linear import precision

BLOCK_BYTES = 2**20  # of the keys that one step of the loop gathers: they stay in the processor's cache
BLOCK_TOKENS = 128  # of each row, at most: a longer block is computed whole for a shorter row


def paged_decode(q, k_pages, v_pages, page_table, lengths, *, scale, window=None, softcap=None) -> jax.Array:
    """See pallas_kernels.paged_decode: q [R, Q, H, D], page_table [R, W], lengths [R] -> [R, Q, H, D]."""
    rows, queries, heads, dim = q.shape
    kv_heads = k_pages.shape[1]
    q = q.reshape(rows, queries, kv_heads, -1, dim).swapaxes(1, 2).reshape(rows, kv_heads, -1, dim)
    group = q.shape[2] // queries
    positions = lengths[:, None] - queries + jnp.arange(queries)
    positions = jnp.repeat(positions, group, axis=1)  # [R, queries * group]
    first: jax.Array | int = 0
    if window is not None:
        first = jnp.min(jnp.where(lengths > 0, jnp.maximum(lengths - queries + 1 - window, 0), 2**30))
    out = _attend(q, k_pages, v_pages, page_table, positions, first, jnp.max(lengths), scale, window, softcap)
    out = out.reshape(rows, kv_heads, queries, group, dim).swapaxes(1, 2).reshape(rows, queries, heads, dim)
    return jnp.where((lengths > 0)[:, None, None, None], out, 0)


def paged_extend(
    q, k_pages, v_pages, page_table, block_row, block_start, q_start, q_len, lengths, out=None,
    *, block_q, scale, window=None, softcap=None,
) -> jax.Array:  # fmt: skip
    """See pallas_kernels.paged_extend: q [T, H, D] -> [T, H, D], `out` or zeros for tokens in no block."""
    tokens, heads, dim = q.shape
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
                         first, jnp.max(position) + 1, scale, window, softcap)  # fmt: skip
        result = result.reshape(kv_heads, block_q, group, dim).swapaxes(0, 1).reshape(block_q, heads, dim)
        old = jax.lax.dynamic_slice_in_dim(out, start, block_q)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(inside[:, None, None], result, old), start, 0)

    blocks = jnp.sum(block_row >= 0)
    return jax.lax.fori_loop(0, blocks, body, jnp.zeros_like(padded) if out is None else jnp.pad(out, padding))[:tokens]


def _attend(q, k_pages, v_pages, table, positions, first, end, scale, window, softcap):
    """q [R, KH, M, D] at positions [R, M] against keys first..end of each row's pages -> [R, KH, M, D]."""
    page_size = k_pages.shape[2]
    page_bytes = k_pages.shape[1] * page_size * k_pages.shape[3] * 4  # of a page in float32
    # At least two blocks: with one, XLA changes the layout of the pool, which copies all of it.
    limits = BLOCK_BYTES // (len(q) * page_bytes), BLOCK_TOKENS // page_size, table.shape[1] // 2
    per_block = max(1, min(limits))
    block = per_block * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block)))
    dot = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    shape = q.shape[:3]

    def body(i, carry):
        out, top, total = carry
        pages = jax.lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=1)
        # The promise spares a comparison for every element. Keys of one head side by side are multiplied fastest.
        k, v = (
            pool.at[pages].get(mode="promise_in_bounds").swapaxes(1, 2).reshape(*shape[:2], block, -1).astype(q.dtype)
            for pool in (k_pages, v_pages)
        )
        scores = dot("rhmd,rhsd->rhms", q, k) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        key = (i * block + jnp.arange(block))[None, None, None]
        seen = key <= positions[:, None, :, None]
        if window is not None:
            seen &= key > positions[:, None, :, None] - window
        scores = jnp.where(seen, scores, -1e30)
        new_top = jnp.maximum(top, scores.max(-1))
        # Of a query that has seen nothing yet the weights are 1: they decay to 0 with the first key that it sees.
        weight, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        # Keys that no query of the row sees may be another request's, and NaN, which a weight of 0 does not stop.
        v = jnp.where(seen.any(axis=(1, 2))[:, None, :, None], v, 0)
        out = out * decay[..., None] + dot("rhms,rhsd->rhmd", weight.astype(q.dtype), v)
        return out, new_top, total * decay + weight.sum(-1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(shape, -1e30), jnp.zeros(shape)
    out, top, total = jax.lax.fori_loop(first // block, (end + block - 1) // block, body, start)
    return (out * jnp.where(top > -1e30, 1 / total, 0)[..., None]).astype(q.dtype)  # 0 where no key was seen
