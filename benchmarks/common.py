"""What the benchmarks share: an engine with random weights of a given shape, timed workloads, result lines."""

import json
import os
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.workloads import SHAPES, requests, write_checkpoint_config

MEMORY_SHARE = 0.92  # of a GPU, for jax and the engine alike


def claim_memory() -> None:
    """Must come before jax's client starts, which then takes its share."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))


@contextmanager
def random_llm(shape: str, **engine: Any) -> Iterator[Any]:
    """An LLM of this shape with random weights, which may take MEMORY_SHARE of a GPU."""
    claim_memory()
    from jaxengine.llm import LLM

    engine = {"gpu_memory_utilization": MEMORY_SHARE} | engine
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint_config(SHAPES[shape], Path(folder))
        with LLM(model=folder, load_format="dummy", **engine) as llm:
            yield llm


def longest(shape: str, workloads: Sequence[str]) -> int:
    """The longest request of these workloads, prompt and output together."""
    sets = [requests(name, SHAPES[shape].vocab_size) for name in workloads]
    return max(len(prompt) + output for prompts, outputs in sets for prompt, output in zip(prompts, outputs))


def time_workload(
    llm: Any, shape: str, workload: str, repeats: int, warmups: int = 1, copies: int = 1
) -> dict[str, Any]:
    """Runs the workload `warmups + repeats` times through `LLM.generate`; output tokens/s of the median run.

    `copies`: of each request.

    The prefix cache is emptied before each run, and each request must give all its tokens.
    """
    from jaxengine.benchmark.serving import fixed_length, run

    prompts, lengths = requests(workload, SHAPES[shape].vocab_size)
    prompts, lengths = prompts * copies, lengths * copies
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
    claim_memory()
    from jaxengine.benchmark.device import matmul_rate, read_rate

    return read_rate(bytes_read), matmul_rate(matrix)


def peer_results(command: str) -> list[dict[str, Any]]:
    """The lines `RESULT {...}` that another engine's script prints, run in the script's folder.

    Raises CalledProcessError when it fails.
    """
    print(f"peer: {command}", flush=True)
    words = [os.path.abspath(word) if os.path.isfile(word) else word for word in shlex.split(command)]
    folder = next((os.path.dirname(word) for word in words if word.endswith(".py")), None)
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line) for line in lines]


def report(result: dict[str, Any]) -> None:
    """One line that a program can read."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    print("RESULT " + json.dumps(rounded), flush=True)
