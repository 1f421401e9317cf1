"""Tiny random models as whole HuggingFace folders, and engines of them that all tests of a process share."""

import json
import tempfile
from functools import cache
from pathlib import Path

from jaxengine import LLM
from tests.references import tiny
from tests.vocabularies import byte_level

VOCAB, MAX_LENGTH, WINDOW, EOS = 600, 256, 20, 2
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH, "bos_token_id": 1, "eos_token_id": EOS,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]},
    # One full layer and two of a window: two groups of pages.
    "windows": SIZES | {"model_type": "qwen2", "num_hidden_layers": 3, "architectures": ["Qwen2ForCausalLM"],
                        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                        "sliding_window": WINDOW, "use_sliding_window": True},
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Small buckets: 4 of rows and 2 of tokens. Prompts of more than 32 tokens come in chunks.
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 8}


def tensors(kind="llama"):
    config = CONFIGS[kind]
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * 16
    shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (VOCAB, hidden)}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        parts = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
                 "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (kv, hidden),
                 "self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, hidden),
                 "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
                 "mlp.down_proj.weight": (hidden, inner)}  # fmt: skip
        if config["model_type"] == "qwen2":
            parts |= {"self_attn.q_proj.bias": (hidden,), "self_attn.k_proj.bias": (kv,),
                      "self_attn.v_proj.bias": (kv,)}  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    return {name: tiny.tensor(name, shape) for name, shape in shapes.items()}


def write_model(folder, kind="llama", **generation_config):
    """config.json, weights, tokenizer and chat template, as HuggingFace writes them; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    tiny.write_safetensors(tensors(kind), folder)
    tokenizer = byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.id_to_token(i) for i in (1, EOS))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "bos_token": bos,
        "eos_token": eos,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words | {"eos_token": eos}))
    if generation_config:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


@cache
def model_folder(kind="llama"):
    return write_model(Path(_temporary().name) / kind, kind)


@cache
def _temporary():
    return tempfile.TemporaryDirectory(prefix="jaxengine-tests-", ignore_cleanup_errors=True)


@cache
def shared_llm(kind="llama", **options):
    """The engine of these options; it lives until the process ends. Only for tests that leave it as it was."""
    return LLM(model_folder(kind), **(OPTIONS | options))
