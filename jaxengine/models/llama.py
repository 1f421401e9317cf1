"""Llama, and the families that are Llama with options: Mistral (windows), Qwen2 (QKV bias), Qwen3 (norms on q and k),
Mixtral and Qwen3-MoE (experts), gpt_oss (attention sinks, experts with biases).

Source: Touvron et al. 2023 and transformers' modeling files; options come from ModelConfig.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.config import ModelConfig
from jaxengine.kv_cache import KVCache, LayerCache
from jaxengine.layers.activation import ACTIVATIONS
from jaxengine.layers.attention import AttentionInputs, LayerInputs, attend, rotate_and_write
from jaxengine.layers.embedding import Embedding
from jaxengine.layers.linear import Linear, Projections, precision
from jaxengine.layers.moe import MoE
from jaxengine.layers.norm import RMSNorm
from jaxengine.layers.ops import WholeLayer, added, few_rows, ops, whole_layer
from jaxengine.layers.rope import rope_angles, rope_frequencies
from jaxengine.sharding import Axis, ParamSpec, gather, share_ids


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    specs = {"embed_tokens.embedding": ParamSpec((c.vocab_size, c.hidden_size), ("vocab", "hidden"))}

    def linear(path: str, sizes: tuple[int, int], axes: tuple[str, str], bias: bool):
        specs[f"{path}.kernel"] = ParamSpec(sizes, axes)
        if bias:
            specs[f"{path}.bias"] = ParamSpec(sizes[1:], axes[1:])

    def norm(path: str, size: int):
        specs[f"{path}.scale"] = ParamSpec((size,), ("norm",))

    for i in range(c.num_layers):
        layer = f"layers.{i}"
        norm(f"{layer}.input_layernorm", c.hidden_size)
        linear(f"{layer}.self_attn.q_proj", (c.hidden_size, q), ("hidden", "heads"), c.qkv_bias)
        linear(f"{layer}.self_attn.k_proj", (c.hidden_size, kv), ("hidden", "kv_heads"), c.qkv_bias)
        linear(f"{layer}.self_attn.v_proj", (c.hidden_size, kv), ("hidden", "kv_heads"), c.qkv_bias)
        if c.qk_norm:
            norm(f"{layer}.self_attn.q_norm", c.head_dim)
            norm(f"{layer}.self_attn.k_norm", c.head_dim)
        linear(f"{layer}.self_attn.o_proj", (q, c.hidden_size), ("heads", "hidden"), c.o_bias)
        if c.sinks:
            specs[f"{layer}.self_attn.sinks"] = ParamSpec((c.num_heads,), ("heads",))
        norm(f"{layer}.post_attention_layernorm", c.hidden_size)
        if c.experts and i in c.experts.layers:
            count, inner = c.experts.count, c.experts.intermediate_size
            linear(f"{layer}.mlp.gate", (c.hidden_size, count), ("hidden", "router"), c.experts.bias)
            wide, narrow = (c.hidden_size, "hidden"), (inner, "expert_mlp")
            for part, (size_in, axis_in), (size_out, axis_out) in (
                ("gate_proj", wide, narrow), ("up_proj", wide, narrow), ("down_proj", narrow, wide),
            ):  # fmt: skip
                path = f"{layer}.mlp.experts.{part}"
                specs[f"{path}.kernel"] = ParamSpec((count, size_in, size_out), ("expert", axis_in, axis_out))
                if c.experts.bias:
                    specs[f"{path}.bias"] = ParamSpec((count, size_out), ("expert", axis_out))
            continue
        linear(f"{layer}.mlp.gate_proj", (c.hidden_size, c.intermediate_size), ("hidden", "mlp"), c.mlp_bias)
        linear(f"{layer}.mlp.up_proj", (c.hidden_size, c.intermediate_size), ("hidden", "mlp"), c.mlp_bias)
        linear(f"{layer}.mlp.down_proj", (c.intermediate_size, c.hidden_size), ("mlp", "hidden"), c.mlp_bias)
    norm("norm", c.hidden_size)
    if not c.tie_word_embeddings:
        linear("lm_head", (c.hidden_size, c.vocab_size), ("hidden", "vocab"), False)
    return specs


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions over the paged cache."""

    def __init__(
        self, config: ModelConfig, params: Mapping[str, Any], layer: int, max_model_len: int, axis: Axis | None
    ):
        c = config
        self.head_dim, self.window, self.scale = c.head_dim, c.windows[layer], c.attention_scales[layer]
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.qkv = Projections(params, ("q_proj", "k_proj", "v_proj"), "qkv_proj", (q, kv, kv))
        self.o_proj = Linear(params["o_proj"], axis)
        self.sinks = nnx.Param(params["sinks"]) if c.sinks else None
        self.q_norm = RMSNorm(params["q_norm"], c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(params["k_norm"], c.norm_eps) if c.qk_norm else None
        assert c.rope is not None
        inv_freq, self.rope_factor = rope_frequencies(c.rope, max_model_len, c.max_position_embeddings)
        self.inv_freq = tuple(inv_freq.tolist())  # static: part of the program, not a parameter

    def __call__(self, x: jax.Array, inputs: LayerInputs, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """x [tokens, hidden] -> an `addend`, and the cache with these tokens in it."""
        qkv = self.qkv.joined(x).reshape(len(x), -1, self.head_dim)
        norms = (self.q_norm, self.k_norm) if self.q_norm is not None and self.k_norm is not None else None
        q, cache = rotate_and_write(qkv, *self.angles(inputs.step), norms, inputs, cache)
        sinks = None if self.sinks is None else self.sinks[...]
        y = attend(q, inputs, cache, sinks=sinks, scale=self.scale, window=self.window)
        with jax.named_scope("o_proj"):
            return addend(y.reshape(len(x), -1), self.o_proj, inputs.step), cache

    def angles(self, step: AttentionInputs) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine by which a step's q and k are rotated, float32 [tokens, pairs]."""
        return rope_angles(step.positions, jnp.asarray(self.inv_freq, jnp.float32), self.rope_factor)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], axis: Axis | None):
        width = config.intermediate_size
        self.gate_up = Projections(params, ("gate_proj", "up_proj"), "gate_up_proj", (width, width))
        self.down_proj = Linear(params["down_proj"], axis)
        self.activation = config.activation

    def __call__(self, x: jax.Array, inputs: LayerInputs) -> jax.Array:
        """x [tokens, hidden] -> an `addend`."""
        implementation, activation = inputs.step.implementation, ACTIVATIONS[self.activation]
        with jax.named_scope("gate_up_proj"):
            gated = few_rows(implementation).gated(x, self.gate_up.fused, activation)
        if gated is None:
            gated = ops(implementation).gated_activation(self.gate_up.joined(x), activation)
        with jax.named_scope("down_proj"):
            return addend(gated, self.down_proj, inputs.step)


