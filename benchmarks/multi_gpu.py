"""Tensor, data and pipeline parallelism on GPUs of one machine: first the answers of one GPU, then tokens/s.

python -m benchmarks.multi_gpu --devices 1,2,2x1,1x2x1 --workloads bs1,bs64,fixed256,decode
"""

import argparse
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import jaxengine
from benchmarks.common import claim_memory, longest, random_llm, report, time_workload
from benchmarks.workloads import SHAPES

NOISE = 0.05  # mean of absolute differences of log-probabilities; bfloat16 on two simulated devices: 0.024
LENGTHS = (5, 40, 130, 200, 7, 60, 90, 30)
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


def shipped_answers(grid: Grid, dtype: str) -> tuple[list[list[int]], np.ndarray]:
    """Greedy tokens of the shipped model, and the log-probabilities of the same prompts' tokens."""
    from jaxengine import LLM, SamplingParams

    folder = next((Path(jaxengine.__file__).parent / "assets").rglob("config.json")).parent
    options: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 2**28}
    with LLM(folder, dtype=dtype, **parallel(grid), **options) as llm:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, llm.model_config.vocab_size, length).tolist() for length in LENGTHS]
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False, prompt_logprobs=0)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        plain = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False), use_tqdm=False
        )
    logprobs = [output.prompt_logprobs.logprobs[1:] for output in outputs if output.prompt_logprobs]
    return [list(output.outputs[0].token_ids) for output in plain], np.concatenate(logprobs)


def check(grid: Grid) -> None:
    """Raises RuntimeError when several devices answer otherwise than one."""
    for dtype in ("float32", "bfloat16"):
        (want, want_logprobs), (tokens, logprobs) = shipped_answers((1, 1, 1), dtype), shipped_answers(grid, dtype)
        difference = np.abs(logprobs - want_logprobs)
        result = parallel(grid) | {"dtype": dtype, "same_tokens": tokens == want}
        report(result | {"mean_difference": float(difference.mean()), "largest_difference": float(difference.max())})
        if dtype == "float32" and tokens != want:
            raise RuntimeError(f"greedy tokens in float32 on {parallel(grid)} are not those of one device")
        if difference.mean() > NOISE:
            raise RuntimeError(f"log-probabilities in {dtype} on {parallel(grid)} differ by {difference.mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument(
        "--devices",
        default="1,2",
        help="tensor, data x tensor or data x stages x tensor, as in 2x1; speed-ups are over the first",
    )
    parser.add_argument("--workloads", default="bs1,bs64,fixed256,decode")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256, help="of each shard of the data axis")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-check", action="store_true", help="speed only")
    args = parser.parse_args()
    claim_memory()
    import jax

    grids, workloads = [parse(size) for size in args.devices.split(",")], args.workloads.split(",")
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for grid in grids if not args.no_check else []:
        if math.prod(grid) > 1:
            check(grid)
    options = {"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "enable_prefix_caching": False}
    first: dict[str, float] = {}
    for grid in grids:
        with random_llm(args.model, **parallel(grid), max_model_len=longest(args.model, workloads), **options) as llm:
            # A shard with its part of the requests does less at a time: replicas are for requests of their own.
            for name, copies in product(workloads, sorted({1, grid[0]})):
                result = time_workload(llm, args.model, name, args.repeats, copies=copies)
                speed = first.setdefault(name, result["out_tok_s"])
                report(parallel(grid) | result | {"copies": copies, "speed_up": result["out_tok_s"] / speed})


if __name__ == "__main__":
    main()
