"""Attention of the new tokens of several rows, many per row (chunked prefill), to those rows' pages.

The host cuts each row's new tokens into blocks of `block_q` and lists them, so that every program knows its row without
a search. There are two kernels. This one, through Triton, takes everything: a program holds a tile of (query token,
head) pairs that share a KV head. `paged_extend_mosaic` is about twice as fast, on Hopper only, and takes what most
models have: bfloat16 or float16, pools of the same or of 8 bits, head_dim 64, 128 or 256, pages of a power of two.
`_choose` decides between them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile
from pallas_kernels import triton_tile
from pallas_kernels.paged_decode import paged_decode_reference


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    tile_rows: int  # (query token, head) pairs of a program
    block_kv: int  # keys in a tile
    num_warps: int
    num_stages: int = 3  # odd: with an even number the page-table loads are not pipelined

    def __post_init__(self) -> None:
        tile.check_tuning(
            {"tile_rows": self.tile_rows, "block_kv": self.block_kv, "num_warps": self.num_warps},
            {"num_stages": self.num_stages},
        )
        if min(self.tile_rows, self.block_kv) < 16:
            raise ValueError(f"{self} must have tile_rows and block_kv of at least 16, the least the tensor cores take")

    @classmethod
    def from_shapes(cls, q, k_pages, block_q: int) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes)."""
        heads, dim = q.shape[1:]
        rows = pl.next_power_of_2(block_q * heads // k_pages.shape[1])
        # The largest tiles that spill no registers; float32 products run on the plain cores and need more of them.
        wide, single = pl.next_power_of_2(dim) > 128, q.dtype == jnp.float32
        tile_rows = max(triton_tile.MIN_ROWS, min(rows, 32 if single else 64 if wide else 128))
        block_kv = 16 if single else 2 * triton_tile.block_kv(dim, q.dtype, k_pages.dtype)
        return cls(tile_rows, block_kv, num_warps=4 if tile_rows < (32 if single else 64 if wide else 128) else 8)


@partial(jax.jit, static_argnames=("block_q", "scale", "window", "softcap", "tuning", "interpret"))
def paged_extend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    block_row: jax.Array,
    block_start: jax.Array,
    q_start: jax.Array,
    q_len: jax.Array,
    lengths: jax.Array,
    out: jax.Array | None = None,
    *,
    block_q: int,
    sinks: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tuning: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of each row's last `q_len[r]` tokens to the row's first `lengths[r]` keys.

    q [T, H, D]; row r's tokens are q[q_start[r] : q_start[r] + q_len[r]], at positions lengths[r] - q_len[r] and on.
    Block b holds tokens block_start[b] to block_start[b] + block_q of q, as far as they are row block_row[b]'s;
    block_row -1 is an empty block. Pools [pages, KH, page_size, D], H a multiple of KH; page_table [R, W]; all index
    arrays int32. A query sees the last `window` keys, its own included. Entries of the table outside a row's window and
    length are not used. sinks [H]: see `paged_decode`.
    Returns [T, H, D] in q's dtype; tokens in no block have what `out` [T, H, D] holds, or zeros.
    Blocks are best listed from those that see many keys to those that see few: work is dealt out in this order.
    tuning: a TuningConfig of this file or of `paged_extend_mosaic`, which also names the kernel, whatever the card.
    ValueError for shapes that do not fit.
    """
    tile.check(q, k_pages, v_pages, window, softcap, sinks)
    rows, blocks = page_table.shape[0], block_row.shape[0]
    if not (q_start.shape == q_len.shape == lengths.shape == (rows,)) or block_start.shape != (blocks,):
        raise ValueError(f"{rows=} of page_table, but {q_start.shape=} {q_len.shape=} {lengths.shape=}; "
                         f"{blocks=}, but {block_start.shape=}")  # fmt: skip
    out = jnp.zeros_like(q) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"{out.shape=} {out.dtype=} must be as {q.shape=} {q.dtype=}")
    if block_q < 1:
        raise ValueError(f"{block_q=} must be at least 1")
    tuning = tuning or _choose(q, k_pages, v_pages, block_q, scale, interpret)
    if not isinstance(tuning, TuningConfig):
        from pallas_kernels import paged_extend_mosaic as mosaic  # costs half a second

        return mosaic.paged_extend_mosaic(
            q, k_pages, v_pages, page_table, block_row, block_start, q_start, q_len, lengths, out, block_q=block_q,
            sinks=sinks, scale=scale, window=window, softcap=softcap, tuning=tuning, interpret=interpret,
        )  # fmt: skip
    triton_tile.check_offsets(k_pages, v_pages)
    kv_heads = k_pages.shape[1]
    tiles = pl.cdiv(block_q * q.shape[1] // kv_heads, tuning.tile_rows)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    kernel = partial(_kernel, block_q=block_q, tile_rows=tuning.tile_rows, block_kv=tuning.block_kv, scale=scale,
                     window=window, softcap=softcap)  # fmt: skip
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(blocks, kv_heads, tiles),
        in_specs=[*[whole] * 10, None if sinks is None else whole],
        out_specs=whole,
        input_output_aliases={9: 0},  # what is there stays where no block writes
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name="paged_extend",
    )(block_row, block_start, q_start, q_len, lengths, page_table, q, k_pages, v_pages, out, sinks)


def _choose(q, k_pages, v_pages, block_q: int, scale: float, interpret: bool) -> Any:
    """The tuning, and so the kernel, for these arrays and this card; interpret mode is quicker with Triton's."""
    if not interpret and tile.on_mosaic_card():
        from pallas_kernels import paged_extend_mosaic as mosaic

        if mosaic.supports(q, k_pages, v_pages, scale):
            return mosaic.TuningConfig.from_shapes(q, k_pages)
    return TuningConfig.from_shapes(q, k_pages, block_q)


@partial(jax.jit, static_argnames=("block_q", "scale", "window", "softcap"))
def paged_extend_reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    block_row: jax.Array,
    block_start: jax.Array,
    q_start: jax.Array,
    q_len: jax.Array,
    lengths: jax.Array,
    out: jax.Array | None = None,
    *,
    block_q: int,
    sinks: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The same as `paged_extend` in plain jax.numpy: each token decodes as a row of its own."""
    token = jnp.arange(q.shape[0])[:, None]
    end = jnp.minimum(block_start + block_q, (q_start + q_len)[block_row])
    member = (block_row >= 0) & (token >= block_start) & (token < end)  # [T, NB]
    row = jnp.where(member.any(axis=1), block_row[member.argmax(axis=1)], -1)
    length = jnp.where(row < 0, 0, (lengths - q_len - q_start)[row] + token[:, 0] + 1)

    def one(args):
        q, table, length = args
        return paged_decode_reference(q[None, None], k_pages, v_pages, table[None], length[None], sinks=sinks,
                                      scale=scale, window=window, softcap=softcap)[0, 0]  # fmt: skip

    result = jax.lax.map(one, (q, page_table[row], length), batch_size=16)
    return result if out is None else jnp.where((row < 0)[:, None, None], out, result)


def _kernel(
    block_row_ref,  # [NB]
    block_start_ref,  # [NB]
    q_start_ref,  # [R]
    q_len_ref,  # [R]
    lengths_ref,  # [R]
    table_ref,  # [R, W]
    q_ref,  # [T, H, D]
    k_ref,  # [pages, KH, page_size, D]
    v_ref,
    _out,  # aliased to the output
    sinks_ref,  # [H], or None
    out_ref,  # [T, H, D]
    *,
    block_q: int,
    tile_rows: int,
    block_kv: int,
    scale: float,
    window: int | None,
    softcap: float | None,
):
    block, head, tile_index = (pl.program_id(axis) for axis in range(3))
    row = block_row_ref[block]

    @pl.when(row >= 0)
    def _():
        tokens, heads, dim = q_ref.shape
        group, page_size = heads // k_ref.shape[1], k_ref.shape[2]
        row_start, row_len, start = q_start_ref[row], q_len_ref[row], block_start_ref[block]
        context = lengths_ref[row] - row_len - row_start  # token t of q stands at position context + t
        end = jnp.minimum(start + block_q, row_start + row_len)

        # Row m of the block is head m % group of query token m // group; this program has tile_rows of them.
        m = tile_index * tile_rows + jnp.arange(tile_rows)
        d = jnp.arange(pl.next_power_of_2(dim))
        real = start + tile.div(m, group) < end
        # Out of bounds where there is no token: interpret mode writes masked rows back to where they point.
        token = jnp.where(real, start + tile.div(m, group), tokens)
        position = context + token
        first_token = start + tile.div(tile_index * tile_rows, group)
        end_token = jnp.minimum(start + tile.div((tile_index + 1) * tile_rows - 1, group) + 1, end)

        @pl.when(first_token < end_token)
        def _():
            q_head = head * group + tile.rem(m, group)
            index = (token[:, None], q_head[:, None], d[None, :])
            mask = real[:, None] & (d < dim)[None, :]
            q = plt.load(q_ref.at[index], mask=mask, other=0)
            base = tile.first_key(context + first_token, window, page_size)
            length = context + end_token

            def body(whole, i, carry):
                """whole: every query of the tile sees every key of this block."""
                keys = base + i * block_kv + jnp.arange(block_kv)
                inside = seen = None
                if not whole:
                    inside = keys < length
                    seen = keys[None, :] <= position[:, None]
                    if window is not None:
                        seen &= keys[None, :] > position[:, None] - window
                k, v = triton_tile.load_tile(k_ref, v_ref, table_ref, row, head, keys, inside)
                return triton_tile.attend(carry, q, k, v, seen, scale, softcap)

            blocks = tile.div(length - base + block_kv - 1, block_kv)
            sinks = None if sinks_ref is None else sinks_ref[q_head]
            carry = triton_tile.start(tile_rows, d.size, sinks)
            masked_from: int | jax.Array = 0
            if window is None:
                masked_from = tile.div(context + first_token + 1, block_kv)
                carry = jax.lax.fori_loop(0, masked_from, partial(body, True), carry)
            carry = jax.lax.fori_loop(masked_from, blocks, partial(body, False), carry)
            plt.store(out_ref.at[index], triton_tile.finish(carry).astype(out_ref.dtype), mask=mask)
