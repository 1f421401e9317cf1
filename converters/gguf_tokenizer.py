"""A GGUF file's tokenizer as the contents of a `tokenizer.json` (https://github.com/huggingface/tokenizers).

The ids are those of transformers' `AutoTokenizer.from_pretrained(folder, gguf_file=...)`, 5.23. Where that one departs
from llama.cpp (and so from the tokenizer that the model was trained with):

- `smollm`, several spaces before a digit: llama.cpp splits digits off first, transformers keeps the last space with the
  digit. Here as transformers.
- SentencePiece, text behind a special token: llama.cpp puts a space before it, transformers does not. Here as
  transformers.
- `llama-bpe`, a word that is a token but that no merges lead to: llama.cpp takes the token, transformers its parts.
  Here as llama.cpp.
- `llama-bpe` without `add_bos_token` in the file: llama.cpp adds BOS, transformers does not. Here as llama.cpp.
- `add_space_prefix` false (SentencePiece): transformers adds the space all the same. Here as llama.cpp.
- Special tokens with letters outside the byte alphabet (`<｜User｜>`), and those of transformers' own class that the
  file lacks: transformers misses the ones and adds the others. Here as llama.cpp.
"""

from functools import partial
from operator import is_
from typing import Any

from converters import ConversionError
from converters.gguf_reader import GgufFile, is_list, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_NO_EFFECT = {"remove_extra_whitespaces": False, "add_sep_token": False, "escape_whitespaces": True}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(regex=False)]}


# tokenizer.ggml.pre: how a text is split before merging
_PRE = {
    "gpt-2": _byte_level(regex=True),
    "smollm": _byte_level(regex=True),  # its vocabulary has no two digits in one token: they come one by one anyhow
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def special_tokens(file: GgufFile) -> dict[str, str]:
    """`bos_token` and the like -> their text, those that the file names."""
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in _NAMED.items()}
    tokens = _tokens(file)
    want = f"below {len(tokens)}, the number of tokens"
    return {
        name: tokens[require(file, key, lambda v: isinstance(v, int) and 0 <= v < len(tokens), want)]
        for name, key in keys.items()
        if key in file.metadata
    }


def _tokens(file: GgufFile) -> list[str]:
    return require(file, "tokenizer.ggml.tokens", is_list(str), "a list of strings")


def chat_templates(file: GgufFile) -> dict[str, str]:
    """The file's chat templates by name."""
    prefix = "tokenizer.chat_template"
    named = {key[len(prefix) + 1 :]: text for key, text in file.metadata.items() if key.startswith(prefix + ".")}
    return {"default": file.metadata[prefix]} | named if prefix in file.metadata else named


def tokenizer_json(file: GgufFile) -> dict[str, Any]:
    """What `tokenizers.Tokenizer.from_str` takes, as a dict. Raises ConversionError for kinds that are not known."""
    kind = require(file, "tokenizer.ggml.model", lambda v: v in ("gpt2", "llama"), "gpt2 or llama (SentencePiece)")
    for key, neutral in _NO_EFFECT.items():
        require(file, f"tokenizer.ggml.{key}", partial(is_, neutral), f"{neutral} or absent", neutral)
    if "tokenizer.ggml.precompiled_charsmap" in file.metadata:
        raise ConversionError(f"{file.path}: tokenizer.ggml.precompiled_charsmap is not supported")
    tokens = _tokens(file)
    each, normal = f"one for each of the {len(tokens)} tokens", [NORMAL] * len(tokens)
    types = require(file, "tokenizer.ggml.token_type", is_list(int, len(tokens)), each, normal)
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        pipeline, model, adds_bos = _byte_bpe(file)
    else:
        pipeline, model, adds_bos = _sentencepiece(file, tokens, vocab)
    ends = special_tokens(file)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types, set(ends.values())),
        "normalizer": None,
        **pipeline,
        "post_processor": _template(
            ends.get("bos_token") if file.metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None,
            ends.get("eos_token") if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None,
            vocab,
        ),
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
        | model
        | {"vocab": vocab},
    }


def _byte_bpe(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Pipeline and model of byte-level BPE, and whether BOS is added by default."""
    pre = require(file, "tokenizer.ggml.pre", lambda v: v in _PRE, f"one of {', '.join(sorted(_PRE))}")
    model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe"}
    model["merges"] = _listed_merges(file)
    return {"pre_tokenizer": _PRE[pre], "decoder": _byte_level(regex=True)}, model, pre == "llama-bpe"


def _listed_merges(file: GgufFile) -> list[list[str]]:
    merges = require(file, "tokenizer.ggml.merges", is_list(str), "a list of strings")
    pairs = [merge.split(" ") for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs) if len(pair) != 2]:
        raise ConversionError(f"{file.path}: tokenizer.ggml.merges has {wrong[0]!r}, not two tokens")
    return pairs


def _sentencepiece(
    file: GgufFile, tokens: list[str], vocab: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The same for SentencePiece's BPE: spaces as U+2581, and bytes for what the vocabulary lacks."""
    prefix = require(file, "tokenizer.ggml.add_space_prefix", lambda v: isinstance(v, bool), "true or false", True)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    pipeline = {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
    }
    if "tokenizer.ggml.merges" in file.metadata:
        merges = _listed_merges(file)
    else:
        each = f"one for each of the {len(tokens)} tokens"
        scores = require(file, "tokenizer.ggml.scores", is_list((int, float), len(tokens)), each)
        merges = _merges_by_score(vocab, scores)
    unknown = special_tokens(file).get("unk_token")
    model = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "merges": merges}
    return pipeline, model, True


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Every way to make a token of two others, best score first.

    Ties as transformers has them: the longer left part first, then the longer right part, then by ids.
    """
    ways = []
    for token, i in vocab.items():
        parts = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab]
        ways += [(-scores[i], -len(a), -len(b), i, vocab[a], vocab[b], a, b) for a, b in parts]
    return [[a, b] for *_, a, b in sorted(ways)]


def _added_tokens(tokens: list[str], types: list[int], named: set[str]) -> list[dict[str, Any]]:
    """Tokens found whole in any text: control tokens are special (skipped in decoding), user-defined ones are not."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": kind == CONTROL or token in named}
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, USER_DEFINED) or token in named
    ]


def _template(bos: str | None, eos: str | None, vocab: dict[str, int]) -> dict[str, Any]:
    """What is put around a text."""

    def around(part: str, type_id: int) -> list[dict[str, Any]]:
        pieces: list[tuple[str, str | None]] = [("SpecialToken", bos), ("Sequence", part), ("SpecialToken", eos)]
        return [{what: {"id": name, "type_id": type_id}} for what, name in pieces if name is not None]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in (bos, eos) if t is not None},
    }
