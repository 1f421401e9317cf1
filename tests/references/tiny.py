"""Tiny random checkpoints, and what transformers computes from them. Needs neither torch nor transformers.

    write_checkpoint("llama_yarn", folder)      config.json and model.safetensors as HuggingFace writes them
    reference("llama_yarn")                     token_ids, max_model_len, and logits float32 [n, vocab] at positions [n]

`make_tiny.py` wrote the fixtures (tiny.json, tiny.npz) in an environment with torch. The weights are not among them:
they are drawn here from a generator seeded by the tensor's name, and their hash is compared with the fixture's.
"""

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
STD = 0.3  # the usual 0.02 hides bugs: attention is then almost uniform
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@cache
def fixtures() -> dict[str, Any]:
    return json.loads((FOLDER / "tiny.json").read_text())


def variants() -> list[str]:
    return list(fixtures()["variants"])


def config(name: str) -> dict[str, Any]:
    """The variant's config.json."""
    return json.loads(json.dumps(fixtures()["variants"][name]["config"]))  # a copy that a test may edit


def uniform(seed: str, count: int) -> np.ndarray:
    """float32 [count] of mean 0 and deviation 1, from raw bits: the same for every version of NumPy."""
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    raw = np.random.PCG64(key).random_raw(count) >> np.uint64(40)
    return ((raw.astype(np.float64) / 2**24 - 0.5) * math.sqrt(12)).astype(np.float32)


def tensor(name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """The weight called `name` in every variant: deviation STD, around 1 for the scales of norms."""
    x = uniform(name, math.prod(shape)).reshape(shape) * np.float32(STD)
    norm = any(part in name for part in ("norm", "ln_")) and name.endswith("weight")
    return (x + np.float32(norm)).astype(DTYPES[dtype])


def tensors(name: str) -> dict[str, np.ndarray]:
    """Every tensor of the variant's model.safetensors."""
    variant = fixtures()["variants"][name]
    arrays = {key: tensor(key, tuple(shape), variant["dtype"]) for key, shape in variant["tensors"].items()}
    if input_hash(arrays, variant["token_ids"]) != variant["input_hash"]:
        raise ValueError(f"{name}: the weights drawn here are not those the fixtures were made from: make references")
    return arrays


def input_hash(arrays: dict[str, np.ndarray], token_ids: list[int]) -> str:
    digest = hashlib.sha256(json.dumps(token_ids).encode())
    for key in sorted(arrays):
        digest.update(key.encode() + arrays[key].tobytes())
    return digest.hexdigest()


def write_checkpoint(name: str, folder: Path | str, shards: int = 1) -> Path:
    """The variant as a HuggingFace folder, in one file or in `shards` files with an index; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name), indent=2))
    write_safetensors(tensors(name), folder, shards)
    return folder


def write_safetensors(arrays: dict[str, np.ndarray], folder: Path, shards: int = 1) -> None:
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: arrays[key] for key in sorted(arrays)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in arrays.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def reference(name: str) -> dict[str, Any]:
    """What transformers computes in float32 in one pass over all of `token_ids`.

    token_ids: list of int; positions: those whose logits are kept; logits: float32 [len(positions), vocab];
    max_model_len: the engine's, where the rope type depends on it (longrope, dynamic), else max_position_embeddings.
    """
    variant = fixtures()["variants"][name]
    with np.load(FOLDER / "tiny.npz") as arrays:
        logits = arrays[name]
    return {key: variant[key] for key in ("token_ids", "positions", "max_model_len")} | {"logits": logits}
