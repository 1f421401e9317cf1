"""What batch evaluations ask of a GPU: texts scored token by token, and many prompts of mixed lengths.

    python -m benchmarks.evaluation --model llama8b --texts 256 --prompts 20000

The limit of scoring is the products of its tokens at the measured rate. Busy is what the steps take when they are
queued back to back, as a share of the time between the first step and the last.
"""

import argparse
import random
import resource
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from benchmarks.common import claim_memory, random_llm, rates, report
from benchmarks.idle import queued_seconds, recorded
from benchmarks.workloads import SHAPES

TEXT, PROMPT, OUTPUT = (256, 2048), (16, 512), (8, 64)  # tokens, ends included


def texts(count: int, length: tuple[int, int], vocab: int) -> Iterator[list[int]]:
    rng = random.Random(0)
    for _ in range(count):
        yield [rng.randrange(2, vocab) for _ in range(rng.randint(*length))]


def score(llm: Any, shape: Any, count: int, flops: float) -> dict[str, Any]:
    import jax

    device, found = jax.devices()[0], list(texts(count, TEXT, shape.vocab_size))
    llm.logprobs(found, use_tqdm=False)  # compiles
    llm.reset_prefix_cache()
    before, compiled = device.memory_stats() or {}, llm._runner.compilations.total
    begin = perf_counter()
    llm.logprobs(found, use_tqdm=False)
    seconds, after = perf_counter() - begin, device.memory_stats() or {}
    tokens = sum(map(len, found))
    limit = tokens * 2 * shape.parameters_read / flops
    grown = {name: after[name] - before[name] for name in before if name in ("bytes_in_use", "peak_bytes_in_use")}
    return {"texts": count, "tokens": tokens, "seconds": seconds, "tok_s": tokens / seconds, "share": limit / seconds,
            "compilations": llm._runner.compilations.total - compiled, "grown": grown}  # fmt: skip


def generate(llm: Any, shape: Any, count: int) -> dict[str, Any]:
    from jaxengine import SamplingParams

    rng = random.Random(2)
    lengths = [rng.randint(*OUTPUT) for _ in range(count)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    prompts = list(texts(count, PROMPT, shape.vocab_size))
    llm.generate(prompts, params, use_tqdm=False)  # compiles
    llm.reset_prefix_cache()
    compiled, host = llm._runner.compilations.total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with recorded(llm._runner) as run:
        begin = perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = perf_counter() - begin
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host) * 1024
    compiled = llm._runner.compilations.total - compiled
    metrics = [output.metrics for output in outputs]
    stepping = max(m.last_token_time for m in metrics) - min(m.scheduled_time for m in metrics)
    busy = queued_seconds(llm._runner, run.steps, samples=2) / stepping
    return {"prompts": count, "in_tokens": sum(map(len, prompts)), "out_tokens": sum(lengths), "seconds": seconds,
            "steps": len(run.steps), "late": run.late, "compilations": compiled, "busy": busy,
            "host_bytes_grown": grown}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument("--texts", type=int, default=256, help="to score; 0: none")
    parser.add_argument("--prompts", type=int, default=20_000, help="to generate from; 0: none")
    parser.add_argument("--steps-in-flight", type=int, default=1, help="as LLM takes it")
    args = parser.parse_args()
    claim_memory()
    shape, (_, flops) = SHAPES[args.model], rates()
    options = {"dtype": "bfloat16", "steps_in_flight": args.steps_in_flight}
    with random_llm(args.model, max_model_len=TEXT[1] + 1, **options) as llm:
        if args.texts:
            report({"model": args.model, **score(llm, shape, args.texts, flops)})
        if args.prompts:
            report({"model": args.model, **generate(llm, shape, args.prompts)})


if __name__ == "__main__":
    main()
