"""What a layer does with q, k and v: the write to its pages, and attention to them."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxengine.kv_cache import LayerCache
from jaxengine.layers.norm import RMSNorm
from jaxengine.layers.ops import Implementation, ops
from jaxengine.layers.peers import Peers


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "positions",
        "page",
        "offset",
        "tables",
        "lengths",
        "q_start",
        "q_len",
        "block_row",
        "block_start",
        "peers",
    ],
    meta_fields=["layer_group", "implementation", "block_q", "float8"],
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
    float8: str | None = None  # static: the dtype of keys and values in pools that are kept as bytes
    peers: Peers | None = None  # of the devices that split layers; None: XLA sums for them

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


def _floats(cache: LayerCache, inputs: LayerInputs) -> LayerCache:
    """XLA drops this view, and the one back, where it reads or writes bytes: see `paged_tile.kept`."""
    dtype = inputs.step.float8
    return cache if dtype is None else LayerCache(cache.k.view(dtype), cache.v.view(dtype))


def _as_kept(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    return LayerCache(k.view(cache.k.dtype), v.view(cache.v.dtype))


def write_kv(k: jax.Array, v: jax.Array, inputs: LayerInputs, cache: LayerCache) -> LayerCache:
    """The cache with k, v [tokens, kv_heads, head_dim] in the layer's pages."""
    write = ops(inputs.step.implementation).kv_write
    return _as_kept(cache, *write(*_floats(cache, inputs), k, v, inputs.page, inputs.step.offset))


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    norms: tuple[RMSNorm, RMSNorm] | None,
    inputs: LayerInputs,
    cache: LayerCache,
) -> tuple[jax.Array, LayerCache]:
    """qkv [tokens, heads + 2 kv_heads, head_dim] -> rotated q [tokens, heads, head_dim], and the cache with k, v in it.

    cos, sin: see `rope.rope_angles`. `norms`: of q and of k, before they are rotated.
    """
    scales, eps = ([norm.scale[...] for norm in norms], norms[0].eps) if norms else ([], 0.0)
    write = ops(inputs.step.implementation).rope_write
    pools = _floats(cache, inputs)
    q, *pools = write(*pools, qkv, cos, sin, inputs.page, inputs.step.offset, *scales, eps=eps)
    return q, _as_kept(cache, *pools)


def attend(
    q: jax.Array,
    inputs: LayerInputs,
    cache: LayerCache,
    *,
    sinks: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Causal attention of each token to all of its row in the pages, where its own k, v are by now.

    q [tokens, heads, head_dim] -> the same shape. sinks [heads]: see pallas_kernels.paged_decode.
    """
    step, table = inputs.step, inputs.table
    options = {"sinks": sinks, "scale": scale, "window": window, "softcap": softcap}
    op, rows, cache = ops(step.implementation), len(step.lengths), _floats(cache, inputs)
    if step.block_row is None:
        return op.paged_decode(q[:, None], *cache, table, step.lengths, **options)[:, 0]
    single = jnp.where(step.q_len == 1, step.lengths, 0)
    decoded = op.paged_decode(q[:rows, None], *cache, table, single, **options)[:, 0]
    # Each token is in a single row or in a block.
    blocks = step.block_row, step.block_start, step.q_start, step.q_len, step.lengths
    decoded = jnp.pad(decoded, ((0, len(q) - rows), (0, 0), (0, 0)))
    return op.paged_extend(q, *cache, table, *blocks, decoded, block_q=step.block_q, **options)
