"""GPT-2 (also DialoGPT): learned positions, LayerNorm with bias, a plain MLP, a tied head. Radford et al. 2019."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxengine.config import ModelConfig
from jaxengine.kv_cache import LayerCache
from jaxengine.layers.activation import ACTIVATIONS
from jaxengine.layers.attention import LayerInputs, attend, write_kv
from jaxengine.layers.embedding import Embedding
from jaxengine.layers.linear import Linear, Projections
from jaxengine.layers.norm import LayerNorm
from jaxengine.models import llama
from jaxengine.sharding import Axis, ParamSpec, once


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    specs = {path: spec for path, spec in llama.param_specs(config).items() if "gate_proj" not in path}
    norms = [path for path in specs if path.endswith(".scale")]
    specs |= {path.replace(".scale", ".bias"): specs[path] for path in norms}
    position = ParamSpec((config.max_position_embeddings, config.hidden_size), ("position", "hidden"))
    return specs | {"embed_positions.embedding": position}


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, params: Mapping[str, Any], layer: int, axis: Axis | None):
        self.head_dim, self.window, self.scale = config.head_dim, config.windows[layer], config.attention_scales[layer]
        width = config.num_heads * config.head_dim
        self.qkv = Projections(params, ("q_proj", "k_proj", "v_proj"), "qkv_proj", (width, width, width))
        self.o_proj = Linear(params["o_proj"], axis)

    def __call__(self, x: jax.Array, inputs: LayerInputs, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        q, k, v = (y.reshape(len(x), -1, self.head_dim) for y in self.qkv(x))
        cache = write_kv(k, v, inputs, cache)
        y = attend(q, inputs, cache, scale=self.scale, window=self.window)
        with jax.named_scope("o_proj"):
            return self.o_proj(y.reshape(len(x), -1)), cache


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, params: Mapping[str, Any], axis: Axis | None):
        self.up_proj, self.down_proj = Linear(params["up_proj"]), Linear(params["down_proj"], axis)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope("up_proj"):
            y = ACTIVATIONS[self.activation](self.up_proj(x))
        with jax.named_scope("down_proj"):
            return self.down_proj(y)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, params: Mapping[str, Any], layer: int, axis: Axis | None):
        self.input_layernorm = LayerNorm(params["input_layernorm"], config.norm_eps)
        self.self_attn = Attention(config, params["self_attn"], layer, axis)
        self.post_attention_layernorm = LayerNorm(params["post_attention_layernorm"], config.norm_eps)
        self.mlp = MLP(config, params["mlp"], axis)

    def __call__(self, x: llama.Residual, inputs: LayerInputs, cache: LayerCache) -> tuple[llama.Residual, LayerCache]:
        total = x.x + x.y
        y, cache = self.self_attn(self.input_layernorm(total), inputs, cache)
        total = total + y
        return llama.Residual(total, self.mlp(self.post_attention_layernorm(total))), cache


class Model(llama.Model):
    def __init__(self, config: ModelConfig, params: Mapping[str, Any], max_model_len: int, axis: Axis | None = None):
        self.vocab_size, self.axis = config.vocab_size, axis
        self.embed_tokens = Embedding(params["embed_tokens"], axis)
        self.embed_positions = Embedding(params["embed_positions"])
        self.layers = nnx.List([Layer(config, params["layers"][str(i)], i, axis) for i in range(config.num_layers)])
        self.norm = LayerNorm(params["norm"], config.norm_eps)
        self.lm_head = Linear(params["lm_head"]) if "lm_head" in params else None

    def embed(self, tokens: jax.Array, positions: jax.Array, partial: bool = False) -> jax.Array:
        place = self.embed_positions(positions)
        return self.embed_tokens(tokens, partial) + (once(place, self.axis) if partial else place)
