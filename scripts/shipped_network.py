"""The network of the shipped model, a small Qwen3, as a Flax NNX module for training; its HuggingFace format.

Attributes carry HuggingFace's names, so that a parameter's path is its name in the checkpoint. `config` says all that a
reader of the checkpoint needs to know.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.flax import load_file, save_file

Implementation = Literal["cudnn", "xla"]  # of attention
Params = Mapping[str, jax.Array]  # by path, `layers.0.mlp.up_proj.kernel`


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def config(self, end_of_text: int) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "bfloat16",
            "eos_token_id": end_of_text,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


Linear = partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.float32)
Norm = partial(nnx.RMSNorm, dtype=jnp.bfloat16, param_dtype=jnp.float32)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes 1/256ths of the entries, as near to `rate` as that comes; nothing without a key."""
    threshold = round(rate * 256)
    if key is None or threshold == 0:
        return x
    kept = jax.random.bits(key, x.shape, jnp.uint8) >= threshold
    return jnp.where(kept, x * (256 / (256 - threshold)), 0).astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding of [batch, position, head, width]: the halves of a head are the two coordinates."""
    width = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, shape: Shape, implementation: Implementation, rngs: nnx.Rngs):
        hidden, self.width, self.theta = shape.hidden_size, shape.head_dim, shape.rope_theta
        self.implementation = implementation
        self.q_proj = Linear(hidden, shape.heads * self.width, rngs=rngs)
        self.k_proj = Linear(hidden, shape.kv_heads * self.width, rngs=rngs)
        self.v_proj = Linear(hidden, shape.kv_heads * self.width, rngs=rngs)
        self.o_proj = Linear(shape.heads * self.width, hidden, rngs=rngs, kernel_init=_small(shape))
        self.q_norm = Norm(self.width, epsilon=shape.eps, rngs=rngs)
        self.k_norm = Norm(self.width, epsilon=shape.eps, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.width) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), self.theta), rotate(self.k_norm(k), self.theta)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.implementation)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, rngs=rngs)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, rngs=rngs)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, rngs=rngs, kernel_init=_small(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, shape: Shape, implementation: Implementation, rngs: nnx.Rngs):
        self.input_layernorm = Norm(shape.hidden_size, epsilon=shape.eps, rngs=rngs)
        self.self_attn = Attention(shape, implementation, rngs)
        self.post_attention_layernorm = Norm(shape.hidden_size, epsilon=shape.eps, rngs=rngs)
        self.mlp = MLP(shape, rngs)


class Network(nnx.Module):
    """Token ids [batch, position] to hidden states; `logits` of these."""

    def __init__(self, shape: Shape, implementation: Implementation, dropout_rate: float, rngs: nnx.Rngs):
        self.dropout_rate = dropout_rate
        self.embed_tokens = nnx.Embed(
            shape.vocab_size,
            shape.hidden_size,
            dtype=jnp.bfloat16,
            param_dtype=jnp.float32,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Layer(shape, implementation, rngs) for _ in range(shape.layers)])
        self.norm = Norm(shape.hidden_size, epsilon=shape.eps, rngs=rngs)

    def __call__(self, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = [None] * (2 * len(self.layers) + 1) if key is None else jax.random.split(key, 2 * len(self.layers) + 1)
        x = dropout(self.embed_tokens(tokens), self.dropout_rate, keys[-1])
        for i, layer in enumerate(self.layers):
            x += dropout(layer.self_attn(layer.input_layernorm(x)), self.dropout_rate, keys[2 * i])
            x += dropout(layer.mlp(layer.post_attention_layernorm(x)), self.dropout_rate, keys[2 * i + 1])
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        embedding = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def _small(shape: Shape) -> Any:
    """Every sublayer adds to the residual stream: the more of them, the smaller each."""
    return nnx.initializers.variance_scaling(1 / (2 * shape.layers), "fan_in", "normal")


class Model:
    """The network as functions of its parameters, which are a flat dict by path."""

    def __init__(self, shape: Shape, implementation: Implementation, dropout_rate: float, seed: int):
        self.shape = shape
        self._graph, state = nnx.split(Network(shape, implementation, dropout_rate, nnx.Rngs(seed)))
        paths, self._tree = jax.tree_util.tree_flatten_with_path(state)
        self._names = [
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in paths
        ]
        self.initial: Params = {name: leaf for name, (_, leaf) in zip(self._names, paths)}

    def network(self, params: Params) -> Network:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, [params[name] for name in self._names]))

    def save(self, params: Params, path: Path) -> None:
        """As HuggingFace's bfloat16 checkpoint: their names, [out, in]."""
        tensors = {_their_name(name): _turned(name, leaf).astype(jnp.bfloat16) for name, leaf in params.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable to its owner only

    def load(self, path: Path) -> Params:
        """The parameters of such a checkpoint, in float32."""
        tensors = load_file(path)
        return {name: _turned(name, tensors[_their_name(name)]).astype(jnp.float32) for name in self._names}


def _turned(name: str, leaf: jax.Array) -> jax.Array:
    return leaf.T if name.endswith(".kernel") else leaf


def _their_name(name: str) -> str:
    return f"model.{name.rsplit('.', 1)[0]}.weight"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
