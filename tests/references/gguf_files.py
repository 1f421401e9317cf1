"""Small GGUF files of every kind that is supported, written with the `gguf` package alone.

    write_gguf(folder / "x.gguf", "qwen2")      a tiny random model with that tokenizer; returns its HuggingFace tensors

`make_gguf.py` wrote the fixtures in gguf/: vocab.json (two vocabularies of some 600 tokens), texts.json (by hand), and
what transformers makes of them in tokenizers.json and smollm2.json.
"""

import hashlib
import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FOLDER = Path(__file__).parent / "gguf"
# kind of file: its tokenizer and, where that is not clear, its architecture -> architecture
KINDS = {"gpt-2": "llama", "smollm": "llama", "llama-bpe": "llama", "sentencepiece": "llama", "qwen2": "qwen2",
         "qwen3": "qwen3"}  # fmt: skip
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, MLP = 64, 4, 2, 16, 2, 96
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@cache
def texts() -> list[str]:
    return load("texts")


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_gguf(
    path: Path,
    kind: str,
    *,
    metadata: dict[str, Any] | None = None,
    quantization: str = "F32",
    extra_tensors: dict[str, np.ndarray] | None = None,
    rows: int = 0,
    **tokenizer: Any,
) -> dict[str, np.ndarray]:
    """Writes a model of KINDS[kind]; `metadata` adds keys or replaces them, None leaves one out; `tokenizer` likewise
    under `tokenizer.ggml.`; `extra_tensors` go in as they are; `rows` of the embedding, else one for each token.
    Returns what a HuggingFace checkpoint of the model would hold (before quantization).
    """
    arch = KINDS[kind]
    vocab = vocabulary(kind)
    values = _model_metadata(arch) | vocab | {f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()} | (metadata or {})
    writer = gguf.GGUFWriter(str(path), values.pop("general.architecture", arch))
    for key, value in values.items():
        _add(writer, key, value)
    tensors = hf_tensors(arch, rows or len(values["tokenizer.ggml.tokens"] or ()))
    for name, array in tensors.items():
        stored = (
            permuted(array, HEADS if "q_proj" in name else KV_HEADS) if arch == "llama" and _rotated(name) else array
        )
        kind_of = getattr(gguf.GGMLQuantizationType, quantization if array.ndim > 1 else "F32")
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(stored, kind_of), raw_dtype=kind_of)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def vocabulary(kind: str) -> dict[str, Any]:
    """The tokenizer's metadata."""
    stored = load("vocab")["sentencepiece" if kind == "sentencepiece" else "bytes"]
    common = {"tokens": stored["tokens"], "token_type": stored["types"], **stored["ids"]}
    if kind == "sentencepiece":
        common |= {"model": "llama", "scores": [float(-i) for i in range(len(stored["tokens"]))], "add_bos_token": True}
    else:
        pre = "qwen2" if kind == "qwen3" else kind
        common |= {"model": "gpt2", "pre": pre, "merges": stored["merges"], "add_bos_token": kind == "llama-bpe"}
    return {f"tokenizer.ggml.{key}": value for key, value in common.items()} | {"tokenizer.chat_template": TEMPLATE}


def _model_metadata(arch: str) -> dict[str, Any]:
    return {
        f"{arch}.{key}": value
        for key, value in {
            "block_count": LAYERS,
            "context_length": 128,
            "embedding_length": HIDDEN,
            "feed_forward_length": MLP,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD_DIM,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5000.0,
            "rope.dimension_count": HEAD_DIM,
        }.items()
    }


def hf_tensors(arch: str, vocab_size: int) -> dict[str, np.ndarray]:
    """Tensors of a HuggingFace checkpoint, float32: qwen2 with biases, qwen3 with norms of heads and its own head."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if arch == "qwen3":
        shapes["lm_head.weight"] = (vocab_size, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for part, rows, columns in (
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN), ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN), ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp.gate_proj", MLP, HIDDEN), ("mlp.up_proj", MLP, HIDDEN), ("mlp.down_proj", HIDDEN, MLP),
        ):  # fmt: skip
            shapes[f"{layer}{part}.weight"] = (rows, columns)
            if arch == "qwen2" and part[10:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{layer}{part}.bias"] = (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (HIDDEN,)
        if arch == "qwen3":
            shapes |= {f"{layer}self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    return {name: _random(name, shape) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.uniform(-0.5, 0.5, shape).astype(np.float32) + np.float32("norm" in name)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a HuggingFace tensor, from its own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, LAYERS)
    stem, suffix = name.rsplit(".", 1)
    found = table.get_name(stem)
    assert found, name
    return f"{found}.{suffix}"


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter leaves those of llama's q and k: the halves of each head interleaved."""
    rows = np.arange(array.shape[0]).reshape(heads, 2, -1)
    return array[rows.transpose(0, 2, 1).ravel()]


def _rotated(name: str) -> bool:
    return "q_proj" in name or "k_proj" in name


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}[type(value)]  # fmt: skip
    add(key, value)
