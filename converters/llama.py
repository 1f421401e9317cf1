"""Llama checkpoints."""

from typing import Any

from converters.attributes import Attributes, rotary_decoder
from converters.tensors import rotary_decoder_table

PREFIX = "model."
TENSORS = rotary_decoder_table()


def model_config(a: Attributes) -> dict[str, Any]:
    bias = a.take("attention_bias", bool, False)
    biases = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": a.take("mlp_bias", bool, False)}
    return rotary_decoder(a, positions=2048, bos=1, eos=2) | biases
