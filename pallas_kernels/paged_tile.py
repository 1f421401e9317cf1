"""What the kernels share, through Triton and Mosaic GPU: checks, and numbers within tiles."""

import math

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # score of a key that a query does not see; -inf would give NaN in exp2(score - top)
LOG2E = math.log2(math.e)
MOSAIC_CARDS = ("H100", "H200")  # words in the names of cards that get the kernels in Mosaic GPU
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)  # of pools only


def check(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> None:
    """Raises ValueError when q `[..., heads, head_dim]` does not fit the pools, or an option is out of range."""
    heads, dim = q.shape[-2:]
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"pools must share one shape [pages, kv_heads, page_size, head_dim]: "
                         f"{k_pages.shape=} {v_pages.shape=}")  # fmt: skip
    if k_pages.shape[3] != dim or heads % k_pages.shape[1]:
        raise ValueError(f"q of {heads=} {dim=} does not fit pools of shape {k_pages.shape}")
    for name, array, others in (("q", q, ()), ("k_pages", k_pages, FLOAT8), ("v_pages", v_pages, FLOAT8)):
        if array.dtype not in (*DTYPES, *others):
            allowed = ", ".join(jnp.dtype(dtype).name for dtype in (*DTYPES, *others))
            raise ValueError(f"{name} is {array.dtype}; it must be one of {allowed}")
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None for no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{softcap=} must be positive, or None for no softcap")
    if sinks is not None and (sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(f"{sinks.shape=} {sinks.dtype=} must be a logit for each of {heads=}, or sinks=None")


def stored(values: jax.Array, dtype) -> jax.Array:
    """`values` as a pool of this dtype holds them: floats of 8 bits saturate."""
    return saturated(values, dtype) if dtype in FLOAT8 else values.astype(dtype)


def kept(pool: jax.Array) -> jax.Array:
    """Floats of 8 bits as bytes, for XLA: it reads and writes them by way of a copy of all of them in 16."""
    return pool.view(jnp.uint8) if pool.dtype in FLOAT8 else pool


def saturated(values: jax.Array, dtype) -> jax.Array:
    """Cast; what lies beyond the dtype's largest number becomes that one, where a plain cast gives infinity or, of
    e4m3fn, NaN. NaN stays NaN. The values' dtype must hold that number.
    """
    most = float(jnp.finfo(dtype).max)
    return jnp.where(values > most, most, jnp.where(values < -most, -most, values)).astype(dtype)


def in_float16(q: jax.Array) -> jax.Array:
    """Queries for products with floats of 8 bits, which become float16 by one instruction for two of them, and bfloat16
    by three. float16 holds all but the largest queries and the last bits of the smallest.
    """
    return saturated(q.astype(jnp.float32), jnp.float16)


def takes_float8(device: jax.Device) -> bool:
    """Whether Triton casts floats of 8 bits there."""
    return tuple(int(part) for part in str(device.compute_capability).split(".")) >= (8, 9)


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


def div(x: jax.Array, n: int | jax.Array) -> jax.Array:
    """x // n for x >= 0, without the code that negative numbers need."""
    return jax.lax.div(x, jnp.int32(n))


def rem(x: jax.Array, n: int | jax.Array) -> jax.Array:
    """x % n for x >= 0."""
    return jax.lax.rem(x, jnp.int32(n))


def first_key(position: jax.Array, window: int | None, page_size: int) -> int | jax.Array:
    """The start of the first page that a query at `position` sees; pages before it may be another row's by now."""
    if window is None:
        return 0
    return div(jnp.maximum(position + 1 - window, 0), page_size) * page_size
