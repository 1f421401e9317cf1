"""Paged attention behind one function, whatever implementation runs it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxengine.kv_cache import LayerCache, write_pages
from jaxengine.layers import xla_attention

Implementation = Literal["reference", "xla", "triton"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "page", "offset", "tables", "lengths", "q_start", "q_len", "block_row", "block_start"],
    meta_fields=["layer_group", "implementation", "block_q"],
)
@dataclass(frozen=True)
class AttentionInputs:
    """Where the tokens of a step stand, and where their keys and values lie. Built once, used by every layer.

    Tokens come in rows of consecutive positions; rows of one token come first, so row i is token i there. A step of
    such rows only has no blocks (None).
    """

    positions: jax.Array  # int32 [tokens]
    page: tuple[jax.Array, ...]  # per cache group, int32 [tokens]: where K and V are written; 0 = nowhere
    offset: jax.Array  # int32 [tokens]
    tables: tuple[jax.Array, ...]  # per cache group, int32 [rows, columns]
    lengths: jax.Array  # int32 [rows], this step's tokens included
    q_start: jax.Array | None  # int32 [rows]
    q_len: jax.Array | None  # int32 [rows]
    block_row: jax.Array | None  # int32 [blocks]: the row of each block of query tokens, -1 = no block
    block_start: jax.Array | None  # int32 [blocks]: its first token
    layer_group: tuple[int, ...]  # static: the cache group of each layer
    implementation: Implementation  # static
    block_q: int  # static: tokens in a block

    def for_layer(self, i: int) -> "LayerInputs":
        group = self.layer_group[i]
        return LayerInputs(replace(self, page=(), tables=(), layer_group=()), self.page[group], self.tables[group])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "page", "table"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LayerInputs:
    """AttentionInputs as one layer sees them."""

    step: AttentionInputs  # without the groups' arrays
    page: jax.Array  # int32 [tokens]
    table: jax.Array  # int32 [rows, columns]


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inputs: LayerInputs,
    cache: LayerCache,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Writes k, v to the layer's pages, then attends causally to all of each row.

    q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim]. Returns [tokens, heads, head_dim] and the new cache.
    """
    step, table = inputs.step, inputs.table
    options = {"scale": scale, "window": window, "softcap": softcap}
    write, decode, extend = _functions(step.implementation)
    cache = LayerCache(*write(*cache, k, v, inputs.page, step.offset))
    rows = len(step.lengths)
    if step.block_row is None:
        return decode(q[:, None], *cache, table, step.lengths, **options)[:, 0], cache
    single = jnp.where(step.q_len == 1, step.lengths, 0)
    out = extend(q, *cache, table, step.block_row, step.block_start, step.q_start, step.q_len, step.lengths,
                 block_q=step.block_q, **options)  # fmt: skip
    # Each token is in a single row or in a block, and zero in the other result.
    return out.at[:rows].add(decode(q[:rows, None], *cache, table, single, **options)[:, 0]), cache


def _functions(implementation: Implementation):
    """(write, decode, extend) of an implementation; the kernels' imports cost time that the CPU need not pay."""
    if implementation == "xla":
        return _write, xla_attention.paged_decode, xla_attention.paged_extend
    import pallas_kernels as kernels

    if implementation == "reference":
        return kernels.kv_write_reference, kernels.paged_decode_reference, kernels.paged_extend_reference
    return kernels.kv_write, kernels.paged_decode, kernels.paged_extend


def _write(k_pages, v_pages, k, v, page, offset):
    return write_pages(k_pages, k, page, offset), write_pages(v_pages, v, page, offset)
