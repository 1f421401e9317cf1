"""Mixtral checkpoints: Mistral with a mixture of experts in each layer."""

from typing import Any

from converters.attributes import Attributes, positive_window, rotary_decoder
from converters.tensors import rotary_decoder_table

PREFIX = "model."
TENSORS = rotary_decoder_table(experts=("block_sparse_moe", ("w1", "w3", "w2")))


def model_config(a: Attributes) -> dict[str, Any]:
    window = positive_window(a.take("sliding_window", (int, type(None)), None))
    config = rotary_decoder(a, kv_heads=8, positions=131_072, bos=1, eos=2, theta=1e6, eps=1e-5)
    layers = config["num_layers"]
    experts = {
        "count": a.take("num_local_experts num_experts", int, 8),
        "per_token": a.take("num_experts_per_tok", int, 2),
        "intermediate_size": config["intermediate_size"],
        "normalize": True,
        "layers": tuple(range(layers)),
    }
    return config | {"windows": (window,) * layers, "experts": experts}
