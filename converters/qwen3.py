"""Qwen3 checkpoints: Llama with norms on q and k, heads of any width, and windows as in Qwen2."""

from typing import Any

from converters.attributes import Attributes, rotary_decoder, windows
from converters.tensors import rotary_decoder_table

PREFIX = "model."
TENSORS = rotary_decoder_table()


def model_config(a: Attributes) -> dict[str, Any]:
    bias = a.take("attention_bias", bool, False)
    config = rotary_decoder(a, kv_heads=32, head_dim=128, positions=32_768)
    return config | {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "windows": windows(a, config["num_layers"])}
