"""Mistral checkpoints: Llama with a window on every layer."""

from typing import Any

from converters.attributes import Attributes, positive_window, rotary_decoder
from converters.tensors import rotary_decoder_table

PREFIX = "model."
TENSORS = rotary_decoder_table()


def model_config(a: Attributes) -> dict[str, Any]:
    window = positive_window(a.take("sliding_window", (int, type(None)), 4096))
    config = rotary_decoder(a, kv_heads=8, positions=131_072, bos=1, eos=2)
    return config | {"windows": (window,) * config["num_layers"]}
