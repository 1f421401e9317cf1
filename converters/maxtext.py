"""MaxText's parameters (https://github.com/AI-Hypercomputer/maxtext), as its Orbax checkpoints name them.

Names, shapes and scaling: src/maxtext/checkpoint_conversion/utils/param_mapping.py (what it writes for HuggingFace) and
src/maxtext/layers/attentions.py (what it computes). Norms are plain scales in the families that are served.
"""

import re
from collections.abc import Mapping
from typing import Any

from converters.axes import Merged

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING = "token_embedder.embedding"
# Their decoders multiply q by head_dim**-0.5 in each step; the others are trained, and stored, with it in q's kernel.
UNSCALED = ("qwen2", "qwen3")


def rules(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pattern of names -> ParamRule's arguments, for a model of ModelConfig's arguments.

    With `scan_layers` (the default) the layers are stacked on axis 1 (`param_scan_axis`) below `decoder.layers`,
    otherwise they are `decoder.layers_0` and so on.

    RoPE of Llama 3.1 (LLaMARotaryEmbedding, the only one there with llama3's scaling) turns neighbours; the others turn
    halves of a head, as transformers does.
    """
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads, layers = config["num_heads"], config["num_kv_heads"], config["num_layers"]
    turned = {"interleaved": config["rope"]["type"] == "llama3"}
    scaled = {} if config["model_type"] in UNSCALED else {"factor": width**0.5}
    # Name in a layer -> canonical name in a layer, MaxText's shape, the canonical shape, how else they differ.
    parts: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        "pre_self_attention_layer_norm.scale": ("input_layernorm.scale", (hidden,), (hidden,), {}),
        "post_self_attention_layer_norm.scale": ("post_attention_layernorm.scale", (hidden,), (hidden,), {}),
        "self_attention.query_norm.scale": ("self_attn.q_norm.scale", (width,), (width,), {}),
        "self_attention.key_norm.scale": ("self_attn.k_norm.scale", (width,), (width,), {}),
        "self_attention.out.kernel": (
            "self_attn.o_proj.kernel", (heads, width, hidden), (heads * width, hidden), {},
        ),
        "mlp.wi_0.kernel": ("mlp.gate_proj.kernel", (hidden, inner), (hidden, inner), {}),
        "mlp.wi_1.kernel": ("mlp.up_proj.kernel", (hidden, inner), (hidden, inner), {}),
        "mlp.wo.kernel": ("mlp.down_proj.kernel", (inner, hidden), (inner, hidden), {}),
    }  # fmt: skip
    for name, path, count, how in (
        ("query", "q_proj", heads, turned | scaled),
        ("key", "k_proj", kv_heads, turned),
        ("value", "v_proj", kv_heads, {}),
    ):
        for kind, before in (("kernel", (hidden,)), ("bias", ())):
            parts[f"self_attention.{name}.{kind}"] = (
                f"self_attn.{path}.{kind}", (*before, count, width), (*before, count * width), how,
            )  # fmt: skip
    table: dict[str, dict[str, Any]] = {
        re.escape(EMBEDDING): {"to": "embed_tokens.embedding"},
        r"decoder\.decoder_norm\.scale": {"to": "norm.scale"},
        r"decoder\.logits_dense\.kernel": {"to": "lm_head.kernel"},
    }
    for name, (path, source, target, how) in parts.items():
        same = source == target  # the array itself, no copy of it
        table[rf"decoder\.layers_(\d+)\.{re.escape(name)}"] = {
            "to": rf"layers.\1.{path}",
            "hook": None if same else Merged(source, target, **how),
        }
        table[rf"decoder\.layers\.{re.escape(name)}"] = {
            "to": tuple(f"layers.{i}.{path}" for i in range(layers)),
            "hook": Merged(source, target, layers, **how),
        }
    return table
