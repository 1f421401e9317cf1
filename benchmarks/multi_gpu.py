"""Tensor, data and pipeline parallelism on GPUs of one machine: first the answers of one GPU, then tokens/s.

    python -m benchmarks.multi_gpu --devices 1,2,2x1,1x2x1 --workloads bs1,bs64,fixed256,decode

A grid that fails is reported, and the others run. Where time is short: few programs (`--rows`, `--tokens`, each a list
of sizes to pad to), first runs that only compile (`--warmup-tokens`), shorter outputs (`decode:256`).
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxengine
from benchmarks import noise
from benchmarks.common import claim_memory, longest, only_buckets, random_llm, rates, report, time_workload
from benchmarks.steps import by_name, in_collectives, profile_step
from benchmarks.workloads import SHAPES, Work

NOISE = 0.05  # mean of absolute differences of log-probabilities; bfloat16 on two simulated devices: 0.024
LENGTHS = (5, 40, 130, 200, 7, 60, 90, 30)
TOKENS = 32
Grid = tuple[int, int, int]  # shards of the data axis, stages, devices of the tensor axis in each


def parse(text: str) -> Grid:
    """
    >>> parse("2"), parse("2x4"), parse("1x2x4")
    ((1, 1, 2), (2, 1, 4), (1, 2, 4))
    """
    *others, tensor = map(int, text.split("x"))
    data, stages = (*others, 1, 1)[:2]
    return data, stages, tensor


def parallel(grid: Grid) -> dict[str, Any]:
    return dict(zip(("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"), grid, strict=True))


class Answers(NamedTuple):
    tokens: np.ndarray  # int [prompts, TOKENS], greedy, all but the first drawn by steps that only decode
    logprobs: np.ndarray  # of the prompts' tokens


@cache
def shipped_answers(grid: Grid, dtype: str) -> Answers:
    """Of the shipped model."""
    from jaxengine import LLM, SamplingParams

    folder = next((Path(jaxengine.__file__).parent / "assets").rglob("config.json")).parent
    options: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 2**28}
    with LLM(folder, dtype=dtype, **parallel(grid), **options) as llm:
        only_buckets(llm, [8], [256])
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, llm.model_config.vocab_size, length).tolist() for length in LENGTHS]
        greedy = partial(SamplingParams, temperature=0, ignore_eos=True, detokenize=False)
        scored = llm.generate(prompts, greedy(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
        # Not with log-probabilities, which come from other programs than those that sum over peers.
        outputs = llm.generate(prompts, greedy(max_tokens=TOKENS), use_tqdm=False)
        if "decode" not in {name for name, *_ in llm._runner._programs}:
            raise RuntimeError("no step decoded only: nothing is known of such steps")
    logprobs = [output.prompt_logprobs.logprobs for output in scored if output.prompt_logprobs]
    return Answers(np.array([output.outputs[0].token_ids for output in outputs]), np.concatenate(logprobs))


def check(grid: Grid) -> None:
    """Raises RuntimeError when several devices answer otherwise than one."""
    for dtype in ("float32", "bfloat16"):
        want, found = shipped_answers((1, 1, 1), dtype), shipped_answers(grid, dtype)
        same = np.logical_and.accumulate(want.tokens == found.tokens, axis=1)  # later ones had other contexts
        difference = np.abs(found.logprobs - want.logprobs)
        result = parallel(grid) | {"dtype": dtype, "same_tokens": int(same.sum()), "of": same.size}
        report(
            result | {"mean_difference": f"{difference.mean():.1e}", "largest_difference": f"{difference.max():.1e}"}
        )
        if dtype == "float32" and not same.all():
            raise RuntimeError(f"greedy tokens in float32 on {parallel(grid)} are not those of one device")
        if difference.mean() > NOISE:
            raise RuntimeError(f"log-probabilities in {dtype} on {parallel(grid)} differ by {difference.mean():.3f}")


@contextmanager
def opened(args: argparse.Namespace, grid: Grid) -> Iterator[Any]:
    contexts = [max(work.context + work.steps, work.tokens + 1) for work in args.profile]
    length = max(longest(args.model, args.workloads), noise.TOKENS + 1 if args.logprobs else 2, *contexts)
    options = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "enable_prefix_caching": False}
    with random_llm(args.model, **parallel(grid), max_model_len=length, **options) as llm:
        only_buckets(llm, args.rows, args.tokens)
        yield llm


def measure(
    args: argparse.Namespace,
    grid: Grid,
    limits: tuple[float, float],
    speeds: dict[str, float],
    logprobs: dict[Grid, np.ndarray],
) -> None:
    """A row for each workload. It fills `speeds`, of the first grid, and `logprobs`, of all."""
    with opened(args, grid) as llm:
        # A shard with its part of the requests does less at a time: replicas are for requests of their own.
        for name, copies in product(args.workloads, [grid[0]] if args.own_requests else sorted({1, grid[0]})):
            result = time_workload(
                llm, args.model, name, args.repeats, copies=copies, warmup_tokens=args.warmup_tokens, limits=limits,
                devices=math.prod(grid),
            )  # fmt: skip
            speed = speeds.setdefault(name, result["out_tok_s"])
            report(parallel(grid) | result | {"copies": copies, "speed_up": result["out_tok_s"] / speed})
        if not args.logprobs:
            return
        found = noise.log_probabilities(llm, args.model)
        if logprobs:
            other, name = next(iter(logprobs.values())), "these devices - the first"
        else:
            other, name = noise.log_probabilities(llm, args.model, together=False), "all together - one at a time"
        report(parallel(grid) | {"logprobs": name} | noise.distance(found, other))
        logprobs[grid] = found


def profile(args: argparse.Namespace, grid: Grid) -> None:
    """What of a step's time its collectives take."""
    with opened(args, grid) as llm:
        for work in args.profile:
            kernels = by_name(profile_step(llm._runner, work))
            report(parallel(grid) | {"step": str(work)} | in_collectives(kernels, SHAPES[args.model], work, grid[2]))


