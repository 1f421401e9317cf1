"""What the benchmarks share: an engine with random weights of a given shape, timed workloads, result lines."""

import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.workloads import SHAPES, floor_seconds, requests, write_checkpoint_config

MEMORY_SHARE = 0.92  # of a GPU, for jax and the engine alike


def claim_memory() -> None:
    """Must come before jax's client starts, which then takes its share."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))


@contextmanager
def random_llm(shape: str, params: Any = None, **engine: Any) -> Iterator[Any]:
    """An LLM of this shape with random weights, or with `params`, which may take MEMORY_SHARE of a GPU."""
    claim_memory()
    from jaxengine.llm import LLM

    engine = {"gpu_memory_utilization": MEMORY_SHARE} | engine
    if params is not None:
        with LLM(model=params, config=SHAPES[shape].hf_config(), **engine) as llm:
            yield llm
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint_config(SHAPES[shape], Path(folder))
        with LLM(model=folder, load_format="dummy", **engine) as llm:
            yield llm


def longest(shape: str, workloads: Sequence[str]) -> int:
    """The longest request of these workloads, prompt and output together."""
    sets = [requests(name, SHAPES[shape].vocab_size) for name in workloads]
    pairs = [pair for prompts, outputs in sets for pair in zip(prompts, outputs)]
    return max((len(prompt) + output for prompt, output in pairs), default=0)


def only_buckets(llm: Any, rows: Sequence[int], tokens: Sequence[int]) -> None:
    """Programs of these sizes and of the largest only: fewer to compile, more padding. Before the first step.

    rows: of decode steps and heads, of a shard of the data axis. tokens: of steps with prompts, likewise.
    """

    def change(engine: Any) -> None:
        known = engine.buckets
        sizes = (sorted({*(n for n in new if n < old[-1]), old[-1]}) if new else old
                 for new, old in ((rows, known.rows), (tokens, known.tokens)))  # fmt: skip
        engine.buckets = llm._runner.buckets = replace(known, **dict(zip(("rows", "tokens"), map(tuple, sizes))))

    llm._loop.call(change)


def time_workload(
    llm: Any,
    shape: str,
    workload: str,
    repeats: int,
    warmups: int = 1,
    copies: int = 1,
    warmup_tokens: int | None = None,
    limits: tuple[float, float] | None = None,
    devices: int = 1,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the workload `warmups + repeats` times through `LLM.generate`; output tokens/s of the median run.

    copies: of each request. warmup_tokens: to which the first runs cut prompts and outputs; that suffices where there
    is one program for many sizes, see `compilations` in the result: of the measured runs. limits: what `rates` gives,
    for the share of the floor of so many devices. sampling: fields of SamplingParams; None: greedy.

    The prefix cache is emptied before each run, and each request must give all its tokens.
    """
    from jaxengine.benchmark.serving import fixed_length, run

    prompts, lengths = requests(workload, SHAPES[shape].vocab_size)
    prompts, lengths = prompts * copies, lengths * copies
    params: Any = partial(fixed_length, **(sampling or {}))
    whole = prompts, [params(length) for length in lengths]
    cut = [prompt[:warmup_tokens] for prompt in prompts], [params(min(n, warmup_tokens or n)) for n in lengths]
    began = time.perf_counter()
    for _ in range(warmups):
        llm.reset_prefix_cache()
        run(llm, *cut)
    warmed, times, compiled = time.perf_counter() - began, [], llm._runner.compilations.total
    for _ in range(repeats):
        llm.reset_prefix_cache()
        done = run(llm, *whole)
        if done.output_lens != lengths:
            raise RuntimeError(f"{workload}: asked for {sum(lengths)} output tokens, got {sum(done.output_lens)}")
        times.append(done.duration)
    seconds = statistics.median(times)
    result = {
        "model": shape,
        "workload": workload,
        "n": len(prompts),
        "in_tokens": sum(map(len, prompts)),
        "out_tokens": sum(lengths),
        "seconds": seconds,
        "seconds_of_each_run": times,
        "out_tok_s": sum(lengths) / seconds,
        "warmup_seconds": warmed,
        "compilations": llm._runner.compilations.total - compiled,
    }
    if limits is None:
        return result
    floor = floor_seconds(SHAPES[shape], prompts, lengths, *limits, devices)
    return result | {"floor_seconds": floor, "share_of_floor": floor / seconds}


def rates() -> tuple[float, float]:
    """The first device's read bandwidth in bytes/s (a bfloat16 sum), and operations/s of its matrix products."""
    claim_memory()
    import jax

    from jaxengine.benchmark.device import matmul_rate, read_rate

    on_cpu = jax.devices()[0].platform == "cpu"
    bandwidth, flops = read_rate(2**28 if on_cpu else 2**32), matmul_rate(1024 if on_cpu else 8192)
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s, matrix products {flops / 1e12:.0f} TFLOP/s", flush=True)
    return bandwidth, flops


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
