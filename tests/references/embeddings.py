"""Prompts, and transformers' hidden states of them, pooled. `make_embeddings.py` wrote the fixture."""

from pathlib import Path

import numpy as np

from tests.references import tiny

FIXTURE = Path(__file__).parent / "embeddings.npz"
MODELS = {"shipped": 4096, "gpt2": 128, "mistral": 128}  # with their vocabularies
LENGTHS = {"shipped": (1, 9, 17, 700), "gpt2": (3, 48), "mistral": (16, 48)}  # mistral: longer than its window of 8
POOLINGS = ("last", "mean", "cls")


def prompts(model: str) -> list[list[int]]:
    """Token ids, the same for all time."""
    return [
        ((tiny.uniform(f"embeddings {model} {n}", n) + 2) * 1000).astype(int).__mod__(MODELS[model]).tolist()
        for n in LENGTHS[model]
    ]


def reference(model: str) -> dict[str, np.ndarray]:
    """{pooling: float32 [prompts, hidden]}, not normalized."""
    with np.load(FIXTURE) as arrays:
        rows = [arrays[f"{model} {number}"] for number in range(len(LENGTHS[model]))]
    return {pooling: np.stack([row[i] for row in rows]) for i, pooling in enumerate(POOLINGS)}
