"""The operations that have several implementations behind one signature; which one runs is chosen once, at start-up.

`triton` and `reference` are the kernels and their twins in `pallas_kernels`, where the signatures are documented;
`xla` is plain XLA, the default on CPU. `mosaic` is attention, and steps of few tokens, by the kernels for Hopper
and all else by XLA, so nothing through Triton, which JAX calls deprecated. In a profile each runs under its name here.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxengine.config import ModelConfig
from jaxengine.errors import ConfigError
from jaxengine.kv_cache import write_pages
from jaxengine.layers import xla_attention, xla_grouped
from jaxengine.layers.activation import ERF
from jaxengine.layers.norm import rms_norm
from jaxengine.layers.rope import apply_rope
from jaxengine.sharding import LAYER, total

Implementation = Literal["reference", "xla", "triton", "mosaic"]


class Ops(NamedTuple):
    """Named as in `pallas_kernels`."""

    add_rms_norm: Callable
    all_reduce_rms_norm: Callable
    gated_activation: Callable
    grouped_gated_matmul: Callable
    grouped_matmul: Callable
    kv_write: Callable
    paged_decode: Callable
    paged_extend: Callable
    rope_write: Callable


class WholeLayer(NamedTuple):
    """A layer of a decode step as one kernel; see `pallas_kernels.decode_layer`."""

    rows: int  # of its arrays
    counters: int
    weights: Callable  # what it reads of a layer
    supports: Callable
    run: Callable


@cache
def whole_layer(implementation: Implementation) -> WholeLayer | None:
    """For cards that have one, `supports` says which."""
    if implementation not in ("triton", "mosaic"):
        return None
    from pallas_kernels.decode_layer import COUNTERS, ROWS, LayerWeights, decode_layer, supports

    run = jax.jit(decode_layer, static_argnames=("eps", "scale"))  # traced once for layers that differ in their arrays
    return WholeLayer(ROWS, COUNTERS, LayerWeights, supports, jax.named_call(run, name="decode_layer"))


class FewRows(NamedTuple):
    """Products of `linear.Linear`s that take as long as reading them; see `pallas_kernels.skinny_matmul`. Each is None
    where XLA's product does as well.
    """

    split: Callable  # x, Linear -> float32 [parts, tokens, out], as add_rms_norm takes them
    gated: Callable  # x, Linear of gate and up side by side or None, activation -> [tokens, width]


@cache
def few_rows(implementation: Implementation) -> FewRows:
    """For cards that have such kernels."""
    if implementation not in ("triton", "mosaic"):
        return FewRows(lambda x, linear: None, lambda x, linear, activation: None)
    from pallas_kernels import gated_matmul, paged_tile, skinny_matmul, split_matmul

    def split(x, linear) -> jax.Array | None:
        kernel = linear.plain if paged_tile.on_mosaic_card() else None
        tuning = None if kernel is None else skinny_matmul.split_tuning(x, kernel)
        return None if tuning is None else split_matmul(x, kernel, tuning=tuning)

    def gated(x, linear, activation) -> jax.Array | None:
        takes = linear is not None and activation is not ERF and paged_tile.on_mosaic_card()
        kernel = linear.plain if takes else None
        tuning = None if kernel is None else skinny_matmul.gated_tuning(x, kernel)
        return None if tuning is None else gated_matmul(x, kernel, activation, tuning=tuning)

    return FewRows(split, gated)


@cache
def ops(implementation: Implementation) -> Ops:
    """The operations of an implementation; the kernels' imports cost time that the CPU need not pay."""
    found = _unnamed(implementation)
    return Ops(*(jax.named_call(op, name=name) for name, op in found._asdict().items()))


