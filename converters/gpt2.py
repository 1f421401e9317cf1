"""GPT-2 checkpoints (also DialoGPT): kernels stored `[in, out]`, q, k and v in one tensor."""

from typing import Any

from converters import ConversionError
from converters.attributes import Attributes, activation, common
from converters.tensors import IGNORED, Target

PREFIX = "transformer."
_QKV = tuple(f"layers.{{}}.self_attn.{part}_proj" for part in "qkv")
_LINEAR = {"attn.c_attn": _QKV, "attn.c_proj": ("layers.{}.self_attn.o_proj",), "mlp.c_fc": ("layers.{}.mlp.up_proj",),
           "mlp.c_proj": ("layers.{}.mlp.down_proj",)}  # fmt: skip
_NORMS = {"ln_f": "norm", "h.{}.ln_1": "layers.{}.input_layernorm", "h.{}.ln_2": "layers.{}.post_attention_layernorm"}
TENSORS = {
    "wte.weight": Target(("embed_tokens.embedding",)),
    "wpe.weight": Target(("embed_positions.embedding",)),
    "lm_head.weight": Target(("lm_head.kernel",), True),
    "h.{}.attn.bias": IGNORED,  # the causal mask
    "h.{}.attn.masked_bias": IGNORED,
}
for _name, _paths in _LINEAR.items():
    TENSORS[f"h.{{}}.{_name}.weight"] = Target(tuple(f"{path}.kernel" for path in _paths))
    TENSORS[f"h.{{}}.{_name}.bias"] = Target(tuple(f"{path}.bias" for path in _paths))
for _name, _path in _NORMS.items():
    TENSORS[f"{_name}.weight"] = Target((f"{_path}.scale",))
    TENSORS[f"{_name}.bias"] = Target((f"{_path}.bias",))


def model_config(a: Attributes) -> dict[str, Any]:
    hidden, heads = a.take("n_embd hidden_size", int), a.take("n_head num_attention_heads", int)
    layers = a.take("n_layer num_hidden_layers", int)
    if heads < 1 or hidden % heads:
        raise ConversionError(f"n_embd={hidden} is not a multiple of n_head={heads}")
    scale = (hidden // heads) ** -0.5 if a.take("scale_attn_weights", bool, True) else 1.0
    by_layer = a.take("scale_attn_by_inverse_layer_idx", bool, False)
    return common(a, 50_256, 50_256) | {
        "hidden_size": hidden,
        "intermediate_size": a.take("n_inner", int, None) or 4 * hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": a.take("n_positions max_position_embeddings", int),
        "activation": activation(a.take("activation_function", str, "gelu_new")),
        "norm_eps": a.take("layer_norm_epsilon", float, 1e-5),
        "tie_word_embeddings": a.take("tie_word_embeddings", bool, True),
        "attention_scales": tuple(scale / (i + 1 if by_layer else 1) for i in range(layers)),
        "windows": (None,) * layers,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    }
