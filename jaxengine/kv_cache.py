"""The paged KV arrays: cache groups, shapes, sizes, writes. Only this file and the attention layer know the layout.

A page holds `page_size` tokens of one layer: K and V arrays are `[pages, kv_heads, page_size, head_dim]`. Page 0 is the
null page: padding points there, and nothing is ever written to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxengine.sharding import LAYER, RULES, axis_size, named_sharding

AXES = ("page", "kv_heads", None, None)


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches have the same shape and lifetime; they share one page table."""

    layers: tuple[int, ...]
    window: int | None  # a token sees the last `window` positions, itself included; None = all
    kv_heads: int  # on each device
    head_dim: int

    def page_bytes(self, page_size: int, dtype) -> int:
        """Bytes that one page takes of a device, in all layers of the group, K and V together."""
        return 2 * len(self.layers) * self.kv_heads * page_size * self.head_dim * jnp.dtype(dtype).itemsize


def cache_groups(windows: Sequence[int | None], kv_heads: int, head_dim: int) -> tuple[CacheGroup, ...]:
    """One group for each distinct window, in the order in which the layers first show it."""
    return tuple(
        CacheGroup(tuple(i for i, w in enumerate(windows) if w == window), window, kv_heads, head_dim)
        for window in dict.fromkeys(windows)
    )


class KVCache(NamedTuple):
    """K and V of every layer of a stage, one array each: `[pages, kv_heads, page_size, head_dim]`, pages split over the
    shards of the data axis and, within each, over the stages, KV heads over the devices. Donated to every step."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    def layer(self, i: int) -> "LayerCache":
        return LayerCache(self.k[i], self.v[i])


class LayerCache(NamedTuple):
    """K and V of one layer."""

    k: jax.Array
    v: jax.Array


def create_cache(groups: Sequence[CacheGroup], pages: Sequence[int], page_size: int, dtype, mesh: Mesh) -> KVCache:
    """Zeroed pools with `pages[g]` pages, the null page included, for each group g, and each shard of the data axis.

    `groups` are of a stage's layers: each stage has as many pools, of its own pages.
    """
    sharding, shards, devices = named_sharding(mesh, AXES), axis_size(mesh, RULES["page"]), axis_size(mesh, LAYER)

    def zeros(group: CacheGroup, count: int) -> jax.Array:
        shape = (shards * count, group.kv_heads * devices, page_size, group.head_dim)
        return jnp.zeros(shape, dtype, device=sharding)

    by_layer = {layer: (group, count) for group, count in zip(groups, pages, strict=True) for layer in group.layers}
    layers = [by_layer[i] for i in range(len(by_layer))]
    return KVCache(tuple(zeros(*layer) for layer in layers), tuple(zeros(*layer) for layer in layers))


def write_pages(pool: jax.Array, values: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """`values` [tokens, kv_heads, head_dim] into `pool` at (page, offset), both int32 [tokens]; page 0 is dropped."""
    page = jnp.where(page == 0, pool.shape[0], page)  # out of range, which mode="drop" skips
    if pool.dtype.itemsize > 1:
        return pool.at[page, :, offset].set(values.astype(pool.dtype), mode="drop", unique_indices=True)
    from pallas_kernels.paged_tile import kept, stored  # takes time to import, which other caches need not pay

    bits = kept(stored(values, pool.dtype))
    return kept(pool).at[page, :, offset].set(bits, mode="drop", unique_indices=True).view(pool.dtype)


class Pool:
    """K or V of a layer for reading. Made outside the loop that reads: floats of 8 bits are then read as bytes, see
    `paged_tile.kept`.
    """

    def __init__(self, pool: jax.Array):
        self.shape, self.dtype = pool.shape, pool.dtype
        self._kept = pool.view(jnp.uint8) if pool.dtype.itemsize == 1 else pool

    def read(self, pages: jax.Array) -> jax.Array:
        """int32 `[...]`, all of them in range -> `[..., kv_heads, page_size, head_dim]`."""
        return self._kept.at[pages].get(mode="promise_in_bounds").view(self.dtype)  # spares a comparison for each value
