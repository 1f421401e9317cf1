"""gpt-oss checkpoints: attention sinks, windows in every other layer, experts with biases, in bfloat16 or MXFP4."""

from typing import Any

from converters import UnsupportedOptionError
from converters.attributes import Attributes, positive_window, rotary_decoder, windows_by_kind
from converters.tensors import Target, rotary_decoder_table

PREFIX = "model."
_EXPERTS = "layers.{}.mlp.experts"
_GATE_UP = f"{_EXPERTS}.gate_proj", f"{_EXPERTS}.up_proj"
TENSORS = rotary_decoder_table() | {
    "layers.{}.self_attn.sinks": Target(("layers.{}.self_attn.sinks",)),
    "layers.{}.mlp.router.weight": Target(("layers.{}.mlp.gate.kernel",), True),
    "layers.{}.mlp.router.bias": Target(("layers.{}.mlp.gate.bias",)),
    f"{_EXPERTS}.gate_up_proj": Target(tuple(f"{path}.kernel" for path in _GATE_UP), interleaved=True),
    f"{_EXPERTS}.gate_up_proj_bias": Target(tuple(f"{path}.bias" for path in _GATE_UP), interleaved=True),
    f"{_EXPERTS}.down_proj": Target((f"{_EXPERTS}.down_proj.kernel",)),
    f"{_EXPERTS}.down_proj_bias": Target((f"{_EXPERTS}.down_proj.bias",)),
}
ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip


def model_config(a: Attributes) -> dict[str, Any]:
    _check_quantization(a)
    window = positive_window(a.take("sliding_window", (int, type(None)), 128))
    kinds, bias = a.take("layer_types", (list, type(None)), None), a.take("attention_bias", bool, True)
    a.take("initial_context_length", int, None)  # transformers reads rope's own
    config = rotary_decoder(
        a, kv_heads=8, head_dim=64, positions=131_072, theta=150_000.0, eps=1e-5, rope_parameters=ROPE
    )
    if config["activation"] != "silu":
        raise UnsupportedOptionError(f"not supported: hidden_act={config['activation']!r}; gpt_oss has its own SwiGLU")
    layers = config["num_layers"]
    kinds = kinds or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    swiglu = a.take("swiglu_alpha", float, 1.702), a.take("swiglu_limit", float, 7.0)
    experts = {
        "count": a.take("num_local_experts num_experts", int, 128),
        "per_token": a.take("num_experts_per_tok experts_per_token", int, 4),
        "intermediate_size": config["intermediate_size"],
        "normalize": True,
        "layers": tuple(range(layers)),
        "bias": True,
        "swiglu": swiglu,
    }
    return config | {
        "qkv_bias": bias, "o_bias": bias, "sinks": True, "windows": windows_by_kind(kinds, window, layers),
        "experts": experts,
    }  # fmt: skip


def _check_quantization(a: Attributes) -> None:
    """Which tensors are quantized the file's names say: see `mxfp4`."""
    found = a.take("quantization_config", (dict, type(None)), None)
    if found is None:
        return
    others = set(found) - {"quant_method", "modules_to_not_convert", "dequantize"}
    if found.get("quant_method") != "mxfp4" or others:
        raise UnsupportedOptionError(f"not supported: quantization_config={found!r}; MXFP4 is, as its makers write it")
