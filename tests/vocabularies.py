"""Two small vocabularies for tests."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

STORED = Path(__file__).parent / "references" / "gguf" / "vocab.json"


def byte_level(add_prefix_space=False):
    """A byte-level BPE of 600 tokens, ids 0 to 2 special, the letters of bytes from 3 on."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))["bytes"]
    vocab = {token: i for i, token in enumerate(stored["tokens"][:600])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in stored["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in stored["tokens"][:3]])
    return backend


WORDS = {"hello": 0, "world": 1, ",": 2, "do": 3, "n't": 4, "<unk>": 5, "<a>": 6, "<b>": 7, ".": 8}


def word_level():
    """Whole words, and no decoder: all tokens are joined by spaces."""
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<a>", "<b>"])
    return backend


def write_folder(folder, backend, config, model_type):
    """A folder in HuggingFace's format, without weights."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "4.50.0"}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
