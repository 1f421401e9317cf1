"""GGUF files: container, every quantization, config, tensor names and layouts, and what is refused."""

import hashlib
import struct

import gguf
import numpy as np
import pytest

from converters import ConversionError
from converters.gguf_checkpoint import open_gguf
from converters.gguf_reader import QUANTIZATIONS, GgufFile
from tests.references import gguf_files
from tests.references.gguf_files import write_gguf

KINDS = list(gguf_files.KINDS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


# -- tensors


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_the_huggingface_checkpoint(path, kind):
    tensors = write_gguf(path, kind)
    checkpoint = open_gguf(path)
    assert checkpoint.names() == {name: (array.shape, "float32") for name, array in tensors.items()}
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array, err_msg=name)


def test_the_order_of_llamas_rows_matters(path):
    """The file has them otherwise: reading it without undoing that would be seen."""
    tensors = write_gguf(path, "llama-bpe")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(GgufFile(path).read("blk.0.attn_q.weight"), tensors[name])


@pytest.mark.parametrize("kind", sorted(QUANTIZATIONS))
def test_dequantization(path, kind):
    """By gguf, which transformers uses, and by the formula of ggml-quants.c written out for one block."""
    rng = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    columns = max(block, 32)
    if kind.endswith("_K"):  # gguf cannot quantize to these: any bytes are a block, if their scales are finite
        raw = rng.integers(0, 256, (3, size), np.uint8)
        for at in SCALES_AT[kind]:
            raw[:, at : at + 2] = rng.uniform(-1, 1, (3, 1)).astype(np.float16).view(np.uint8)
    else:
        raw = gguf.quants.quantize(rng.normal(size=(3, columns)).astype(np.float32), quantization)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=quantization)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = GgufFile(path)
    file.check_tensors()
    values = file.read("x")
    assert values.shape == (3, columns)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, quantization))
    by_hand = [FORMULAS[kind](row.tobytes()) for row in raw.reshape(3, -1)]
    np.testing.assert_allclose(values, by_hand, rtol=1e-5, atol=1e-6)


def half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibbles(raw: bytes) -> list[int]:
    return [b & 15 for b in raw] + [b >> 4 for b in raw]


def fifth_bits(raw: bytes) -> list[int]:
    (bits,) = struct.unpack("<I", raw)
    return [(bits >> i & 1) << 4 for i in range(32)]


def scales_and_minima(raw: bytes) -> list[tuple[int, int]]:
    """Eight pairs of six bits each, from twelve bytes."""
    first = [(raw[i] & 63, raw[i + 4] & 63) for i in range(4)]
    last = [(raw[i + 8] & 15 | raw[i] >> 6 << 4, raw[i + 8] >> 4 | raw[i + 4] >> 6 << 4) for i in range(4)]
    return first + last


