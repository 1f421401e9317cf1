"""Attention of a few new tokens per row to that row's pages.

One program holds all query tokens and heads that share a KV head, so that K and V are read once (grouped-query
attention), and one part of a row's keys (split-KV, "flash decoding"): few rows fill the GPU too, and a long row among
short ones does not run alone at the end. A second, short kernel puts the parts of a row together.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile
from pallas_kernels import triton_tile

MAX_QUERIES = 8
PROGRAMS = 528  # that an H200 runs at once, four on each multiprocessor; a few more would make a second, short wave
MIN_PART = 256  # keys in a part, below which its fixed cost shows
COMBINED = 2**13  # values of partial results that a program holds at a time


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_kv: int  # keys in a tile
    parts: int  # of all rows together that are aimed at; each row has one at least
    num_warps: int
    num_stages: int = 3  # odd: with an even number the page-table loads are not pipelined
    min_part: int = MIN_PART  # keys

    def __post_init__(self) -> None:
        tile.check_tuning(
            {"block_kv": self.block_kv, "num_warps": self.num_warps},
            {"parts": self.parts, "num_stages": self.num_stages, "min_part": self.min_part},
        )
        if self.block_kv < 16:
            raise ValueError(f"block_kv={self.block_kv} must be at least 16, the least the tensor cores take")

    @classmethod
    def from_shapes(cls, q, k_pages) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes)."""
        _, queries, heads, dim = q.shape
        kv_heads = k_pages.shape[1]
        # Beyond these sizes of the output tile registers spill; plain cores (float32) need more of them per product.
        tile_rows = _tile_rows(queries * heads // kv_heads)
        size, single = tile_rows * pl.next_power_of_2(dim), q.dtype == jnp.float32
        most = 128 if tile_rows == triton_tile.MIN_ROWS else 64
        block_kv = 16 if single and tile_rows > 32 else triton_tile.block_kv(dim, q.dtype, k_pages.dtype, most=most)
        num_warps = 4 if size <= (2**12 if single else 2**13) else 8 if size <= 2**14 or not single else 16
        # Twice the tiles on their way where they have half the bytes.
        num_stages = 5 if jnp.dtype(k_pages.dtype).itemsize == 1 else 3
        return cls(block_kv, max(1, PROGRAMS // kv_heads), num_warps, num_stages)


@partial(jax.jit, static_argnames=("scale", "window", "softcap", "tuning", "interpret"))
def paged_decode(
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
    tuning: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of the last Q tokens of each row to the row's first `lengths[r]` keys.

    q [R, Q, H, D], Q from 1 to 8: query j of row r stands at position lengths[r] - Q + j. Pools [pages, KH, page_size,
    D], H a multiple of KH; floats of 8 bits become q's dtype, float16 where that is bfloat16. page_table [R, W] int32;
    lengths [R] int32, at most W * page_size. A query sees the last `window` keys, its own included. Entries of the
    table outside a row's window and length are not used. sinks [H], floats: for each head a score that the softmax
    counts beside those of the keys, without a value; neither `scale` nor `softcap` changes it.
    Returns [R, Q, H, D] in q's dtype; zeros for a row of length 0. ValueError for shapes that do not fit.
    tuning: a TuningConfig of this file, the default, or of `paged_decode_mosaic`, which also names the kernel.
    """
    tile.check(q, k_pages, v_pages, window, softcap, sinks)
    rows, queries = q.shape[:2]
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"{queries=} per row must be 1 to {MAX_QUERIES}; use paged_extend for more")
    if page_table.shape[0] != rows or lengths.shape != (rows,):
        raise ValueError(f"{rows=} of q, but {page_table.shape=} {lengths.shape=}")
    tuning = tuning or TuningConfig.from_shapes(q, k_pages)
    if not isinstance(tuning, TuningConfig):
        from pallas_kernels import paged_decode_mosaic as mosaic  # costs half a second

        return mosaic.paged_decode_mosaic(
            q, k_pages, v_pages, page_table, lengths, sinks=sinks, scale=scale, window=window, softcap=softcap,
            tuning=tuning, interpret=interpret,
        )  # fmt: skip
    triton_tile.check_offsets(k_pages, v_pages)
    kv_heads, page_size = k_pages.shape[1:3]
    keys = page_table.shape[1] * page_size
    if window is not None:
        keys = min(keys, window + queries - 1 + page_size)
    cut = _cut(lengths, queries, keys, page_size, window, tuning)
    whole, parts = pl.BlockSpec(memory_space=pl.ANY), cut.row.shape[0]
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if parts > rows:
        out_shape += [jax.ShapeDtypeStruct((parts, *q.shape[1:]), jnp.float32),
                      jax.ShapeDtypeStruct((parts, *q.shape[1:3]), jnp.float32)]  # fmt: skip
    out, *partial_results = pl.pallas_call(
        partial(_kernel, block_kv=tuning.block_kv, scale=scale, window=window, softcap=softcap),
        out_shape=out_shape,
        grid=(parts, kv_heads),
        in_specs=[*[whole] * 8, None if sinks is None else whole],
        out_specs=[whole] * len(out_shape),
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="paged_decode",
    )(cut.row, cut.place, cut.parts, page_table, lengths, q, k_pages, v_pages, sinks)
    if not partial_results:
        return out
    return pl.pallas_call(
        partial(_combine_kernel, group=q.shape[2] // kv_heads),
        out_shape=out_shape[0],
        grid=(rows, kv_heads),
        in_specs=[whole] * 5,
        out_specs=whole,
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_decode_combine",
    )(cut.parts, cut.start, *partial_results, out)


class _Cut(NamedTuple):
    """How the keys of R rows are cut into P parts: those of rows with several come first, as they take the longest."""

    row: jax.Array  # int32 [P], -1: no part
    place: jax.Array  # int32 [P]: which of the row's parts
    parts: jax.Array  # int32 [R]: how many the row has
    start: jax.Array  # int32 [R]: its first


def _cut(lengths, queries: int, most_keys: int, page_size: int, window: int | None, tuning: TuningConfig) -> _Cut:
    """Parts of about the same number of blocks; `most_keys` is the most that a row can have."""
    rows = lengths.shape[0]
    index = jnp.arange(rows, dtype=jnp.int32)
    least = pl.cdiv(tuning.min_part, tuning.block_kv)
    if pl.cdiv(most_keys, tuning.block_kv) <= least:
        return _Cut(index, jnp.zeros_like(index), jnp.ones_like(index), index)
    blocks = _blocks(lengths, queries, page_size, window, tuning.block_kv)[1]
    # Where the rows fill the GPU only those that are longer than most are cut; else no more parts than run at once.
    divisor = max(tuning.parts - rows, 4 * rows // 5, 1)
    per_part = jnp.maximum(least, tile.div(blocks.sum(dtype=jnp.int32) + divisor - 1, divisor))
    parts = jnp.maximum(1, jax.lax.div(blocks + per_part - 1, jnp.broadcast_to(per_part, blocks.shape)))
    later = (parts == 1)[:, None] & (parts > 1) | ((parts > 1)[:, None] == (parts > 1)) & (index < index[:, None])
    start = jnp.sum(jnp.where(later, parts, 0), axis=1, dtype=jnp.int32)
    # At most divisor parts that are full, and one for each row.
    number = jnp.arange(divisor + rows, dtype=jnp.int32)[:, None]
    inside = (start <= number) & (number < start + parts)
    row = jnp.max(jnp.where(inside, index, -1), axis=1)
    return _Cut(row, jnp.sum(jnp.where(inside, number - start, 0), axis=1, dtype=jnp.int32), parts, start)


def _blocks(length, queries: int, page_size: int, window: int | None, block_kv: int):
    """The first key that a row of this length looks at, and how many blocks there are from it on."""
    base = tile.first_key(length - queries, window, page_size)
    return base, tile.div(length - base + block_kv - 1, block_kv)


@partial(jax.jit, static_argnames=("scale", "window", "softcap"))
def paged_decode_reference(
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
) -> jax.Array:
    """The same as `paged_decode` in plain jax.numpy, computed in float32."""
    rows, queries, heads, dim = q.shape
    kv_heads = k_pages.shape[1]
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    # [R, W, KH, page_size, D] -> [R, KH, keys, D]
    k, v = (
        tile.kept(pool)[page_table].view(pool.dtype).swapaxes(1, 2).reshape(rows, kv_heads, -1, dim).astype(jnp.float32)
        for pool in (k_pages, v_pages)
    )
    grouped = q.reshape(rows, queries, kv_heads, heads // kv_heads, dim).astype(jnp.float32)
    scores = einsum("rqhgd,rhkd->rhgqk", grouped, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    position = (lengths[:, None] - queries + jnp.arange(queries))[:, :, None]  # [R, Q, 1]
    key = jnp.arange(k.shape[2])
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    scores = jnp.where(seen[:, None, None], scores, tile.HIDDEN)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weight = jax.nn.softmax(scores, axis=-1)[..., : len(key)]
    weight = jnp.where(seen[:, None, None], weight, 0)
    v = jnp.where(seen.any(axis=1)[:, None, :, None], v, 0)  # unused slots may hold NaN
    return einsum("rhgqk,rhkd->rqhgd", weight, v).reshape(q.shape).astype(q.dtype)


def _tile_rows(rows: int) -> int:
    return max(triton_tile.MIN_ROWS, pl.next_power_of_2(rows))


def _kernel(
    part_row_ref,  # [P]
    part_place_ref,  # [P]
    row_parts_ref,  # [R]
    table_ref,  # [R, W]
    lengths_ref,  # [R]
    q_ref,  # [R, Q, H, D]
    k_ref,  # [pages, KH, page_size, D]
    v_ref,
    sinks_ref,  # [H], or None
    out_ref,  # [R, Q, H, D]: of rows of one part
    *partial_refs,  # of the others: [P, Q, H, D], and log2 of the weights' sums [P, Q, H]
    block_kv: int,
    scale: float,
    window: int | None,
    softcap: float | None,
):
    part, head = pl.program_id(0), pl.program_id(1)
    row = part_row_ref[part]

    @pl.when(row >= 0)
    def _():
        _, queries, heads, dim = q_ref.shape
        group, page_size = heads // k_ref.shape[1], k_ref.shape[2]

        # Row m of the tile is head m % group of query token m // group. Rows past the last query point out of bounds.
        m = jnp.arange(_tile_rows(queries * group))
        d = jnp.arange(pl.next_power_of_2(dim))
        query, q_head = tile.div(m, group), head * group + tile.rem(m, group)
        index = (query[:, None], q_head[:, None], d[None, :])
        real = query < queries
        mask = real[:, None] & (d < dim)[None, :]
        q = plt.load(q_ref.at[(row, *index)], mask=mask, other=0)
        if q.dtype == jnp.bfloat16 and k_ref.dtype.itemsize == 1:
            q = tile.in_float16(q)

        length, parts = lengths_ref[row], row_parts_ref[row]
        position = length - queries + query
        base, blocks = _blocks(length, queries, page_size, window, block_kv)
        per_part = jax.lax.div(blocks + parts - 1, parts)

        def body(block, carry):
            tokens = base + block * block_kv + jnp.arange(block_kv)
            inside = tokens < length
            seen = tokens[None, :] <= position[:, None]
            if window is not None:
                seen &= tokens[None, :] > position[:, None] - window
            k, v = triton_tile.load_tile(k_ref, v_ref, table_ref, row, head, tokens, inside)
            return triton_tile.attend(carry, q, k, v, seen, scale, softcap)

        begin = jnp.minimum(part_place_ref[part] * per_part, blocks)
        end = jnp.minimum(begin + per_part, blocks)
        sinks = None
        if sinks_ref is not None:  # they count once for a row, so in its first part
            sinks = jnp.where(part_place_ref[part] == 0, sinks_ref[q_head].astype(jnp.float32), tile.HIDDEN)
        carry = jax.lax.fori_loop(begin, end, body, triton_tile.start(m.size, d.size, sinks))
        out = triton_tile.finish(carry)
        alone = True if not partial_refs else parts == 1
        plt.store(out_ref.at[(row, *index)], out.astype(out_ref.dtype), mask=mask & alone)
        if partial_refs:
            _, top, total = carry
            log_total = jnp.where(total == 0.0, tile.HIDDEN, top + jnp.log2(jnp.where(total == 0.0, 1.0, total)))
            plt.store(partial_refs[0].at[(part, *index)], out, mask=mask & (parts > 1))
            plt.store(partial_refs[1].at[part, query, q_head], log_total, mask=real & (parts > 1))


def _combine_kernel(
    row_parts_ref,  # [R]
    row_start_ref,  # [R]
    partial_ref,  # [P, Q, H, D]
    log_total_ref,  # [P, Q, H]
    _out,  # aliased to the output
    out_ref,  # [R, Q, H, D]
    *,
    group: int,
):
    row, head = pl.program_id(0), pl.program_id(1)
    parts = row_parts_ref[row]

    @pl.when(parts > 1)
    def _():
        _, queries, _, dim = partial_ref.shape
        m, d = jnp.arange(pl.next_power_of_2(queries * group)), jnp.arange(pl.next_power_of_2(dim))
        query, q_head = tile.div(m, group), head * group + tile.rem(m, group)
        real, chunk = query < queries, max(1, COMBINED // (m.size * d.size))

        def body(i, carry):
            out, top, total = carry
            index = i * chunk + jnp.arange(chunk)
            mask = (index < parts)[:, None] & real[None, :]
            part = row_start_ref[row] + index
            at = (part[:, None], query[None, :], q_head[None, :])
            logs = plt.load(log_total_ref.at[at], mask=mask, other=tile.HIDDEN)
            at_values = (part[:, None, None], query[None, :, None], q_head[None, :, None], d[None, None, :])
            values = plt.load(partial_ref.at[at_values], mask=mask[:, :, None] & (d < dim)[None, None, :], other=0)
            new_top = jnp.maximum(top, logs.max(axis=0))
            weight, decay = jnp.exp2(logs - new_top[None, :]), jnp.exp2(top - new_top)
            out = out * decay[:, None] + (values * weight[:, :, None]).sum(axis=0)
            return out, new_top, total * decay + weight.sum(axis=0)

        chunks = tile.div(parts + chunk - 1, chunk)
        out = triton_tile.finish(jax.lax.fori_loop(0, chunks, body, triton_tile.start(m.size, d.size)))
        index = (row, query[:, None], q_head[:, None], d[None, :])
        plt.store(out_ref.at[index], out.astype(out_ref.dtype), mask=real[:, None] & (d < dim)[None, :])
