"""What happens to q, k and v between their product and attention, in one pass: norms, rotation, the write to the pages.

Separate steps would each read and write a few kilobytes a token: in a decode step their launches are what costs.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile
from pallas_kernels import triton_tile
from pallas_kernels.kv_write import kv_write_reference


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed only."""

    num_warps: int = 2

    def __post_init__(self) -> None:
        tile.check_tuning({"num_warps": self.num_warps}, {})


@partial(jax.jit, static_argnames=("eps", "tuning", "interpret"))
def rope_write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    q_scale: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    *,
    eps: float = 0.0,
    tuning: TuningConfig = TuningConfig(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries, and the pools with the rotated keys and the values of each token.

    qkv [T, H + 2 KH, D]: the heads of q, then those of k, then those of v. q and k are first RMS-normed over D with
    `eps` and multiplied by q_scale, k_scale [D], where given; then dimension i of a head turns together with i + P by
    the angle whose cos, sin [T, P] float32 are given (Su et al. 2021), dimensions from 2 P on stay. Token t goes to
    page[t], offset[t], int32 [T], in pools [pages, KH, page_size, D], as by `kv_write`, updated in place where the
    caller donates them; a token of page 0 is dropped. No two tokens may share a slot. Returns q [T, H, D] in qkv's
    dtype and the pools.
    ValueError for shapes that do not fit.
    """
    _check(k_pages, v_pages, qkv, cos, sin, page, offset, q_scale, k_scale)
    triton_tile.check_offsets(k_pages, v_pages)
    tokens, heads, dim = qkv.shape
    kv_heads = k_pages.shape[1]
    scales = [] if q_scale is None else [q_scale, k_scale]
    whole, first = pl.BlockSpec(memory_space=pl.ANY), 5 + len(scales)
    pools = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (k_pages, v_pages)]
    return tuple(
        pl.pallas_call(
            partial(_kernel, normed=bool(scales), eps=eps),
            out_shape=[jax.ShapeDtypeStruct((tokens, heads - 2 * kv_heads, dim), qkv.dtype), *pools],
            grid=(tokens, kv_heads),
            in_specs=[whole] * (first + 2),
            out_specs=[whole] * 3,
            input_output_aliases={first: 1, first + 1: 2},
            compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
            interpret=interpret,
            name="rope_write",
        )(page, offset, qkv, cos, sin, *scales, k_pages, v_pages)
    )


@partial(jax.jit, static_argnames="eps")
def rope_write_reference(
    k_pages: jax.Array,
    v_pages: jax.Array,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    q_scale: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    *,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same as `rope_write` in plain jax.numpy."""
    kv_heads, pairs = k_pages.shape[1], cos.shape[1]
    q, k, v = jnp.split(qkv, [qkv.shape[1] - 2 * kv_heads, qkv.shape[1] - kv_heads], axis=1)

    def rotated(x, scale):
        if scale is not None:
            y = x.astype(jnp.float32)
            x = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype) * scale
        a, b, rest = (part.astype(jnp.float32) for part in jnp.split(x, [pairs, 2 * pairs], axis=-1))
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1).astype(x.dtype)

    return rotated(q, q_scale), *kv_write_reference(k_pages, v_pages, rotated(k, k_scale), v, page, offset)


def _check(k_pages, v_pages, qkv, cos, sin, page, offset, q_scale, k_scale) -> None:
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"pools must share one shape [pages, kv_heads, page_size, head_dim]: "
                         f"{k_pages.shape=} {v_pages.shape=}")  # fmt: skip
    kv_heads, dim = k_pages.shape[1], k_pages.shape[3]
    heads = qkv.shape[1] - 2 * kv_heads
    if qkv.ndim != 3 or qkv.shape[2] != dim or heads < kv_heads or heads % kv_heads:
        raise ValueError(f"{qkv.shape=} must be [tokens, heads + 2 * {kv_heads}, {dim}], for pools of {k_pages.shape}")
    if cos.shape != sin.shape or cos.shape[0] != qkv.shape[0] or not 0 < 2 * cos.shape[1] <= dim:
        raise ValueError(f"{cos.shape=} {sin.shape=} must be [{qkv.shape[0]}, at most {dim // 2}]")
    if not page.shape == offset.shape == qkv.shape[:1]:
        raise ValueError(f"{page.shape=} {offset.shape=} must be [{qkv.shape[0]}], one for each token")
    if (q_scale is None) != (k_scale is None):
        raise ValueError("q_scale and k_scale: both or neither")
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale is not None and scale.shape != (dim,):
            raise ValueError(f"{name} has shape {scale.shape}, it must be [{dim}]")