def addend(x: jax.Array, linear: Linear, step: AttentionInputs) -> jax.Array:
    """The product as a `Residual` adds it: [tokens, hidden], with peers a part of it, or float32 parts [P, tokens,
    hidden].
    """
    parts = few_rows(step.implementation).split(x, linear)
    return linear(x, step.peers is not None) if parts is None else parts


class Residual(NamedTuple):
    """x + y is the stream between two layers: the next norm adds them, in the same pass. y may be parts that are added
    up; with peers it is this device's part of what the devices add to x.
    """

    x: jax.Array
    y: jax.Array

    def normed(self, norm: RMSNorm, step: AttentionInputs) -> tuple[jax.Array, jax.Array]:
        """The stream, and what `norm` makes of it."""
        op, scale = ops(step.implementation), norm.scale[...]
        if step.peers is None:
            return op.add_rms_norm(*self, scale, eps=norm.eps)
        return op.all_reduce_rms_norm(*self, scale, *step.peers, eps=norm.eps)


class Layer(nnx.Module):
    def __init__(
        self, config: ModelConfig, params: Mapping[str, Any], layer: int, max_model_len: int, axis: Axis | None
    ):
        self.input_layernorm = RMSNorm(params["input_layernorm"], config.norm_eps)
        self.self_attn = Attention(config, params["self_attn"], layer, max_model_len, axis)
        self.post_attention_layernorm = RMSNorm(params["post_attention_layernorm"], config.norm_eps)
        has_experts = config.experts is not None and layer in config.experts.layers
        self.mlp = MoE(config, params["mlp"], axis) if has_experts else MLP(config, params["mlp"], axis)

    def __call__(self, x: Residual, inputs: LayerInputs, cache: LayerCache) -> tuple[Residual, LayerCache]:
        total, y = x.normed(self.input_layernorm, inputs.step)
        y, cache = self.self_attn(y, inputs, cache)
        total, y = Residual(total, y).normed(self.post_attention_layernorm, inputs.step)
        return Residual(total, self.mlp(y, inputs)), cache

    def weights(self, kernel: WholeLayer, following: "Layer") -> Any:
        """What `kernel` reads of this layer and the next; None for options that it does not have."""
        own, mlp = self.self_attn, self.mlp
        others = own.window is not None or own.sinks is not None
        if others or not isinstance(mlp, MLP) or mlp.activation != "silu":
            return None
        products = own.o_proj, mlp.gate_up.fused, mlp.down_proj, following.self_attn.qkv.fused
        if any(product is None or product.kernel is None or product.bias is not None for product in products):
            return None
        o, gate_up, down, qkv = (product.kernel[...] for product in products if product and product.kernel)
        scales = (norm.scale[...] for norm in (own.q_norm, own.k_norm) if norm is not None)
        norms = self.post_attention_layernorm.scale[...], following.input_layernorm.scale[...]
        return kernel.weights(o, norms[0], gate_up, down, norms[1], qkv, *scales)


