"""A layer of a decode step of few rows in one kernel: attention, o, norm, gate and up, down, norm, the next q, k and v.

At few rows a step is many short kernels, each with a start and an end in which no weights are read. In one kernel the
weights of a product are on their way before its input is there. Its programs wait for one another, so all of them must
be on the card at once: processes that share one by MPS could each have a half there, for ever.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import paged_tile as tile
from pallas_kernels.decode_layer_plan import COUNTERS, KEYS, MOST_PARTS, QKV, ROWS, Plan


class LayerWeights(NamedTuple):
    """Of a layer from its attention on, to the next one's q, k and v: kernels [in, out] and scales of norms [n]."""

    o: jax.Array  # [heads * dim, hidden]
    norm: jax.Array  # [hidden]
    gate_up: jax.Array  # [hidden, 2 * inner], side by side
    down: jax.Array  # [inner, hidden]
    next_norm: jax.Array  # [hidden]
    next_qkv: jax.Array  # [hidden, (heads + 2 kv_heads) * dim], side by side
    q_scale: jax.Array | None = None  # [dim]: norms of q and k
    k_scale: jax.Array | None = None


def plan_of(
    qkv: jax.Array, stream: jax.Array, k_pages: jax.Array, weights: LayerWeights, *, eps: float, scale: float
) -> Plan:
    """For arrays or their shapes as `decode_layer` takes them. Raises ValueError for what it does not take."""
    *_, kv_heads, page_size, dim = k_pages.shape
    kernels = _kernels(weights)
    for array in (qkv, k_pages, *kernels):
        if array.dtype != jnp.bfloat16:
            raise ValueError(f"{array.dtype} of shape {array.shape}: this kernel takes bfloat16")
    heads, normed = qkv.shape[1] - 2 * kv_heads, weights.q_scale is not None
    inner, hidden = weights.down.shape
    plan = Plan(hidden, heads, kv_heads, dim, inner, page_size, normed, eps, scale)
    rows_fit = qkv.shape == (ROWS, heads + 2 * kv_heads, dim) and stream.shape == (ROWS, hidden)
    if not rows_fit or tuple(w.shape for w in kernels) != plan.shapes:
        raise ValueError(f"{qkv.shape=} {stream.shape=} {[w.shape for w in kernels]} do not fit {plan}")
    return plan


def _kernels(weights: LayerWeights) -> tuple[jax.Array, ...]:
    """Of the PRODUCTS."""
    return weights.o, weights.gate_up, weights.down, weights.next_qkv


def supports(
    qkv: jax.Array, stream: jax.Array, k_pages: jax.Array, weights: LayerWeights, *, eps: float, scale: float
) -> bool:
    """Whether `decode_layer` takes these, and the program is for a card that has the multiprocessors it needs."""
    if not tile.on_mosaic_card():
        return False
    from pallas_kernels.mosaic_tile import multiprocessors  # costs half a second

    try:
        return plan_of(qkv, stream, k_pages, weights, eps=eps, scale=scale).programs <= multiprocessors()
    except ValueError:
        return False


