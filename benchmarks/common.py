"""What the benchmarks share: an engine with random weights of a given shape, timed workloads, result lines."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.workloads import SHAPES, requests, write_checkpoint_config


@contextmanager
def random_llm(shape: str, **engine: Any) -> Iterator[Any]:
    """An LLM of this shape with random weights. Imports jax only now, so that the memory share is set before."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(engine.get("gpu_memory_utilization", 0.9)))
    from jaxengine.llm import LLM

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint_config(SHAPES[shape], Path(folder))
        with LLM(model=folder, load_format="dummy", **engine) as llm:
            yield llm


def longest(shape: str, workloads: Sequence[str]) -> int:
    """The longest request of these workloads, prompt and output together."""
    sets = [requests(name, SHAPES[shape].vocab_size) for name in workloads]
    return max(len(prompt) + output for prompts, outputs in sets for prompt, output in zip(prompts, outputs))


def time_workload(llm: Any, shape: str, workload: str, repeats: int, warmups: int = 1) -> dict[str, Any]:
    """Runs the workload `warmups + repeats` times through `LLM.generate`; output tokens/s of the median run.

    The prefix cache is emptied before each run, and each request must give all its tokens.
    """
    from jaxengine.benchmark import fixed_length, run

    prompts, lengths = requests(workload, SHAPES[shape].vocab_size)
    params = [fixed_length(length) for length in lengths]
    times = []
    for i in range(warmups + repeats):
        llm.reset_prefix_cache()
        done = run(llm, prompts, params)
        if done.output_lens != lengths:
            raise RuntimeError(f"{workload}: asked for {sum(lengths)} output tokens, got {sum(done.output_lens)}")
        if i >= warmups:
            times.append(done.duration)
    seconds = statistics.median(times)
    return {
        "model": shape,
        "workload": workload,
        "n": len(prompts),
        "in_tokens": sum(map(len, prompts)),
        "out_tokens": sum(lengths),
        "seconds": seconds,
        "seconds_of_each_run": times,
        "out_tok_s": sum(lengths) / seconds,
    }


def rates(bytes_read: int, matrix: int) -> tuple[float, float]:
    """This device's read bandwidth in bytes/s (a bfloat16 sum) and its rate of matrix products in operations/s."""
    import jax
    import jax.numpy as jnp

    values = jnp.ones(bytes_read // 2, jnp.bfloat16)
    bandwidth = bytes_read / best_time(jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)), values)
    a, b = jax.random.normal(jax.random.key(0), (2, matrix, matrix), jnp.bfloat16)
    return bandwidth, 2 * matrix**3 / best_time(jax.jit(jnp.matmul), a, b)


def best_time(function: Callable[..., Any], *args: Any, calls: int = 10, rounds: int = 3) -> float:
    """Seconds a call, `calls` of them queued at a time, the best of a few rounds."""
    function(*args).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        results = [function(*args) for _ in range(calls)]
        results[-1].block_until_ready()
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def report(result: dict[str, Any]) -> None:
    """One line that a program can read."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    print("RESULT " + json.dumps(rounded), flush=True)