def _kernel(
    page_ref,  # [T]
    offset_ref,  # [T]
    qkv_ref,  # [T, H + 2 KH, D]
    cos_ref,  # [T, P]
    sin_ref,
    *refs,  # q_scale, k_scale [D] where normed; the pools, aliased to outputs; q [T, H, D]; the pools
    normed: bool,
    eps: float,
):
    token, head = pl.program_id(0), pl.program_id(1)
    q_ref, k_out_ref, v_out_ref = refs[-3:]
    heads, kv_heads, pairs, dim = q_ref.shape[1], k_out_ref.shape[1], cos_ref.shape[1], qkv_ref.shape[2]
    half = jnp.arange(pl.next_power_of_2(pairs))
    cos, sin = (plt.load(ref.at[token, half], mask=half < pairs, other=0)[None, :] for ref in (cos_ref, sin_ref))
    # Parts of a head: the first of each pair, the second, what is not turned. Stored in this order, since what lies
    # past a part's end is the next part's (interpret mode writes back what a mask leaves out).
    parts = [(half, pairs), (half + pairs, 2 * pairs)]
    if 2 * pairs < dim:
        parts.append((2 * pairs + jnp.arange(pl.next_power_of_2(dim - 2 * pairs)), dim))

    def load(ref, rows, inside, d, end):
        mask = inside[:, None] & (d < end)[None, :]
        return plt.load(ref.at[token, rows[:, None], d[None, :]], mask=mask, other=0).astype(jnp.float32)

    def rotated(rows, inside, scale_ref):
        a, b, *rest = (load(qkv_ref, rows, inside, *part) for part in parts)
        if normed:
            squares = sum((part * part).sum(axis=1) for part in (a, b, *rest))
            inverse = jax.lax.rsqrt(squares / dim + eps)[:, None]
            a, b, *rest = (
                (part * inverse).astype(qkv_ref.dtype).astype(jnp.float32)
                * plt.load(scale_ref.at[d], mask=d < end, other=0)[None, :].astype(jnp.float32)
                for part, (d, end) in zip((a, b, *rest), parts)
            )
            # The product is of qkv's dtype too.
            a, b, *rest = (part.astype(qkv_ref.dtype).astype(jnp.float32) for part in (a, b, *rest))
        return a * cos - b * sin, b * cos + a * sin, *rest

    # Everything is read before anything is written: a load waits for a microsecond, and stores would hold it back.
    page, offset = page_ref[token], offset_ref[token]
    group, one = heads // kv_heads, jnp.arange(1)
    member = jnp.arange(pl.next_power_of_2(group))
    q_rows, inside = head * group + member, member < group
    q = rotated(q_rows, inside, refs[0])
    k = rotated(heads + head + one, one == 0, refs[1])
    value_d = jnp.arange(pl.next_power_of_2(dim))
    value = plt.load(qkv_ref.at[token, heads + kv_heads + head, value_d], mask=value_d < dim, other=0)

    for values, (d, end) in zip(q, parts):
        mask = inside[:, None] & (d < end)[None, :]
        plt.store(q_ref.at[token, q_rows[:, None], d[None, :]], values.astype(q_ref.dtype), mask=mask)
    written = page != 0
    for values, (d, end) in zip(k, parts):
        at = k_out_ref.at[page, head, (offset + one)[:, None], d[None, :]]
        values = tile.stored(values.astype(qkv_ref.dtype), k_out_ref.dtype)
        plt.store(at, values, mask=written & (d < end)[None, :])
    at = v_out_ref.at[page, head, offset, value_d]
    plt.store(at, tile.stored(value, v_out_ref.dtype), mask=written & (value_d < dim))