def in_float32(args: argparse.Namespace, logprobs: dict[Grid, np.ndarray]) -> None:
    exact = noise.in_float32(args.model, args.float32)
    for grid, found in logprobs.items():
        report(parallel(grid) | {"logprobs": "these devices - float32"} | noise.distance(found, exact))


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return list(map(int, words(text)))


def works(text: str) -> list[Work]:
    return [Work.parse(word) for word in words(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument(
        "--devices",
        default="1,2",
        help="tensor, data x tensor or data x stages x tensor, as in 2x1; speed-ups are over the first",
    )
    parser.add_argument(
        "--workloads", type=words, default="bs1,bs64,fixed256,decode", help="decode:256: with 256 output tokens each"
    )
    parser.add_argument("--own-requests", action="store_true", help="a data axis: not the same requests, only as many")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256, help="of each shard of the data axis")
    parser.add_argument(
        "--rows", type=numbers, default=[], help="decode steps are compiled for these and --max-num-seqs"
    )
    parser.add_argument("--tokens", type=numbers, default=[], help="steps with prompts for these and the largest")
    parser.add_argument("--warmup-tokens", type=int, help="of each request's prompt and output in the first run")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-check", action="store_true", help="do not compare the shipped model's answers")
    parser.add_argument("--logprobs", action="store_true", help="of prompts, beside the first grid's and its noise")
    parser.add_argument("--float32", type=Path, help="and beside those of one device in float32, kept in this file")
    parser.add_argument(
        "--profile", type=works, default=[], help="steps as in benchmarks.steps: the collectives' part on a tensor axis"
    )
    args = parser.parse_args()
    if args.float32 and not args.logprobs:
        parser.error("--float32 needs --logprobs, which it is held against")
    claim_memory()
    import jax

    grids = [parse(size) for size in args.devices.split(",")]
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(args)}", flush=True)
    for grid in grids if not args.no_check else []:
        if math.prod(grid) > 1:
            check(grid)
    limits, speeds, logprobs = rates(), {}, {}  # type: tuple[float, float], dict[str, float], dict[Grid, np.ndarray]
    parts = {f"measure {grid}": partial(measure, args, grid, limits, speeds, logprobs) for grid in grids}
    # After the others, as a process that has profiled may stay slower.
    tensor = [grid for grid in grids if args.profile and grid[:2] == (1, 1) and grid[2] > 1]
    parts |= {f"profile {grid}": partial(profile, args, grid) for grid in tensor}
    parts |= {"float32": partial(in_float32, args, logprobs)} if args.float32 else {}
    failed = False
    for name, part in parts.items():
        try:
            part()
        except Exception as error:
            failed = True
            report({"failed": name, "error": f"{type(error).__name__}: {error}"[:2000]})
    sys.exit(failed)


if __name__ == "__main__":
    main()
