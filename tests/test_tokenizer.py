"""Ids and text equal to transformers', from GGUF files and from folders."""

import json
import os
import subprocess
import sys

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers, processors

from jaxengine.errors import CheckpointError, ModelNotFoundError
from jaxengine.tokenizer import Tokenizer
from tests.references import gguf_files
from tests.references.gguf_files import text_digest, texts, write_gguf
from tests.vocabularies import byte_level, word_level, write_folder

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNICORN = "\N{UNICORN FACE}"


# -- GGUF files


def check_against_transformers(tokenizer, fixture, chats):
    for text, ids, decoded, raw in zip(texts(), fixture["ids"], fixture["text"], fixture["raw_text"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert text_digest(tokenizer.decode(ids)) == decoded, text
        assert text_digest(tokenizer.decode(ids, skip_special_tokens=False)) == raw, text
    assert tokenizer.encode_batch(texts()) == fixture["ids"]
    rendered = [tokenizer.apply_chat_template(c, add_generation_prompt=p) for c in chats for p in (True, False)]
    assert rendered == fixture["rendered"]


@pytest.mark.parametrize("kind", list(gguf_files.KINDS))
def test_small_gguf_files(tmp_path, kind):
    write_gguf(tmp_path / "x.gguf", kind)
    fixture = gguf_files.load("tokenizers")
    check_against_transformers(Tokenizer.load(tmp_path / "x.gguf"), fixture["kinds"][kind], fixture["chats"])


def test_smollm2(smollm2):
    fixture = gguf_files.load("smollm2")
    tokenizer = Tokenizer.load(smollm2)
    check_against_transformers(tokenizer, fixture, fixture["chats"])
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (49152, 1, 2)
    assert tokenizer.special_ids == frozenset(range(17))
    for answer in fixture["answers"]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": answer["question"]}])
        assert tokenizer.encode(prompt, add_special_tokens=False) == answer["prompt_ids"]
        assert tokenizer.decode(answer["token_ids"]) == answer["text"]


def test_pre_tokenizers_differ(tmp_path):
    """Else a wrong table would not be seen."""
    ids = {}
    for pre in ("gpt-2", "llama-bpe", "qwen2"):
        write_gguf(tmp_path / "x.gguf", pre)
        tokenizer = Tokenizer.load(tmp_path / "x.gguf")
        ids[pre] = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts()]
    assert len({tuple(x) for x in ids.values()}) == 3


def test_where_llama_cpp_is_followed(tmp_path):
    """The list in converters/gguf_tokenizer.py: what transformers has otherwise."""
    path = tmp_path / "x.gguf"
    write_gguf(path, "llama-bpe", add_bos_token=None)
    assert Tokenizer.load(path).encode("x")[0] == 1
    write_gguf(path, "gpt-2", add_bos_token=None)
    assert Tokenizer.load(path).encode("x")[0] != 1
    write_gguf(path, "gpt-2", add_bos_token=True, add_eos_token=True)
    assert Tokenizer.load(path).encode("x")[::2] == [1, 2]
    write_gguf(path, "sentencepiece", add_space_prefix=False)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.token_text(tokenizer.encode("the")[1]) != " the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    tokens = gguf_files.vocabulary("llama-bpe")["tokenizer.ggml.tokens"]
    types = gguf_files.vocabulary("llama-bpe")["tokenizer.ggml.token_type"]
    write_gguf(path, "llama-bpe", tokens=[*tokens, "zqzqz", "<｜User｜>"], token_type=[*types, 1, 3])
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("zqzqz<｜User｜>") == [1, 602, 603]
    assert tokenizer.decode([603]) == ""
    assert tokenizer.decode([603], skip_special_tokens=False) == "<｜User｜>"


def test_user_defined_tokens_are_whole_but_not_special(tmp_path):
    write_gguf(tmp_path / "x.gguf", "qwen3")
    tokenizer = Tokenizer.load(tmp_path / "x.gguf")
    assert tokenizer.encode("<think>") == [600]
    assert tokenizer.decode([600]) == "<think>"
    assert 600 in tokenizer.added_ids - tokenizer.special_ids


# -- folders in HuggingFace's format, against AutoTokenizer


def qwen2():
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def without_nfc():
    backend = qwen2()
    backend.normalizer = None
    return backend


def with_bos(backend):
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    return backend


def digits():
    backend = byte_level()
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return backend


def sentencepiece(tmp_path, scheme="first", normalizer=None):
    write_gguf(tmp_path / "spm.gguf", "sentencepiece")
    backend = Tokenizer.load(tmp_path / "spm.gguf").backend
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False) if scheme else None
    if normalizer:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": None}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