def q2_k(raw):
    d, dmin = half(raw, 80), half(raw, 82)
    quant = [raw[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3 for i in range(256)]
    return [d * (raw[i // 16] & 15) * quant[i] - dmin * (raw[i // 16] >> 4) for i in range(256)]


def q3_k(raw):
    d, packed = half(raw, 108), raw[96:108]
    scale = [
        (packed[i % 8] >> 4 * (i // 8) & 15 | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32 for i in range(16)
    ]
    low = [raw[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3 for i in range(256)]
    high = [raw[i % 32] >> i // 32 & 1 for i in range(256)]
    return [d * scale[i // 16] * (low[i] - (0 if high[i] else 4)) for i in range(256)]


def q4_k(raw):
    d, dmin, pairs = half(raw, 0), half(raw, 2), scales_and_minima(raw[4:16])
    quant = [raw[16 + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15 for i in range(256)]
    return [d * pairs[i // 32][0] * quant[i] - dmin * pairs[i // 32][1] for i in range(256)]


def q5_k(raw):
    d, dmin, pairs = half(raw, 0), half(raw, 2), scales_and_minima(raw[4:16])
    quant = [
        raw[48 + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15 | (raw[16 + i % 32] >> i // 32 & 1) << 4
        for i in range(256)
    ]
    return [d * pairs[i // 32][0] * quant[i] - dmin * pairs[i // 32][1] for i in range(256)]


def q6_k(raw):
    d = half(raw, 208)
    low = [raw[64 * (i // 128) + i % 64] >> 4 * (i % 128 // 64) & 15 for i in range(256)]
    high = [raw[128 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3 for i in range(256)]
    return [d * signed(raw[192 + i // 16]) * ((low[i] | high[i] << 4) - 32) for i in range(256)]


SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
FORMULAS = {
    "F32": lambda raw: struct.unpack("<32f", raw),
    "F16": lambda raw: struct.unpack("<32e", raw),
    "BF16": lambda raw: [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, 64, 2)],
    "Q8_0": lambda raw: [half(raw, 0) * signed(b) for b in raw[2:]],
    "Q4_0": lambda raw: [half(raw, 0) * (n - 8) for n in nibbles(raw[2:])],
    "Q4_1": lambda raw: [half(raw, 0) * n + half(raw, 2) for n in nibbles(raw[4:])],
    "Q5_0": lambda raw: [half(raw, 0) * ((n | b) - 16) for n, b in zip(nibbles(raw[6:]), fifth_bits(raw[2:6]))],
    "Q5_1": lambda raw: [half(raw, 0) * (n | b) + half(raw, 2) for n, b in zip(nibbles(raw[8:]), fifth_bits(raw[4:8]))],
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip


def test_a_quantized_model_is_permuted_back_after_dequantization(path):
    tensors = write_gguf(path, "llama-bpe", quantization="Q8_0")
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_allclose(open_gguf(path).read(name), tensors[name], atol=0.5 / 127)


def test_smollm2_is_what_transformers_dequantizes(smollm2):
    fixture = gguf_files.load("smollm2")["tensors"]
    checkpoint = open_gguf(smollm2)
    assert set(checkpoint.names()) == set(fixture)
    digests = {n: hashlib.sha256(checkpoint.read(n).tobytes()).hexdigest()[:16] for n in fixture}
    assert digests == fixture


# -- config


def test_config_of_llama(path):
    write_gguf(path, "llama-bpe")
    config = open_gguf(path).hf_config
    assert {key: config[key] for key in ("model_type", "vocab_size", "head_dim", "num_key_value_heads")} == {
        "model_type": "llama", "vocab_size": 602, "head_dim": 16, "num_key_value_heads": 2}  # fmt: skip
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == np.float32(1e-5)
    assert config["eos_token_id"] == open_gguf(path).generation_config["eos_token_id"] == [2, 0]  # end of text, of turn


def test_defaults_of_old_files(path):
    """No head size, no count of KV heads, no RoPE base."""
    absent = ("attention.key_length", "attention.head_count_kv", "rope.freq_base", "rope.dimension_count")
    write_gguf(path, "gpt-2", metadata={f"llama.{key}": None for key in absent})
    config = open_gguf(path).hf_config
    assert (config["head_dim"], config["num_key_value_heads"]) == (16, 4)
    assert config["rope_parameters"]["rope_theta"] == 10_000


def test_an_own_head_is_not_tied(path):
    write_gguf(path, "qwen3")
    assert not open_gguf(path).hf_config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(path, metadata, rope):
    write_gguf(path, "llama-bpe", metadata={f"llama.{key}": value for key, value in metadata.items()})
    assert open_gguf(path).hf_config["rope_parameters"] == {"rope_theta": 5000.0, **rope}


def test_rope_factors_become_longrope_at_any_length(path):
    factors = [1.0, 1.0, 1.0, 2.5, 4.0, 8.0, 8.0, 8.0]
    write_gguf(path, "llama-bpe", extra_tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    checkpoint = open_gguf(path)
    rope = checkpoint.hf_config["rope_parameters"]
    assert rope["rope_type"] == "longrope"
    assert rope["short_factor"] == rope["long_factor"] == factors
    assert rope["attention_factor"] == 1.0
    assert "rope_freqs.weight" not in checkpoint.names()


def test_rope_factors_of_one_change_nothing(path):
    write_gguf(path, "llama-bpe", extra_tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert open_gguf(path).hf_config["rope_parameters"]["rope_type"] == "default"


def test_biases_are_seen(path):
    bias = {f"blk.{i}.{part}.bias": np.zeros(n, np.float32) for i in (0, 1) for part, n in
            (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64))}  # fmt: skip
    write_gguf(path, "llama-bpe", extra_tensors=bias)
    config = open_gguf(path).hf_config
    assert config["attention_bias"]
    assert not config["mlp_bias"]


# -- what is refused, by name


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"general.architecture": "mamba"}, "general.architecture='mamba' must be one of llama, qwen2, qwen3"),
        ({"general.type": "adapter"}, "general.type='adapter'"),
        ({"split.count": 3}, "split.count=3 .*gguf-split"),
        ({"llama.block_count": None}, "lack llama.block_count"),
        ({"llama.attention.head_count": [4, 2]}, "the same for all layers"),
        ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window=16"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 must be 0"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8 must be 16"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type='longrope' must be none, linear or yarn"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor=2.0"),
        ({"llama.rope.scaling.yarn_beta_fast": 16.0}, "llama.rope.scaling.yarn_beta_fast=16.0 is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": "tiny"}, "must be a number"),
    ],
)
def test_refused_metadata(path, metadata, complaint):
    write_gguf(path, "llama-bpe", metadata=metadata)
    with pytest.raises(ConversionError, match=complaint) as refusal:
        open_gguf(path).hf_config  # noqa: B018
    assert str(path) in str(refusal.value)


def test_a_window_as_long_as_the_context_is_none(path):
    write_gguf(path, "llama-bpe", metadata={"llama.attention.sliding_window": 128})
    assert "sliding_window" not in open_gguf(path).hf_config


def test_another_quantization_is_refused_by_name(path):
    write_gguf(path, "gpt-2", extra_tensors={"x": np.zeros(4, np.int8)})
    with pytest.raises(ConversionError, match=r"quantized as I8 \(1 tensors, the first is 'x'\)"):
        open_gguf(path).names()


def test_an_unknown_quantization_is_refused_by_number(path):
    write_gguf(path, "gpt-2")
    raw = path.read_bytes()
    at = raw.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    path.write_bytes(raw[:at] + struct.pack("<I", 77) + raw[at + 4 :])
    with pytest.raises(ConversionError, match="type 77"):
        open_gguf(path).names()


def test_an_unknown_tensor_keeps_its_name(path):
    write_gguf(path, "gpt-2", extra_tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    assert "blk.0.attn_sinks.weight" in open_gguf(path).names()


def test_truncated_at_any_place(path):
    write_gguf(path, "gpt-2")
    whole = path.read_bytes()
    for size in sorted({0, 3, 4, 10, 24, 30, len(whole) - 1, *np.linspace(0, len(whole) - 1, 60, dtype=int).tolist()}):
        path.write_bytes(whole[:size])
        with pytest.raises(ConversionError, match=r"model\.gguf: (cannot|not a|it ends|truncated)"):
            open_gguf(path).names()


def test_corrupt_bytes_never_give_another_error(path):
    write_gguf(path, "gpt-2")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    header = whole.index(b"tokenizer.ggml.merges")
    raised = 0
    for _ in range(200):
        raw = bytearray(whole)
        raw[int(rng.integers(0, header))] ^= int(rng.integers(1, 256))
        path.write_bytes(raw)
        try:
            checkpoint = open_gguf(path)
            checkpoint.names(), checkpoint.hf_config, checkpoint.tokenizer_json, checkpoint.tokenizer_config
        except ConversionError:
            raised += 1
    assert raised > 20  # most bytes are text of tokens, which may be anything


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 a zip archive", "not a GGUF file: it begins with b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1: 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "metadata lack general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "ends within its header"),
    ],
)
def test_not_a_gguf_file(path, raw, complaint):
    path.write_bytes(raw)
    with pytest.raises(ConversionError, match=complaint):
        open_gguf(path)


def test_no_such_file(path):
    with pytest.raises(ConversionError, match="cannot be read"):
        open_gguf(path)


# -- tokenizer


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' must be one of gpt-2, llama-bpe, qwen2, smollm"),
        ({"pre": None}, "lack tokenizer.ggml.pre"),
        ({"model": "t5"}, "tokenizer.ggml.model='t5' must be gpt2 or llama"),
        ({"tokens": None}, "lack tokenizer.ggml.tokens"),
        ({"merges": ["a b c"]}, "'a b c', not two tokens"),
        ({"token_type": [1, 1]}, "one for each of the 602 tokens"),
        ({"eos_token_id": 602}, "tokenizer.ggml.eos_token_id=602 must be below 602"),
        ({"add_sep_token": True}, "tokenizer.ggml.add_sep_token=True"),
    ],
)
def test_refused_tokenizers(path, options, complaint):
    write_gguf(path, "gpt-2", **options)
    with pytest.raises(ConversionError, match=complaint):
        open_gguf(path).tokenizer_json  # noqa: B018


def test_more_tokens_than_rows(path):
    write_gguf(path, "gpt-2", tokens=["x"] * 700, rows=602)
    with pytest.raises(ConversionError, match=r"700 tokens, but token_embd.weight has 602 rows"):
        open_gguf(path).hf_config  # noqa: B018
