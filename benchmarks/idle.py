"""How long the device had nothing to do during a run: what its steps take when they are queued, against the wall."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np

from jaxengine.step import StepInputs


@dataclass
class Recording:
    steps: list[StepInputs] = field(default_factory=list)
    late: int = 0  # at most so many the device had to wait for: it had finished the one before when all was submitted


@contextmanager
def recorded(runner: Any) -> Iterator[Recording]:
    """All steps that are submitted meanwhile."""
    import jax

    recording, results = Recording(), list[Any]()

    def submit(inputs: StepInputs) -> Any:
        recording.steps.append(inputs)
        flight = type(runner).submit(runner, inputs)
        recording.late += bool(results) and all(array.is_ready() for array in results)
        results[:] = jax.tree.leaves(flight._arrays)
        return flight

    runner.submit = submit
    try:
        yield recording
    finally:
        del runner.submit


def queued_seconds(runner: Any, steps: list[StepInputs], samples: int = 6, repeats: int = 100) -> float:
    """What these steps take together when the host is far ahead.

    Of each program some steps, in the middle of equal parts of the run, are timed by queueing the same inputs
    `repeats` times, or as often as fits in a second; those between are interpolated, as their contexts lie between,
    those before the first and after the last take its time.
    Overwrites the cache's content: nobody may wait for tokens.
    """
    of_program: dict[tuple, list[int]] = defaultdict(list)
    for i, inputs in enumerate(steps):
        of_program[inputs.kind, inputs.bucket, inputs.head_bucket, inputs.mode].append(i)
    total = 0.0
    for places in of_program.values():
        parts = min(samples, len(places))
        sampled = [places[round((part + 0.5) / parts * len(places) - 0.5)] for part in range(parts)]
        seconds = [_queued(runner, steps[i], repeats) for i in sampled]
        total += float(np.interp(places, sampled, seconds).sum())
    return total


def _queued(runner: Any, inputs: StepInputs, repeats: int) -> float:
    inputs = replace(inputs, slot_writes=(), logit_writes=(), mask_writes=())
    begin = perf_counter()
    runner.submit(inputs).result()
    repeats = max(1, min(repeats, int(1 / (perf_counter() - begin))))
    begin = perf_counter()
    [runner.submit(inputs) for _ in range(repeats)][-1].result()
    return (perf_counter() - begin) / repeats