@partial(jax.jit, static_argnums=0)
def run_layer(
    graph: nnx.GraphDef, state: nnx.State, x: Residual, inputs: LayerInputs, cache: LayerCache
) -> tuple[Residual, LayerCache]:
    """One layer. Under jit, because layers that differ only in their arrays are then traced once; XLA inlines it."""
    return nnx.merge(graph, state)(x, inputs, cache)


class Model(nnx.Module):
    """Token ids -> hidden states -> logits, in three parts that the runner composes.

    `axis`: the mesh axis over which the heads, the MLP and the vocabulary are split; `config` is then a device's share.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], max_model_len: int, axis: Axis | None = None):
        self.vocab_size, self.axis = config.vocab_size, axis
        self.embed_tokens = Embedding(params["embed_tokens"], axis)
        self.layers = nnx.List(
            [Layer(config, params["layers"][str(i)], i, max_model_len, axis) for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(params["norm"], config.norm_eps)
        self.lm_head = Linear(params["lm_head"]) if "lm_head" in params else None

    def embed(self, tokens: jax.Array, positions: jax.Array, partial: bool = False) -> jax.Array:
        """tokens int32 [T], positions int32 [T] -> [T, hidden]; `partial`: this device's part, as `run_layers` wants it
        with peers.
        """
        return self.embed_tokens(tokens, partial)

    def run_layers(self, x: jax.Array, inputs: AttentionInputs, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """x [T, hidden] -> the same shape, and the cache with these tokens in it."""
        if (kernel := whole_layer(inputs.implementation)) and (found := self._run_whole(kernel, x, inputs, cache)):
            return found
        nothing = jnp.zeros_like(x)
        layers, residual = [], Residual(x, nothing) if inputs.peers is None else Residual(nothing, x)
        for i, layer in enumerate(self.layers):
            residual, written = run_layer(*nnx.split(layer), residual, inputs.for_layer(i), cache.layer(i))
            layers.append(written)
        # With peers the next norm is not wanted here, but the sum that comes with it.
        total = added(*residual) if inputs.peers is None else residual.normed(self.norm, inputs)[0]
        return total, KVCache(tuple(layer.k for layer in layers), tuple(layer.v for layer in layers))

    def _run_whole(
        self, kernel: WholeLayer, x: jax.Array, inputs: AttentionInputs, cache: KVCache
    ) -> tuple[jax.Array, KVCache] | None:
        """`run_layers` with one kernel for each layer; None where it does not take the step or one of the layers."""
        rows = len(x)
        # Devices that split layers have their sums between its parts; layers of several cache groups have windows.
        if inputs.block_row is not None or rows > kernel.rows or self.axis is not None or len(inputs.page) > 1:
            return None
        # The last one's next q, k and v are nobody's, and the kernel the same.
        each = [layer.weights(kernel, self.layers[(i + 1) % len(self.layers)]) for i, layer in enumerate(self.layers)]
        if any(weights is None for weights in each):
            return None
        first = self.layers[0].self_attn
        qkv = first.qkv.joined(self.layers[0].input_layernorm(x)).reshape(rows, -1, first.head_dim)
        cos, sin = first.angles(inputs)
        options = [{"eps": self.norm.eps, "scale": layer.self_attn.scale} for layer in self.layers]

        def padded(array: jax.Array) -> jax.Array:
            return jnp.pad(array, [(0, kernel.rows - rows), *[(0, 0)] * (array.ndim - 1)])

        qkv, stream = padded(qkv), padded(x.astype(jnp.float32))
        if 2 * cos.shape[1] != first.head_dim or not all(
            kernel.supports(qkv, stream, pool, weights, **how) for pool, weights, how in zip(cache.k, each, options)
        ):
            return None
        step = [padded(a) for a in (inputs.tables[0], inputs.lengths, inputs.page[0], inputs.offset, cos, sin)]
        counters, pools = jnp.zeros(kernel.counters, jnp.int32), []
        for i, (weights, how) in enumerate(zip(each, options)):
            qkv, stream, *pool, counters = kernel.run(qkv, stream, *cache.layer(i), weights, *step, counters, **how)
            pools.append(pool)
        return stream[:rows].astype(x.dtype), KVCache(*map(tuple, zip(*pools)))

    @jax.named_scope("head")
    def head(self, x: jax.Array, share: bool = False) -> jax.Array:
        """x [rows, hidden] -> logits float32 [rows, vocab]; `share`: this device's only, with -inf for padding."""
        x = self.norm(x)
        if self.lm_head is not None:
            logits = self.lm_head.logits(x)
        else:
            table = self.embed_tokens.embedding[...]
            logits = jnp.dot(x, table.T, precision=precision(x.dtype), preferred_element_type=jnp.float32)
        if self.axis is None:
            return logits
        if not share:
            return gather(logits, self.axis)[:, : self.vocab_size]
        return jnp.where(share_ids(logits.shape[1], self.axis) < self.vocab_size, logits, -jnp.inf)
