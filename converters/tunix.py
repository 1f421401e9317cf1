"""Tunix's parameters (https://github.com/google/tunix), as in the item `model_params` of its checkpoints.

Names and shapes: tunix/models/{llama3,qwen2,qwen3}/params.py, which read HuggingFace's; the item:
tunix/sft/checkpoint_manager.py. RoPE turns halves of a head there, as transformers does.
"""

import re
from collections.abc import Mapping
from typing import Any

from converters.axes import Merged

FAMILIES = ("llama", "qwen2", "qwen3")
EMBEDDING = "embedder.input_embedding"


def rules(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Pattern of names -> ParamRule's arguments, for a model of ModelConfig's arguments."""
    hidden, width, heads, kv_heads = (config[k] for k in ("hidden_size", "head_dim", "num_heads", "num_kv_heads"))
    table: dict[str, dict[str, Any]] = {
        re.escape(EMBEDDING): {"to": "embed_tokens.embedding"},
        r"final_norm\.w": {"to": "norm.scale"},
        r"lm_head\.w": {"to": "lm_head.kernel"},
        r"layers\.(\d+)\.(input|post_attention)_layernorm\.w": {"to": r"layers.\1.\2_layernorm.scale"},
        r"layers\.(\d+)\.attn\.([qk])_norm\.w": {"to": r"layers.\1.self_attn.\2_norm.scale"},
        r"layers\.(\d+)\.attn\.([qkv])_bias": {"to": r"layers.\1.self_attn.\2_proj.bias"},
        r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.kernel": {"to": r"layers.\1.mlp.\2_proj.kernel"},
        r"layers\.(\d+)\.attn\.o_proj\.w": {
            "to": r"layers.\1.self_attn.o_proj.kernel",
            "hook": Merged((heads, width, hidden), (heads * width, hidden)),
        },
    }
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        table[rf"layers\.(\d+)\.attn\.{part}_proj\.w"] = {
            "to": rf"layers.\1.self_attn.{part}_proj.kernel",
            "hook": Merged((hidden, count, width), (hidden, count * width)),
        }
    return table