# name: the backend in tokenizer.json, tokenizer_config.json, the model_type, is it read without transformers?
FOLDERS = {
    "generic": (lambda _: byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}, "llama", True),
    "llama3": (lambda _: with_bos(qwen2()), {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}, "llama", True),
    "llama3_as_llama": (lambda _: with_bos(qwen2()), {"tokenizer_class": "LlamaTokenizerFast", **NAMED}, "llama", True),
    "v5": (lambda _: with_bos(digits()), {"tokenizer_class": "TokenizersBackend", **NAMED}, "llama", True),
    "flags_do_not_matter": (
        lambda _: byte_level(),
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **NAMED}, "llama", True,
    ),
    "no_config": (lambda _: with_bos(byte_level()), None, "gpt2", True),
    "gpt2": (lambda _: byte_level(), {"tokenizer_class": "GPT2Tokenizer", **NAMED}, "gpt2", True),
    "gpt2_prefix_space": (
        lambda _: byte_level(True),
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, **NAMED}, "gpt2", True,
    ),
    "gpt2_prefix_space_in_config_only": (
        lambda _: byte_level(), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, **NAMED}, "gpt2", False,
    ),
    "gpt2_class_drops_digits": (lambda _: digits(), {"tokenizer_class": "GPT2Tokenizer", **NAMED}, "llama", False),
    "qwen2": (lambda _: qwen2(), {"tokenizer_class": "Qwen2Tokenizer", **NAMED}, "qwen2", True),
    "qwen2_whatever_it_says": (lambda _: byte_level(), {"tokenizer_class": "LlamaTokenizer", **NAMED}, "qwen2", False),
    "qwen2_class_adds_nfc": (lambda _: without_nfc(), {"tokenizer_class": "Qwen2Tokenizer", **NAMED}, "qwen3", False),
    "qwen3": (lambda _: qwen2(), {"tokenizer_class": "Qwen2Tokenizer", **NAMED}, "qwen3", True),
    "llama2": (sentencepiece, LLAMA, "llama", True),
    "llama2_legacy": (lambda tmp: sentencepiece(tmp, "always"), {**LLAMA, "legacy": True}, "llama", True),
    "llama2_normalizer": (lambda tmp: sentencepiece(tmp, None, True), LLAMA, "llama", False),
    "mistral": (lambda tmp: sentencepiece(tmp, None, True), LLAMA, "mistral", True),
    "clean_up_spaces": (
        lambda _: word_level(),
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}, "llama", True,
    ),
    "more_tokens_in_config": (
        lambda _: byte_level(),
        {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, "pad_token": "<pad>", "extra_special_tokens": ["<x>"],
         "added_tokens_decoder": {"600": {"content": "<tool>", "special": False, "normalized": False, "lstrip": False,
                                          "rstrip": False, "single_word": False}}}, "llama", True,
    ),
}  # fmt: skip


def check_against_auto(folder, tokenizer):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in [*texts(), "hello , world . do n't <a><b> <b>", "<tool><x><pad>"]:
        ids = auto(text)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False) == auto(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == auto.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == auto.decode(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (auto.bos_token_id, auto.eos_token_id)
    assert tokenizer.vocab_size == len(auto)
    assert tokenizer.special_tokens == auto.special_tokens_map


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name, monkeypatch):
    make, config, model_type, fast = FOLDERS[name]
    folder = write_folder(tmp_path / "model", make(tmp_path), config, model_type)
    asked = []
    original = Tokenizer._from_transformers.__func__
    monkeypatch.setattr(Tokenizer, "_from_transformers", classmethod(lambda c, f: asked.append(f) or original(c, f)))
    tokenizer = Tokenizer.load(folder)
    check_against_auto(folder, tokenizer)
    assert bool(asked) is not fast


@pytest.mark.filterwarnings("ignore")
def test_vocabulary_and_merges_without_tokenizer_json(tmp_path):
    """As DialoGPT has it."""
    stored = gguf_files.load("vocab")["bytes"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(stored["tokens"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(stored["merges"]) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False, "model_max_length": 1024}))
    check_against_auto(tmp_path, Tokenizer.load(tmp_path))


def test_the_usual_folder_needs_neither_transformers_nor_jax(tmp_path):
    folder = write_folder(tmp_path / "m", qwen2(), {"tokenizer_class": "Qwen2Tokenizer", "chat_template": "x"}, "qwen2")
    write_gguf(tmp_path / "x.gguf", "gpt-2")
    code = (
        "import sys; from jaxengine.tokenizer import Tokenizer; from jaxengine.text import TextSink\n"
        "for path in sys.argv[1:]: Tokenizer.load(path).apply_chat_template([{'role': 'user', 'content': ''}])\n"
        "print(sorted({'transformers', 'jax', 'gguf', 'torch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.filterwarnings("ignore")
def test_bad_folders(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"folder with a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"x\.gguf: it ends within its header"):
        Tokenizer.load(tmp_path / "x.gguf")


def test_token_text_keeps_spaces_and_survives_parts_of_characters(tmp_path):
    write_gguf(tmp_path / "x.gguf", "sentencepiece")
    pieces = Tokenizer.load(tmp_path / "x.gguf")
    assert [pieces.token_text(i) for i in pieces.encode("the the", add_special_tokens=False)] == [" the", " the"]
    bytewise = Tokenizer(byte_level())
    assert [bytewise.token_text(bytewise.token_id(part)) for part in ("Ã", "©", "Ġ")] == ["\ufffd", "\ufffd", " "]
    assert bytewise.token_text(1) == "<|im_start|>"
    assert bytewise.token_text(10**6) == ""
