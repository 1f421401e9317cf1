"""Rotary position embedding (Su et al. 2021) and the ways of stretching it to longer contexts."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.config import RopeConfig


def rope_frequencies(rope: RopeConfig, max_model_len: int, max_position_embeddings: int) -> tuple[np.ndarray, float]:
    """Radians per position, float32 [rotary_dim / 2], and the factor that scales the rotated q and k.

    transformers chooses by the length of the sequence at hand (dynamic, longrope). A cache holds keys that were rotated
    once, so here the longest sequence that may come, `max_model_len`, decides for all.
    """
    o = {key: value for key, value in rope.options.items() if value is not None}
    if rope.type == "dynamic":
        stretch = 1 + o["factor"] * (max(max_model_len / max_position_embeddings, 1) - 1)
        return _inv_freq(rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2)), rope.rotary_dim), 1.0
    inv_freq = _inv_freq(rope.theta, rope.rotary_dim)
    if rope.type == "default":
        return inv_freq, 1.0
    if rope.type == "linear":
        return inv_freq / np.float32(o["factor"]), 1.0
    original = o.get("original_max_position_embeddings", max_position_embeddings)
    if rope.type == "llama3":
        return _llama3(inv_freq, original, o), 1.0
    factor = o.get("factor", max_position_embeddings / original)
    if rope.type == "yarn":
        return _yarn(inv_freq, rope, factor, original, o), o.get("attention_factor", _yarn_attention_factor(factor, o))
    divisors = np.array(o["long_factor"] if max_model_len > original else o["short_factor"], np.float32)
    if divisors.shape != inv_freq.shape:
        raise ValueError(f"longrope has {len(divisors)} factors for {len(inv_freq)} pairs of rotated dimensions")
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return inv_freq / divisors, o.get("attention_factor", default)


def rope_angles(positions: jax.Array, inv_freq: jax.Array, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [tokens, pairs], of positions int32 [tokens] times inv_freq float32 [pairs]; scaled."""
    angle = positions.astype(jnp.float32)[:, None] * inv_freq
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first 2 * pairs dimensions of each head, dimension i together with i + pairs.

    x [tokens, heads, dim], cos and sin float32 [tokens, pairs]. Computed in float32, in x's dtype again.
    """
    pairs, cos, sin = cos.shape[1], cos[:, None], sin[:, None]
    a, b, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _inv_freq(theta: float, rotary_dim: int) -> np.ndarray:
    # In float32 as in transformers: far positions multiply what is rounded here.
    return 1 / np.float32(theta) ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))


def _llama3(inv_freq: np.ndarray, original: int, o: Mapping[str, Any]) -> np.ndarray:
    """Waves longer than original / low_freq_factor are stretched, those below original / high_freq_factor kept."""
    turns = original * inv_freq / (2 * math.pi)  # within the original context
    kept = np.clip((turns - o["low_freq_factor"]) / (o["high_freq_factor"] - o["low_freq_factor"]), 0, 1)
    return ((1 - kept) * inv_freq / o["factor"] + kept * inv_freq).astype(np.float32)


def _yarn(inv_freq: np.ndarray, rope: RopeConfig, factor: float, original: int, o: Mapping[str, Any]) -> np.ndarray:
    """Peng et al. 2023: pairs with many turns in the original context are kept, those with few are stretched."""

    def pair_with(turns: float) -> float:
        return rope.rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(o.get("beta_fast") or 32), pair_with(o.get("beta_slow") or 1)
    if o.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    stretched = np.clip((np.arange(len(inv_freq)) - low) / (high - low or 0.001), 0, 1)
    return (inv_freq / factor * stretched + inv_freq * (1 - stretched)).astype(np.float32)


def _yarn_attention_factor(factor: float, o: Mapping[str, Any]) -> float:
    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    if o.get("mscale") and o.get("mscale_all_dim"):
        return of(o["mscale"]) / of(o["mscale_all_dim"])
    return of(1)
