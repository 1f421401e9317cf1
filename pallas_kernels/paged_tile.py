"""What the attention kernels share: reading a tile of paged keys or values, one step of online softmax, checks."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

HIDDEN = -1e30  # score of a key that a query does not see; -inf would give NaN in exp2(score - top)
LOG2E = math.log2(math.e)
MIN_ROWS = 16  # the least rows of a matrix product on the tensor cores
TILE_BYTES = 2**14  # of K or V: more is slower (decode) or does not fit beside its double buffer
MOSAIC_CARDS = ("H100", "H200")  # words in the names of cards that get the kernels in Mosaic GPU
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

Carry = tuple[jax.Array, jax.Array, jax.Array]  # output [M, D], top score [M], total weight [M]; all float32


def check(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, window: int | None, softcap: float | None) -> None:
    """Raises ValueError when q `[..., heads, head_dim]` does not fit the pools, or an option is out of range."""
    heads, dim = q.shape[-2:]
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"pools must share one shape [pages, kv_heads, page_size, head_dim]: "
                         f"{k_pages.shape=} {v_pages.shape=}")  # fmt: skip
    if k_pages.shape[3] != dim or heads % k_pages.shape[1]:
        raise ValueError(f"q of {heads=} {dim=} does not fit pools of shape {k_pages.shape}")
    for name, array in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if array.dtype not in DTYPES:
            raise ValueError(f"{name} is {array.dtype}; it must be bfloat16, float16 or float32")
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None for no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{softcap=} must be positive, or None for no softcap")


def on_mosaic_card() -> bool:
    """Whether the program is for a card that gets the kernels in Mosaic GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return any(name in device.device_kind for name in MOSAIC_CARDS)


def check_tuning(powers_of_two: dict[str, int], positive: dict[str, int]) -> None:
    """Raises ValueError naming the first value that is not what its dict says."""
    for name, value in powers_of_two.items():
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two")
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def block_kv(head_dim: int, dtype) -> int:
    """Keys in a tile, from 16 to 64."""
    return max(16, min(64, TILE_BYTES // (pl.next_power_of_2(head_dim) * jnp.dtype(dtype).itemsize)))


def div(x: jax.Array, n: int) -> jax.Array:
    """x // n for x >= 0, without the code that negative numbers need."""
    return jax.lax.div(x, jnp.int32(n))


def rem(x: jax.Array, n: int) -> jax.Array:
    """x % n for x >= 0."""
    return jax.lax.rem(x, jnp.int32(n))


def first_key(position: jax.Array, window: int | None, page_size: int) -> int | jax.Array:
    """The start of the first page that a query at `position` sees; pages before it may be another row's by now."""
    if window is None:
        return 0
    return div(jnp.maximum(position + 1 - window, 0), page_size) * page_size


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
    page = plt.load(table_ref.at[row, div(tokens, page_size)], mask=inside, other=None if inside is None else 0)
    index = (page[:, None], head, rem(tokens, page_size)[:, None], d[None, :])
    masks = [] if inside is None else [inside[:, None]]
    masks += [] if dim == d.size else [(d < dim)[None, :]]
    if not masks:
        return k_ref[index], v_ref[index]
    mask = jnp.broadcast_to(masks[0] if len(masks) == 1 else masks[0] & masks[1], (tokens.size, d.size))
    return plt.load(k_ref.at[index], mask=mask, other=0), plt.load(v_ref.at[index], mask=mask, other=0)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over dimension contract[0] of a and contract[1] of b, summed in float32; float32 stays IEEE, not TF32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def start(rows: int, dim: int) -> Carry:
    """The carry before the first tile."""
    return jnp.zeros((rows, dim), jnp.float32), jnp.full((rows,), HIDDEN, jnp.float32), jnp.zeros((rows,), jnp.float32)


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
    scores = dot(q, k.astype(q.dtype), (1, 1)) * (scale / softcap if softcap else scale * LOG2E)
    if softcap:
        scores = jnp.tanh(scores) * (softcap * LOG2E)
    if seen is not None:
        scores = jnp.where(seen, scores, HIDDEN)
    new_top = jnp.maximum(top, scores.max(axis=1))
    weight, decay = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
    if seen is not None:
        weight = jnp.where(seen, weight, 0.0)  # a query that has seen no key yet has exp2(HIDDEN - HIDDEN) = 1
    out = out * decay[:, None] + dot(weight.astype(q.dtype), v.astype(q.dtype), (1, 0))
    return out, new_top, total * decay + weight.sum(axis=1)


def finish(carry: Carry) -> jax.Array:
    """The normalized output [M, D]; zeros for a query that saw no key."""
    out, _, total = carry
    return out / jnp.where(total == 0.0, 1.0, total)[:, None]
