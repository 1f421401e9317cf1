"""What the fixtures of real models keep of a greedy answer: its tokens, near ties, and a few logits. Needs no torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

NEAR = 1e-2  # a step whose two best logits differ by less is listed with that difference
TOP = 32


def near_ties(logits: np.ndarray) -> list[tuple[int, float]]:
    """(step, gap) for logits [steps, vocab] whose two best are close."""
    best = np.sort(np.partition(logits, -2, axis=-1)[:, -2:], axis=-1)
    gaps = (best[:, 1] - best[:, 0]).astype(float)
    return [(int(i), float(f"{gaps[i]:.2g}")) for i in np.flatnonzero(gaps < NEAR)]


def top_logits(logits: np.ndarray, positions: Sequence[int]) -> list[dict[str, Any]]:
    """The TOP largest logits at some of the positions of logits [positions, vocab]."""
    kept = []
    for position in positions:
        ids = np.argsort(-logits[position], kind="stable")[:TOP]
        values = [float(f"{value:.7g}") for value in logits[position, ids].astype(float)]
        kept.append({"position": int(position), "ids": ids.tolist(), "logits": values})
    return kept


def error(kept: Sequence[dict[str, Any]], logits: np.ndarray) -> float:
    """Largest difference of logits [positions, vocab] to `top_logits`, relative to the largest kept magnitude."""
    worst = 0.0
    for entry in kept:
        expected = np.array(entry["logits"])
        difference = np.abs(logits[entry["position"], entry["ids"]] - expected).max()
        worst = max(worst, float(difference / np.abs(expected).max()))
    return worst


def wrong_steps(ids: Sequence[int], reference: Sequence[int], near: Sequence[Sequence[float]], tie: float) -> list[int]:
    """Steps with another token than the reference's, but for those where its two best logits lie within `tie`.

    For tokens chosen after the reference's own; an answer that decodes on its own may differ from its first tie on.
    """
    ties = {step for step, gap in near if gap <= tie}
    return [i for i, (one, other) in enumerate(zip(ids, reference, strict=True)) if one != other and i not in ties]


def same_until_tie(ids: Sequence[int], reference: Sequence[int], near: Sequence[Sequence[float]], tie: float) -> bool:
    """Are the tokens the reference's, but for what follows a step whose two best logits lie within `tie`?"""
    for step, (token, expected) in enumerate(zip(ids, reference, strict=True)):
        if token != expected:
            return any(i == step and gap <= tie for i, gap in near)
    return True
