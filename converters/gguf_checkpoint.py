"""A GGUF file as if it were a HuggingFace checkpoint: config, tensor names, shapes and layouts.

    checkpoint = open_gguf("model.gguf")
    checkpoint.hf_config["model_type"]                             # llama, qwen2 or qwen3
    checkpoint.read("model.layers.0.self_attn.q_proj.weight")      # float32 [out, in]

What transformers ignores in a GGUF file is honoured here (rope scaling, `rope_freqs.weight`), or refused by name.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converters import ConversionError, gguf_tokenizer
from converters.gguf_reader import GgufFile, require

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"
# Metadata under the architecture's name that the config is made of ...
_HANDLED = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "attention.sliding_window",
}  # fmt: skip
# ... that changes nothing while it has this value ...
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "logit_scale": 1.0,
    "embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": 0.0, "rope.scaling.attn_factor": 1.0,
    "pooling_type": 0, "use_parallel_residual": False,
}  # fmt: skip
_IRRELEVANT = {"rope.scaling.finetuned", "tensor_data_layout"}  # ... and that never does


def open_gguf(path: Path | str) -> "GgufCheckpoint":
    """Opens a file and reads its metadata. Raises ConversionError, which names the file and the fault."""
    return GgufCheckpoint(GgufFile(path))


class GgufCheckpoint:
    """`hf_config`, `generation_config`, `tokenizer_json` and `tokenizer_config` are made when first asked for."""

    def __init__(self, file: GgufFile):
        self.path, self._file = file.path, file
        known = ", ".join(_ARCHITECTURES)
        require(file, "general.type", lambda v: v == "model", "model", "model")
        merge = "1: join the parts first (llama-gguf-split --merge)"
        require(file, "split.count", lambda v: v in (0, 1), merge, 1)
        self._arch = require(file, "general.architecture", lambda v: v in _ARCHITECTURES, f"one of {known}")

    # -- config

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """The contents of a config.json."""
        self._refuse_unknown()
        self._file.check_tensors()
        shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        for name in ("token_embd.weight", "output_norm.weight"):
            if name not in shapes:
                raise ConversionError(f"{self.path}: there is no tensor {name}")
        rows, words = shapes["token_embd.weight"][0], len(self._file.metadata.get("tokenizer.ggml.tokens", ()))
        if words > rows:
            raise ConversionError(f"{self.path}: {words} tokens, but token_embd.weight has {rows} rows")
        hidden, heads = self._integer("embedding_length"), self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, head_dim) != head_dim:
                raise self._fault(key, f"{head_dim}, the size of a head")
        window, context = self._integer("attention.sliding_window", 0), self._integer("context_length")
        if 0 < window < context:
            raise self._fault("attention.sliding_window", "0 or absent: which layers have it is not in the file")
        ids = {name: i for name, i in self.generation_config.items() if name != "eos_token_id"}
        config = {
            "architectures": [_ARCHITECTURES[self._arch]],
            "model_type": self._arch,
            "vocab_size": rows,
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(head_dim, context),
            "tie_word_embeddings": "output.weight" not in shapes,
            "dtype": "float32",
            "eos_token_id": self.generation_config["eos_token_id"],
            **ids,
        }
        if self._arch == "qwen2":
            if head_dim != hidden // heads:  # its config has no head_dim in older readers
                raise self._fault("attention.key_length", f"{hidden // heads}, embedding_length / head_count")
            config["use_sliding_window"] = False
        else:
            config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        if self._arch == "llama":
            config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
        return config

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """`bos_token_id`, `pad_token_id`, and in `eos_token_id` every id that ends an answer: end of sequence, of turn,
        of message."""
        names = ("bos", "padding", "eos", "eot", "eom")
        found = {name: self._file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
        ends = [found[name] for name in ("eos", "eot", "eom") if found[name] is not None]
        named = {"bos_token_id": found["bos"], "pad_token_id": found["padding"]}
        return {name: i for name, i in named.items() if i is not None} | {"eos_token_id": list(dict.fromkeys(ends))}

    def _rope(self, head_dim: int, context: int) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self._number("rope.freq_base", 10_000.0)}
        kind = self._file.metadata.get(f"{self._arch}.rope.scaling.type", "linear")  # a factor alone is linear
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        if kind == "linear" and factor not in (0, 1):
            rope |= {"rope_type": "linear", "factor": factor}
        elif kind == "yarn":
            original = self._integer("rope.scaling.original_context_length", context)
            rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        elif kind not in ("none", "linear"):
            raise self._fault("rope.scaling.type", "none, linear or yarn")
        if _ROPE_FREQS not in self._file.tensors:
            return rope
        factors = self._file.read(_ROPE_FREQS)
        if factors.shape != (head_dim // 2,):
            raise ConversionError(f"{self.path}: {_ROPE_FREQS} has shape {factors.shape}, not ({head_dim // 2},)")
        if (factors == 1).all():
            return rope
        if rope["rope_type"] != "default":
            raise ConversionError(f"{self.path}: {_ROPE_FREQS} and rope.scaling.type={kind!r} together")
        # Llama 3's scaling, each frequency divided by its factor: longrope without its attention factor, at any length.
        each = factors.tolist()
        return rope | {"rope_type": "longrope", "short_factor": each, "long_factor": each, "factor": 1.0,
                       "attention_factor": 1.0, "original_max_position_embeddings": context}  # fmt: skip

    def _refuse_unknown(self) -> None:
        prefix = self._arch + "."
        for key, value in self._file.metadata.items():
            short = key.removeprefix(prefix)
            if short == key or short in _HANDLED | _IRRELEVANT:
                continue
            if short not in _NEUTRAL:
                raise ConversionError(f"{self.path}: metadata {key}={value!r} is not supported")
            if value != _NEUTRAL[short]:
                raise self._fault(short, f"{_NEUTRAL[short]} or absent")

    def _fault(self, key: str, want: str) -> ConversionError:
        value = self._file.metadata.get(f"{self._arch}.{key}")
        return ConversionError(f"{self.path}: {self._arch}.{key}={value!r} must be {want}")

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._file.metadata.get(f"{self._arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one for each layer, all the same
        low = 0 if default == 0 else 1
        if value is None:
            raise ConversionError(f"{self.path}: metadata lack {self._arch}.{key}")
        if not isinstance(value, int) or value < low:
            raise self._fault(key, "a positive integer, the same for all layers")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        valid = lambda v: isinstance(v, int | float) and 0 <= v < float("inf")  # noqa: E731
        return float(require(self._file, f"{self._arch}.{key}", valid, "a number", default))

    # -- tokenizer

    @cached_property
    def tokenizer_json(self) -> dict[str, Any]:
        """The contents of a tokenizer.json."""
        return gguf_tokenizer.tokenizer_json(self._file)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """Named special tokens (`eos_token`) as text, and `chat_templates` by name."""
        return gguf_tokenizer.special_tokens(self._file) | {"chat_templates": gguf_tokenizer.chat_templates(self._file)}

    # -- tensors

    @cached_property
    def _sources(self) -> dict[str, str]:
        """HuggingFace's name -> the file's. Unknown tensors keep their name, so that whoever loads them can tell it."""
        return {_hf_name(name): name for name in self._file.tensors if name != _ROPE_FREQS}

    def names(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor; all are float32 once dequantized."""
        self._file.check_tensors()
        return {name: (self._file.tensors[source].shape, "float32") for name, source in self._sources.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as HuggingFace lays it out, float32; KeyError for a name that is not in `names()`."""
        source = self._sources[name]
        array = self._file.read(source)
        if self._arch == "llama" and re.search(r"\.attn_[qk]\.", source):
            heads = "num_attention_heads" if ".attn_q." in source else "num_key_value_heads"
            array = _halves(array, self.hf_config[heads])
        return array


def _hf_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        if part in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{kind}"
    return _TENSORS.get(name, name)


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, 2), llama.cpp's rotary order, to (2, pair), HuggingFace's."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
