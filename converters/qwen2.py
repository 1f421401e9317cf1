"""Qwen2 checkpoints: Llama with biases on q, k and v, and windows on the later layers if asked for."""

from typing import Any

from converters.attributes import Attributes, rotary_decoder, windows
from converters.tensors import rotary_decoder_table

PREFIX = "model."
TENSORS = rotary_decoder_table()


def model_config(a: Attributes) -> dict[str, Any]:
    config = rotary_decoder(a, kv_heads=32, positions=32_768)
    return config | {"qkv_bias": True, "windows": windows(a, config["num_layers"])}