def decode_layer(
    qkv: jax.Array,
    stream: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    weights: LayerWeights,
    page_table: jax.Array,
    lengths: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    counters: jax.Array,
    *,
    eps: float,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """From the q, k and v of one token of each row to those of the next layer.

    qkv bfloat16 [ROWS, heads + 2 kv_heads, dim], neither normed nor rotated; stream float32 [ROWS, hidden]. Pools
    bfloat16 [pages, kv_heads, page_size, dim]; page_table int32 [ROWS, W]; lengths int32 [ROWS], this token included,
    0: no token, and what such rows give is not defined. page and offset int32 [ROWS]: where k and v go, page 0 =
    nowhere. cos, sin float32 [ROWS, dim / 2]. counters int32 [COUNTERS]: zeros, or what a layer of the same lengths and
    shapes returned: with others programs would wait for ever.

    Returns the next layer's qkv, stream, the pools and counters. Norms divide by the root of
    the mean square + eps; q @ k is multiplied by scale; the activation is silu. ValueError for shapes that do not fit.
    """
    from pallas_kernels.decode_layer_mosaic import Inputs, layer

    plan = plan_of(qkv, stream, k_pages, weights, eps=eps, scale=scale)
    if counters.shape != (COUNTERS,) or v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(f"{counters.shape=} {v_pages.shape=} {v_pages.dtype=} do not fit {plan}")
    rows = jnp.max(jnp.where(lengths > 0, jnp.arange(1, ROWS + 1), 0))  # up to the last one with a token
    tiles = -(-jnp.max(lengths) // KEYS)
    parts = jnp.clip(plan.programs // jnp.maximum(1, rows * plan.kv_heads), 1, jnp.clip(tiles - 1, 1, MOST_PARTS))
    factors = jnp.stack([jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)])
    pools = [pool.reshape(-1, plan.page_size, plan.dim) for pool in (k_pages, v_pages)]
    inputs = Inputs(
        _kernels(weights), qkv.reshape(ROWS, -1), stream, (weights.norm, weights.next_norm),
        (weights.q_scale, weights.k_scale) if plan.normed else (), page_table, lengths, page, offset,
        jnp.stack([rows, parts]).astype(jnp.int32), factors,
    )  # fmt: skip
    out, *pools, counters = layer(plan, inputs, pools, counters)
    k_pages, v_pages = (pool.reshape(k_pages.shape) for pool in pools)
    return out.products[QKV].reshape(qkv.shape), out.hidden[1], k_pages, v_pages, counters


def decode_layer_reference(
    qkv: jax.Array,
    stream: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    weights: LayerWeights,
    page_table: jax.Array,
    lengths: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    counters: jax.Array,
    *,
    eps: float,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """`decode_layer` in float32, rounded to qkv's dtype where the kernel rounds; of any shapes and dtype."""
    rows, dim, f32, dtype = len(qkv), qkv.shape[2], jnp.float32, qkv.dtype
    kv_heads = k_pages.shape[1]
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=f32)
    q, k, v = jnp.split(qkv.astype(f32), [qkv.shape[1] - 2 * kv_heads, qkv.shape[1] - kv_heads], axis=1)

    def rounded(x):
        return x.astype(dtype).astype(f32)

    def inverse_rms(x):
        return jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)

    def rotated(x, gain):
        x = x if gain is None else x * inverse_rms(x) * gain.astype(f32)
        a, b = jnp.split(x, 2, axis=-1)
        return rounded(jnp.concatenate([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1))

    q, k = rotated(q, weights.q_scale), rotated(k, weights.k_scale)
    place = jnp.where(page == 0, len(k_pages), page)  # out of range: dropped
    pools = [pool.at[place, :, offset].set(tile.stored(x, pool.dtype), mode="drop")
             for pool, x in ((k_pages, k), (v_pages, v))]  # fmt: skip

    def gathered(pool):  # [rows, heads, keys, dim]
        x = pool[page_table].astype(f32).swapaxes(2, 3)
        x = x.reshape(rows, -1, kv_heads, dim).swapaxes(1, 2)
        return jnp.repeat(x, q.shape[1] // kv_heads, axis=1)

    keys, values = map(gathered, pools)
    seen = jnp.arange(keys.shape[2]) < lengths[:, None, None]
    share = jax.nn.softmax(jnp.where(seen, product("rhd,rhkd->rhk", q, keys) * scale, tile.HIDDEN), axis=-1)
    x = rounded(product("rhk,rhkd->rhd", share, jnp.where(seen[..., None], values, 0))).reshape(rows, -1)
    stream = stream + product("rk,kn->rn", x, weights.o.astype(f32))
    x = rounded(stream * weights.norm.astype(f32))  # the norm's factor is the product's
    gate, up = jnp.split(product("rk,kn->rn", x, weights.gate_up.astype(f32)) * inverse_rms(stream), 2, axis=1)
    stream = stream + product("rk,kn->rn", rounded(jax.nn.silu(gate) * up), weights.down.astype(f32))
    x = rounded(stream * weights.next_norm.astype(f32))
    y = product("rk,kn->rn", x, weights.next_qkv.astype(f32)) * inverse_rms(stream)
    return y.astype(dtype).reshape(qkv.shape), stream, *pools, counters
