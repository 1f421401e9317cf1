"""What made the records of a run: all that changes answers. Not the sizes of steps, which change rounding only."""

from collections.abc import Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jaxengine.evaluate.protocol import Server
from jaxengine.request import SamplingParams

FORMAT = 1
ENGINE = ("dtype", "quantization", "kv_cache_dtype", "logprobs_mode", "seed")
SAMPLES, SAMPLE = 16, 1 << 16  # of each file: so many pieces of so many bytes


def manifest(server: Server, served_names: Sequence[str]) -> dict[str, Any]:
    """Plain JSON. Equal ones may go into one file."""
    llm, own = server.llm, server.params({}, "")
    source = dict(llm.source)
    for name in ("model", "tokenizer"):
        path = source[name]
        if path is not None and Path(path).exists():  # else a hub id
            source[name] = {"name": Path(path).name, "files": fingerprint(path)}
    defaults = {field.name: field.default for field in fields(SamplingParams)} | {"seed": own.seed}
    return {
        "format": FORMAT,
        "source": source,
        "weight_version": llm.get_metrics()["weight_version"],
        "engine": {name: getattr(llm.config, name) for name in ENGINE} | {"max_model_len": llm.max_model_len},
        "sampling": {name: getattr(own, name) for name, value in defaults.items() if getattr(own, name) != value}
        | {"seed": llm.get_default_sampling_params().seed} | dict(server.defaults),
        "served_model_name": list(served_names),
    }  # fmt: skip


def fingerprint(path: str | Path) -> str:
    """Of a file, or of all files in a folder: their names, their sizes, and samples all over each of them."""
    root, found = Path(path), blake2b(digest_size=16)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.relative_to(root)} {size}\n".encode())
        with open(file, "rb") as content:
            for i in range(SAMPLES if size > SAMPLES * SAMPLE else 1):
                content.seek(i * (size - SAMPLE) // (SAMPLES - 1) if i else 0)
                found.update(content.read(SAMPLE if size > SAMPLES * SAMPLE else size))
    return found.hexdigest()
