"""Qwen3-MoE checkpoints: Qwen3 with a mixture of experts in some or all layers."""

from typing import Any

from converters import ConversionError
from converters.attributes import Attributes, positive_window, rotary_decoder
from converters.tensors import rotary_decoder_table

PREFIX = "model."
TENSORS = rotary_decoder_table(experts=("mlp", ("gate_proj", "up_proj", "down_proj")))


def model_config(a: Attributes) -> dict[str, Any]:
    bias = a.take("attention_bias", bool, False)
    config = rotary_decoder(a, kv_heads=4, positions=32_768)
    used = a.take("use_sliding_window", bool, False)
    window = positive_window(a.take("sliding_window", (int, type(None)), 4096))
    a.take("max_window_layers", int, 0)  # a window that is used is on every layer, whatever this says
    return config | {
        "qk_norm": True, "qkv_bias": bias, "o_bias": bias,
        "windows": (window if used else None,) * config["num_layers"],
        "experts": _experts(a, config["num_layers"]),
    }  # fmt: skip


def _experts(a: Attributes, num_layers: int) -> dict[str, Any] | None:
    step, dense = a.take("decoder_sparse_step", int, 1), a.take("mlp_only_layers", (list, type(None)), None) or []
    if step < 1 or any(type(i) is not int for i in dense):
        raise ConversionError(
            f"decoder_sparse_step={step} must be positive, mlp_only_layers={dense!r} a list of layers"
        )
    experts = {
        "count": a.take("num_experts num_local_experts", int, 128),
        "per_token": a.take("num_experts_per_tok", int, 8),
        "intermediate_size": a.take("moe_intermediate_size", int, 768),
        "normalize": a.take("norm_topk_prob", bool, False),
        "layers": tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0),
    }
    return experts if experts["count"] and experts["layers"] else None
