"""Random bfloat16 weights of a real model's shape, many requests through `LLM.generate`, beside the hardware's limit.

    python -m benchmarks.offline --model llama8b --workloads bs1,bs64,fixed256,nano,decode --idle decode

The limit is computed from the read bandwidth and the rate of matrix products measured in the same run.
"""

import argparse
import json

from benchmarks.common import claim_memory, longest, peer_results, random_llm, rates, report, time_workload
from benchmarks.idle import queued_seconds, recorded
from benchmarks.workloads import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument("--workloads", default="bs1,bs64,fixed256,nano,decode")
    parser.add_argument(
        "--repeats", type=int, default=1, help="measured runs of each workload, after one that compiles"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", default="auto", help="the limit stays that of bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--steps-in-flight", type=int, default=1)
    parser.add_argument("--steps-per-call", type=int)
    parser.add_argument("--peer", action="append", default=[], help="command of another engine's script, run first")
    parser.add_argument(
        "--sampling", type=json.loads, default={}, help='fields of SamplingParams: \'{"temperature": 1, "top_p": 0.9}\''
    )
    parser.add_argument("--idle", default="", help="workloads of which also: how long the device had nothing to do")
    args = parser.parse_args()

    for command in args.peer:  # before jax takes the memory
        for row in peer_results(command):
            report(row)
    claim_memory()
    import jax

    workloads = args.workloads.split(",")
    options = {
        name: getattr(args, name)
        for name in ("dtype", "kv_cache_dtype", "attention", "page_size", "max_num_seqs", "steps_in_flight",
                     "steps_per_call")
    }  # fmt: skip
    options["enable_prefix_caching"] = False  # as in the figures that ours stand beside
    if args.max_num_batched_tokens is not None:
        options["max_num_batched_tokens"] = args.max_num_batched_tokens
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {args.model}, {options}, {args.sampling}", flush=True)
    limits = rates()
    with random_llm(args.model, max_model_len=longest(args.model, workloads), **options) as llm:
        for name in workloads:
            result = time_workload(llm, args.model, name, args.repeats, limits=limits, sampling=args.sampling)
            if name in args.idle.split(","):
                with recorded(llm._runner) as run:
                    again = time_workload(llm, args.model, name, repeats=1, warmups=0, sampling=args.sampling)
                result["idle"] = 1 - queued_seconds(llm._runner, run.steps) / again["seconds"]
            report(result)


if __name__ == "__main__":
    main()