def check(
    implementation: str, model: ModelConfig, device: jax.Device, *, dtype: str, kv_cache_dtype: str, page_size: int,
    tokens: int,
) -> None:  # fmt: skip
    """Raises ConfigError, with what to use instead, if it does not run on the device or take the model in steps of at
    least so many tokens.
    """
    if implementation not in ("triton", "mosaic"):
        return
    asked = f"attention={implementation!r}"
    if device.platform != "gpu":
        raise ConfigError(f"{asked} needs an NVIDIA GPU, this is a {device.platform}; use 'auto' or 'xla'")
    if page_size < 8:
        raise ConfigError(f"{page_size=} is below the 8 of the GPU's kernels; attention='xla' takes it")
    from pallas_kernels.paged_tile import takes_float8

    if kv_cache_dtype.startswith("float8") and not takes_float8(device):
        raise ConfigError(
            f"{kv_cache_dtype=} needs a GPU of compute capability 8.9 or above, this {device.device_kind} has "
            f"{device.compute_capability}; leave it 'auto', or use attention='xla'"
        )
    if implementation == "triton":
        return
    if getattr(device, "compute_capability", None) != "9.0":
        raise ConfigError(f"{asked} needs a Hopper GPU (H100, H200), this is a {device.device_kind}; use 'triton'")
    from pallas_kernels import paged_decode_mosaic, paged_extend_mosaic

    heads, scale = (model.num_heads, model.head_dim), min(model.attention_scales)
    pool = jax.ShapeDtypeStruct((1, model.num_kv_heads, page_size, model.head_dim), kv_cache_dtype)
    for kernel, q in ((paged_decode_mosaic, (1, 1, *heads)), (paged_extend_mosaic, (tokens, *heads))):
        if not kernel.supports(jax.ShapeDtypeStruct(q, dtype), pool, pool, scale):
            raise ConfigError(
                f"{asked} takes dtype bfloat16 or float16, kv_cache_dtype the same or of 8 bits, heads of 64, 128 or "
                "256, 57 or fewer a KV head, 64 batched tokens at least and positive attention scales, not "
                f"{dtype=} {kv_cache_dtype=} {model.num_heads=} {model.num_kv_heads=} {model.head_dim=} "
                f"max_num_batched_tokens={tokens} {scale=}; use 'triton'"
            )


def _unnamed(implementation: Implementation) -> Ops:
    attention = xla_attention.paged_decode, xla_attention.paged_extend
    grouped = xla_grouped.grouped_gated_matmul, xla_grouped.grouped_matmul
    xla = Ops(_add_rms_norm, _all_reduce_rms_norm, _gated_activation, *grouped, _kv_write, *attention, _rope_write)
    if implementation == "xla":
        return xla
    import pallas_kernels as kernels

    if implementation == "mosaic":
        from pallas_kernels import paged_decode_mosaic, paged_extend_mosaic

        def tuned(op, kernel):
            return lambda q, k, *args, **options: op(
                q, k, *args, **options, tuning=replace(kernel.TuningConfig.from_shapes(q, k), as_bytes=True)
            )

        return xla._replace(
            paged_decode=tuned(kernels.paged_decode, paged_decode_mosaic),
            paged_extend=tuned(kernels.paged_extend, paged_extend_mosaic),
        )

    suffix = "_reference" if implementation == "reference" else ""
    found = Ops(*(getattr(kernels, name + suffix) for name in Ops._fields))
    if implementation == "reference":

        def of_layers(x, y, scale, addresses, workspace, *, eps):
            return kernels.all_reduce_rms_norm_reference(x, y, scale, LAYER, eps=eps)

        return found._replace(all_reduce_rms_norm=of_layers)

    def gated_activation(x, activation):
        return (_gated_activation if activation is ERF else kernels.gated_activation)(x, activation)

    def grouped_gated_matmul(x, gate, up, sizes, activation):
        if activation is not ERF:
            return kernels.grouped_gated_matmul(x, gate, up, sizes, activation)
        return activation(kernels.grouped_matmul(x, gate, sizes)) * kernels.grouped_matmul(x, up, sizes)

    return found._replace(gated_activation=gated_activation, grouped_gated_matmul=grouped_gated_matmul)


def added(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in x's dtype; y like x, or float32 parts [P, *x.shape] of what is added."""
    return x + y if y.ndim == x.ndim else (x.astype(jnp.float32) + y.sum(axis=0)).astype(x.dtype)


def _add_rms_norm(x, y, scale, *, eps) -> tuple[jax.Array, jax.Array]:
    stream = added(x, y)
    return stream, rms_norm(stream, scale, eps)


def _all_reduce_rms_norm(x, y, scale, addresses, workspace, *, eps) -> tuple[jax.Array, jax.Array]:
    return _add_rms_norm(x, total(y, LAYER), scale, eps=eps)


def _gated_activation(x, activation) -> jax.Array:
    gate, up = jnp.split(x, 2, axis=1)
    return activation(gate) * up


def _kv_write(k_pages, v_pages, k, v, page, offset) -> tuple[jax.Array, jax.Array]:
    return write_pages(k_pages, k, page, offset), write_pages(v_pages, v, page, offset)


def _rope_write(
    k_pages, v_pages, qkv, cos, sin, page, offset, q_scale=None, k_scale=None, *, eps=0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    kv_heads = k_pages.shape[1]
    cos, sin = jax.lax.optimization_barrier((cos, sin))  # else a CPU computes them again for every head
    q, k, v = jnp.split(qkv, [qkv.shape[1] - 2 * kv_heads, qkv.shape[1] - kv_heads], axis=1)
    if q_scale is not None:
        q, k = rms_norm(q, q_scale, eps), rms_norm(k, k_scale, eps)
    return apply_rope(q, cos, sin), *_kv_write(k_pages, v_pages, apply_rope(k, cos, sin), v, page, offset)
