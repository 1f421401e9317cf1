"""What the host costs a decode step: an engine on a device that takes no time.

    python -m benchmarks.host --rows 256 --steps 300

Plain greedy requests that nobody watches, with prompts of different lengths, so that in each step some rows need a new
page and some have filled one. `rest` is what the engine's loop does beside the three.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxengine.engine import engine as engine_module
from jaxengine.engine.batch import Buckets, bucket_sizes
from jaxengine.engine.engine import Engine
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.sequence import Request
from jaxengine.engine.shards import together
from jaxengine.kv_cache import CacheGroup
from jaxengine.request import SamplingParams
from jaxengine.step import StepInputs, StepOutputs
from jaxengine.text import TextSink

PAGE_SIZE, PROMPT, VOCAB, TOKEN = 16, 128, 128256, 5


class NoDevice:
    """Draws the same token for every row, at once."""

    compiling = False

    def __init__(self, rows: int):
        self._outputs = StepOutputs(np.full((rows, 1), TOKEN, np.int32))

    def submit(self, inputs: StepInputs) -> "NoDevice":
        return self

    def result(self) -> StepOutputs:
        return self._outputs

    def reset(self) -> None:
        pass


class Clock:
    """Seconds spent in each of the functions that were wrapped, since it was last asked."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.spent[name] = self.spent.get(name, 0) + time.perf_counter() - started

        return run


def make_engine(rows: int, length: int, steps_in_flight: int, shards: int) -> Engine:
    pages = 1 + rows * -(-length // PAGE_SIZE)
    budget = max(4096, rows)
    schedulers = [
        Scheduler(
            [CacheGroup((0,), None, 1, 8)], [pages], page_size=PAGE_SIZE, max_num_seqs=rows,
            max_num_batched_tokens=budget, max_model_len=length,
        )
        for _ in range(shards)
    ]  # fmt: skip
    buckets = Buckets(bucket_sizes(1, rows, 32), bucket_sizes(64, budget, 512), 64, PAGE_SIZE, 1, rows)
    return Engine(
        together(schedulers), NoDevice(rows * shards), buckets, TextSink(None), vocab_size=VOCAB,
        steps_in_flight=steps_in_flight,
    )  # fmt: skip


def time_steps(rows: int, steps: int, steps_in_flight: int = 1, shards: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each of so many decode steps, by part."""
    tokens = steps + 100  # more than are drawn while prompts are computed and steps are timed
    engine = make_engine(rows, PROMPT + PAGE_SIZE + tokens, steps_in_flight, shards)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i in range(rows * shards):
        prompt = np.random.default_rng(i).integers(VOCAB, size=PROMPT + i % PAGE_SIZE).tolist()
        engine.add(Request(str(i), None, prompt, params, max_tokens=tokens, watched=False))
    while engine.metrics()["num_requests_waiting"] or any(len(step.rows) < rows * shards for step in engine._steps):
        engine.step()
    clock = Clock()
    engine.scheduler.schedule = clock.timed("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine._commit = clock.timed("commit", engine._commit)  # type: ignore[method-assign]
    original = engine_module.build_batch
    engine_module.build_batch = clock.timed("build", original)
    step = clock.timed("all", engine.step)
    times: dict[str, list[float]] = {"schedule": [], "build": [], "commit": [], "rest": [], "all": []}
    try:
        for _ in range(steps):
            clock.spent = {"rest": 0.0}
            step()
            clock.spent["rest"] = clock.spent["all"] - sum(
                clock.spent[name] for name in ("schedule", "build", "commit")
            )
            for name, values in times.items():
                values.append(clock.spent[name] * 1e3)
    finally:
        engine_module.build_batch = original
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="of each shard")
    parser.add_argument("--shards", type=int, default=1, help="of a data axis")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--steps-in-flight", type=int, default=1)
    args = parser.parse_args()

    times = time_steps(args.rows, args.steps, args.steps_in_flight, args.shards)
    print(f"{args.shards} x {args.rows} rows, ms a step{'median':>10}{'mean':>8}{'worst':>8}")
    for name, values in times.items():
        print(f"{name:>20}{statistics.median(values):12.3f}{statistics.mean(values):8.3f}{max(values):8.3f}")


if __name__ == "__main__":
    main()
