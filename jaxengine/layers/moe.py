"""A mixture of experts: a router chooses some for each token, whose products are added by weight.

Shazeer et al. 2017; softmax before the choice, as in Fedus et al. 2021 and transformers' Mixtral and Qwen3-MoE. The
softmax of the chosen only, as gpt_oss has it, is the same divided by its sum.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.config import ModelConfig
from jaxengine.layers.activation import ACTIVATIONS, clamped_swiglu
from jaxengine.layers.attention import LayerInputs
from jaxengine.layers.linear import Linear
from jaxengine.layers.ops import ops
from jaxengine.sharding import EXPERT, TENSOR, Axis, once, share_ids, total


class Stacked(nnx.Module):
    """The same kernel of all experts, [experts, in, out], and bias, [experts, out], where the parameters have one."""

    def __init__(self, params: Mapping[str, jax.Array]):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None


class Experts(nnx.Module):
    """Their three products, named as canonical paths have them."""

    def __init__(self, params: Mapping[str, Any]):
        self.gate_proj, self.up_proj, self.down_proj = (
            Stacked(params[name]) for name in ("gate_proj", "up_proj", "down_proj")
        )


class MoE(nnx.Module):
    """`axis`: as for `Linear`; the experts are split over its part EXPERT, their columns over the rest."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], axis: Axis | None):
        assert config.experts is not None
        self.gate, self.experts, self.axis = Linear(params["gate"]), Experts(params["experts"]), axis
        self.per_token, self.normalize = config.experts.per_token, config.experts.normalize
        self.activation, self.swiglu = config.activation, config.experts.swiglu

    def __call__(self, x: jax.Array, inputs: LayerInputs) -> jax.Array:
        """x [tokens, hidden] -> the same shape (with peers a part of it); zeros for padding, which no expert sees."""
        weights, experts = self.route(x)
        gate, up, down = self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj
        op, count = ops(inputs.step.implementation), len(down.kernel[...])
        group = experts - share_ids(count, None if self.axis is None else EXPERT)[0]
        own = (group >= 0) & (group < count) & (inputs.page != 0)[:, None]
        # Sorted by expert: what no expert of this device wants goes to the end, where the products leave it alone.
        group = jnp.where(own, group, count).reshape(-1)
        order = jnp.argsort(group)
        sizes = jnp.sum(group[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
        sorted_x, sorted_group = x[order // self.per_token], group[order]
        activation = ACTIVATIONS[self.activation]

        def product(x: jax.Array, each: Stacked, axis: Axis | None = None) -> jax.Array:
            y = op.grouped_matmul(x, each.kernel[...], sizes)
            return y if each.bias is None else y + once(each.bias.at[sorted_group].get(mode="clip"), axis)

        if self.swiglu is None and gate.bias is None:
            inner = op.grouped_gated_matmul(sorted_x, gate.kernel[...], up.kernel[...], sizes, activation)
        else:
            parts = product(sorted_x, gate), product(sorted_x, up)
            inner = activation(parts[0]) * parts[1] if self.swiglu is None else clamped_swiglu(*parts, *self.swiglu)
        y = product(inner, down, None if self.axis is None else TENSOR)  # whose parts are summed
        place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
        y = y[place].reshape(*experts.shape, -1).astype(jnp.float32)
        y = jnp.where(own[:, :, None], weights[:, :, None] * y, 0)
        y = jnp.sum(y, axis=1).astype(x.dtype)
        return y if inputs.step.peers is not None else total(y, self.axis)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [tokens, hidden] -> weights float32 and experts int32, both [tokens, per_token]."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(self.gate.logits(x)), self.per_token)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts
