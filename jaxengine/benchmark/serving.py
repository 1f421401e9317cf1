"""Timing an LLM. The results have the keys of vLLM's benchmark files; seconds, unless a key ends in ms."""

import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

from jaxengine.request import RequestOutput, SamplingParams

COMPLETE = ("stop", "length")  # finish reasons of a request that got what it asked for


@dataclass(frozen=True)
class Run:
    """Requests that were added at once, and what happened to each. `itls` has rows only when tokens were watched."""

    duration: float
    outputs: list[RequestOutput]  # the last of each request
    output_lens: list[int]
    itls: list[list[float]]


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` token ids, the same for the same seed."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def fixed_length(tokens: int, **sampling: Any) -> SamplingParams:
    """Exactly this many tokens, no text; greedy, or by these fields."""
    return SamplingParams(**{"temperature": 0.0, **sampling}, max_tokens=tokens, ignore_eos=True, detokenize=False)


def run(llm: Any, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Run:
    """Runs all prompts through `llm.generate` at once."""
    started = time.perf_counter()
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    duration = time.perf_counter() - started
    return Run(duration, outputs, [sum(len(c.token_ids) for c in output.outputs) for output in outputs], [])


def run_watched(llm: Any, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Run:
    """The same, seeing every token as it arrives, which costs host time and gives the times between tokens."""
    arrivals: dict[str, list[float]] = {}
    lengths: dict[str, int] = {}
    finished = []
    deltas = [replace(p, output_kind="delta") for p in params]
    started = time.perf_counter()
    for output in llm.generate(list(prompts), deltas, stream=True):
        arrivals.setdefault(output.request_id, []).append(time.perf_counter())
        lengths[output.request_id] = lengths.get(output.request_id, 0) + sum(len(c.token_ids) for c in output.outputs)
        if output.finished:
            finished.append(output)
    duration = time.perf_counter() - started
    times = [arrivals[output.request_id] for output in finished]
    itls = [[later - earlier for earlier, later in pairwise(row)] for row in times]
    return Run(duration, finished, [lengths[output.request_id] for output in finished], itls)


def summarize(runs: Iterable[Run]) -> dict[str, Any]:
    """One result for runs that followed each other, request by request and in total."""
    runs = list(runs)
    outputs = list(chain.from_iterable(r.outputs for r in runs))
    duration = sum(r.duration for r in runs)
    input_lens = [len(output.prompt_token_ids) for output in outputs]
    output_lens = list(chain.from_iterable(r.output_lens for r in runs))
    errors = [error_of(output) for output in outputs]
    completed = sum(not error for error in errors)
    lives = [
        (m.scheduled_time, m.last_token_time)
        for m in (output.metrics for output in outputs)
        if m.scheduled_time is not None and m.last_token_time is not None
    ]
    ttfts = [output.metrics.time_to_first_token or 0.0 for output in outputs]
    latencies = [output.metrics.e2e_latency or 0.0 for output in outputs]
    itls = list(chain.from_iterable(r.itls for r in runs))
    result: dict[str, Any] = {
        "duration": duration,
        "completed": completed,
        "failed": len(outputs) - completed,
        "total_input_tokens": sum(input_lens),
        "total_output_tokens": sum(output_lens),
        "request_throughput": completed / duration,
        "output_throughput": sum(output_lens) / duration,
        "total_token_throughput": (sum(input_lens) + sum(output_lens)) / duration,
        "max_concurrent_requests": most_at_once(lives),
        "input_lens": input_lens,
        "output_lens": output_lens,
        "ttfts": ttfts,
        "itls": itls,
        "latencies": latencies,
        "errors": errors,
    }
    tpots = [(whole - first) / (n - 1) for whole, first, n in zip(latencies, ttfts, output_lens) if n > 1]
    series = {"ttft": ttfts, "tpot": tpots, "itl": list(chain.from_iterable(itls)), "e2el": latencies}
    for name, values in series.items():
        result |= {f"{label}_{name}_ms": value * 1e3 for label, value in spread(values).items()}
    return result


def error_of(output: RequestOutput) -> str:
    """Why a request did not get what it asked for; empty when it did."""
    if output.error is not None:
        return str(output.error)
    return ", ".join(f"finish_reason={c.finish_reason}" for c in output.outputs if c.finish_reason not in COMPLETE)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile (the smallest value that 99% of them do not exceed); nothing for no values."""
    if not values:
        return {}
    p99 = sorted(values)[-(-99 * len(values) // 100) - 1]
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "p99": p99}


def most_at_once(intervals: Sequence[tuple[float, float]]) -> int:
    """How many of the intervals [start, end) overlap at most."""
    events = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def table(result: dict[str, Any]) -> str:
    """The figures of a result that are single numbers, one a line."""
    rows = [(key.replace("_", " "), value) for key, value in result.items() if isinstance(value, int | float)]
    width = max(len(name) for name, _ in rows)
    shown = [(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}") for name, value in rows]
    return "\n".join(f"{name:<{width}}  {value:>12}" for name, value in shown)
