"""What the kernels through Triton share: a tile of paged keys and values, products, one step of online softmax."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile

MIN_ROWS = 16  # the least rows of a matrix product on the tensor cores
TILE_BYTES = 2**14  # of K or V: more is slower (decode) or does not fit beside its double buffer

Carry = tuple[jax.Array, jax.Array, jax.Array]  # output [M, D], top score [M], total weight [M]; all float32


def check_offsets(*pools: jax.Array) -> None:
    """Raises ValueError for pools of a size whose elements JAX's lowering cannot number.

    Its numbers have 32 bits, sign included, up to 4 GiB, and 64 beyond: too few for 2 GiB of bytes and more.
    """
    for pool in pools:
        if pool.dtype.itemsize == 1 and 2**31 < pool.size <= 2**32:
            raise ValueError(f"{pool.shape=} {pool.dtype=}: Triton takes pools of at most 2 GiB, or of more than 4")


def block_kv(head_dim: int, *dtypes, most: int = 64) -> int:
    """Keys in a tile, at least 16: what fits in the widest dtype that they have on their way."""
    widest = max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    return max(16, min(most, TILE_BYTES // (pl.next_power_of_2(head_dim) * widest)))


def load_tile(
    k_ref,  # [pages, kv_heads, page_size, head_dim]
    v_ref,
    table_ref,  # [rows, W]
    row: jax.Array,
    head: jax.Array,
    tokens: jax.Array,  # [N] positions in the row
    inside: jax.Array | None,  # bool [N]: the positions to read, the others give zeros; None = all
) -> tuple[jax.Array, jax.Array]:
    """K and V `[N, D]` of one KV head at `tokens`, D the next power of two of head_dim, zeros beyond head_dim."""
    page_size, dim = k_ref.shape[2:]
    d = jnp.arange(pl.next_power_of_2(dim))
    page = plt.load(table_ref.at[row, tile.div(tokens, page_size)], mask=inside, other=None if inside is None else 0)
    index = (page[:, None], head, tile.rem(tokens, page_size)[:, None], d[None, :])
    masks = [] if inside is None else [inside[:, None]]
    masks += [] if dim == d.size else [(d < dim)[None, :]]
    if not masks:
        return k_ref[index], v_ref[index]
    mask = jnp.broadcast_to(masks[0] if len(masks) == 1 else masks[0] & masks[1], (tokens.size, d.size))
    zero = jnp.zeros((), k_ref.dtype)  # of this dtype: there is no cast of integers to floats of 8 bits
    return plt.load(k_ref.at[index], mask=mask, other=zero), plt.load(v_ref.at[index], mask=mask, other=zero)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over dimension contract[0] of a and contract[1] of b, summed in float32; float32 stays IEEE, not TF32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def start(rows: int, dim: int, sinks: jax.Array | None = None) -> Carry:
    """The carry before the first tile: the sinks [M], each a score of weight 1 and no value, or nothing."""
    out = jnp.zeros((rows, dim), jnp.float32)
    if sinks is None:
        return out, jnp.full((rows,), tile.HIDDEN, jnp.float32), jnp.zeros((rows,), jnp.float32)
    return out, sinks.astype(jnp.float32) * tile.LOG2E, jnp.ones((rows,), jnp.float32)


def attend(
    carry: Carry,
    q: jax.Array,  # [M, D]
    k: jax.Array,  # [N, D]
    v: jax.Array,
    seen: jax.Array | None,  # bool [M, N]; None = every query sees every key
    scale: float,
    softcap: float | None,
) -> Carry:
    """One step of online softmax (Milakov and Gimelshein 2018), in powers of two."""
    out, top, total = carry
    scores = dot(q, k.astype(q.dtype), (1, 1)) * (scale / softcap if softcap else scale * tile.LOG2E)
    if softcap:
        scores = jnp.tanh(scores) * (softcap * tile.LOG2E)
    if seen is not None:
        scores = jnp.where(seen, scores, tile.HIDDEN)
    new_top = jnp.maximum(top, scores.max(axis=1))
    weight, decay = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
    if seen is not None:
        weight = jnp.where(seen, weight, 0.0)  # a query that has seen no key yet has exp2(0) = 1
    out = out * decay[:, None] + dot(weight.astype(q.dtype), v.astype(q.dtype), (1, 0))
    return out, new_top, total * decay + weight.sum(axis=1)


def finish(carry: Carry) -> jax.Array:
    """The normalized output [M, D]; zeros for a query that saw no key."""
    out, _, total = carry
    return out / jnp.where(total == 0.0, 1.0, total)[:, None]
