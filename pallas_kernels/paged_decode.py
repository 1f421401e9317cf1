"""Attention of a few new tokens per row to that row's pages.

One program holds all query tokens and heads that share a KV head, so that K and V are read once (grouped-query
attention), and one part of the row's keys, so that few long rows fill the GPU too (split-KV, "flash decoding").
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile

MAX_QUERIES = 8
PROGRAMS = 528  # that an H200 runs at once, four on each multiprocessor; a few more would make a second, short wave
MIN_PART = 256  # keys in a part, below which its fixed cost shows


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_kv: int  # keys in a tile
    parts: int  # programs that share a row's keys
    num_warps: int
    num_stages: int = 3  # odd: with an even number the page-table loads are not pipelined

    def __post_init__(self) -> None:
        tile.check_tuning(
            {"block_kv": self.block_kv, "num_warps": self.num_warps},
            {"parts": self.parts, "num_stages": self.num_stages},
        )
        if self.block_kv < 16:
            raise ValueError(f"block_kv={self.block_kv} must be at least 16, the least the tensor cores take")

    @classmethod
    def from_shapes(cls, q, k_pages, page_table, window: int | None) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes)."""
        rows, queries, heads, dim = q.shape
        kv_heads, page_size = k_pages.shape[1:3]
        keys = page_table.shape[1] * page_size
        if window is not None:
            keys = min(keys, window + queries - 1)
        parts = max(1, min(PROGRAMS // max(1, rows * kv_heads), pl.cdiv(keys, MIN_PART)))
        # Beyond these sizes of the output tile registers spill; plain cores (float32) need more of them per product.
        tile_rows = _tile_rows(queries * heads // kv_heads)
        size, single = tile_rows * pl.next_power_of_2(dim), q.dtype == jnp.float32
        block_kv = 16 if single and tile_rows > 32 else tile.block_kv(dim, k_pages.dtype)
        num_warps = 4 if size <= (2**12 if single else 2**13) else 8 if size <= 2**14 or not single else 16
        return cls(block_kv, parts, num_warps)


@partial(jax.jit, static_argnames=("scale", "window", "softcap", "tuning", "interpret"))
def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tuning: TuningConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of the last Q tokens of each row to the row's first `lengths[r]` keys.

    q [R, Q, H, D], Q from 1 to 8: query j of row r stands at position lengths[r] - Q + j. Pools [pages, KH, page_size,
    D], H a multiple of KH. page_table [R, W] int32; lengths [R] int32, at most W * page_size. A query sees the last
    `window` keys, its own included. Entries of the table outside a row's window and length are not used.
    Returns [R, Q, H, D] in q's dtype; zeros for a row of length 0. ValueError for shapes that do not fit.
    """
    tile.check(q, k_pages, v_pages, window, softcap)
    rows, queries = q.shape[:2]
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"{queries=} per row must be 1 to {MAX_QUERIES}; use paged_extend for more")
    if page_table.shape[0] != rows or lengths.shape != (rows,):
        raise ValueError(f"{rows=} of q, but {page_table.shape=} {lengths.shape=}")
    tuning = tuning or TuningConfig.from_shapes(q, k_pages, page_table, window)
    parts = tuning.parts
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if parts > 1:
        out_shape = [jax.ShapeDtypeStruct((parts, *q.shape), jnp.float32),
                     jax.ShapeDtypeStruct((parts, *q.shape[:3]), jnp.float32)]  # fmt: skip
    whole = pl.BlockSpec(memory_space=pl.ANY)
    results = pl.pallas_call(
        partial(_kernel, block_kv=tuning.block_kv, parts=parts, scale=scale, window=window, softcap=softcap),
        out_shape=out_shape,
        grid=(rows, k_pages.shape[1], parts),
        in_specs=[whole] * 5,
        out_specs=[whole] * len(out_shape),
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(page_table, lengths, q, k_pages, v_pages)
    if parts == 1:
        return results[0]
    out, log_total = results
    weight = jnp.exp2(log_total - log_total.max(axis=0))[..., None]
    return ((out * weight).sum(axis=0) / weight.sum(axis=0)).astype(q.dtype)


@partial(jax.jit, static_argnames=("scale", "window", "softcap"))
def paged_decode_reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The same as `paged_decode` in plain jax.numpy, computed in float32."""
    rows, queries, heads, dim = q.shape
    kv_heads = k_pages.shape[1]
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    # [R, W, KH, page_size, D] -> [R, KH, keys, D]
    k, v = (pool[page_table].swapaxes(1, 2).reshape(rows, kv_heads, -1, dim).astype(jnp.float32)
            for pool in (k_pages, v_pages))  # fmt: skip
    grouped = q.reshape(rows, queries, kv_heads, heads // kv_heads, dim).astype(jnp.float32)
    scores = einsum("rqhgd,rhkd->rhgqk", grouped, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    position = (lengths[:, None] - queries + jnp.arange(queries))[:, :, None]  # [R, Q, 1]
    key = jnp.arange(k.shape[2])
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    weight = jax.nn.softmax(jnp.where(seen[:, None, None], scores, tile.HIDDEN), axis=-1)
    weight = jnp.where(seen[:, None, None], weight, 0)
    v = jnp.where(seen.any(axis=1)[:, None, :, None], v, 0)  # unused slots may hold NaN
    return einsum("rhgqk,rhkd->rqhgd", weight, v).reshape(q.shape).astype(q.dtype)


def _tile_rows(rows: int) -> int:
    return max(tile.MIN_ROWS, pl.next_power_of_2(rows))


def _kernel(
    table_ref,  # [R, W]
    lengths_ref,  # [R]
    q_ref,  # [R, Q, H, D]
    k_ref,  # [pages, KH, page_size, D]
    v_ref,
    *out_refs,  # [R, Q, H, D]; of several parts: [parts, R, Q, H, D] and log2 of the weights' sums [parts, R, Q, H]
    block_kv: int,
    parts: int,
    scale: float,
    window: int | None,
    softcap: float | None,
):
    row, head, part = (pl.program_id(axis) for axis in range(3))
    _, queries, heads, dim = q_ref.shape
    group, page_size = heads // k_ref.shape[1], k_ref.shape[2]

    # Row m of the tile is head m % group of query token m // group. Rows past the last query point out of bounds.
    m = jnp.arange(_tile_rows(queries * group))
    d = jnp.arange(pl.next_power_of_2(dim))
    query, q_head = tile.div(m, group), head * group + tile.rem(m, group)
    index = (row, query[:, None], q_head[:, None], d[None, :])
    mask = (query < queries)[:, None] & (d < dim)[None, :]
    q = plt.load(q_ref.at[index], mask=mask, other=0)

    length = lengths_ref[row]
    position = length - queries + query
    base = tile.first_key(length - queries, window, page_size)
    blocks = tile.div(length - base + block_kv - 1, block_kv)
    per_part = tile.div(blocks + parts - 1, parts)

    def body(block, carry):
        tokens = base + block * block_kv + jnp.arange(block_kv)
        inside = tokens < length
        seen = tokens[None, :] <= position[:, None]
        if window is not None:
            seen &= tokens[None, :] > position[:, None] - window
        k, v = tile.load_tile(k_ref, v_ref, table_ref, row, head, tokens, inside)
        return tile.attend(carry, q, k, v, seen, scale, softcap)

    begin = jnp.minimum(part * per_part, blocks)
    end = jnp.minimum(begin + per_part, blocks)
    carry = jax.lax.fori_loop(begin, end, body, tile.start(m.size, d.size))
    out = tile.finish(carry)
    if parts == 1:
        plt.store(out_refs[0].at[index], out.astype(out_refs[0].dtype), mask=mask)
        return
    _, top, total = carry
    log_total = jnp.where(total == 0.0, tile.HIDDEN, top + jnp.log2(jnp.where(total == 0.0, 1.0, total)))
    plt.store(out_refs[0].at[(part, *index)], out, mask=mask)
    plt.store(out_refs[1].at[part, row, query, q_head], log_total, mask=query < queries)
