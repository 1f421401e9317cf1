"""A 150M-parameter Llama in float32 with random weights on the CPU, beside a transformers script in the same run.

    python -m benchmarks.cpu --peer peer_transformers.py --peer-python /path/to/python-with-torch

The engine is timed before and after the peer, so that a machine that grows slower or faster shows. The peer is any
script that takes `--device cpu --dtype float32 --model llama150m --workloads ...` and prints lines
`RESULT {"engine": ..., "workload": ..., "out_tok_s": ...}` for the request sets of `benchmarks/workloads.py`.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from benchmarks.common import longest, peer_results, random_llm, report, time_workload

SHAPE = "llama150m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="cpu1,cpu8,cpumix")
    parser.add_argument(
        "--repeats", type=int, default=2, help="measured runs of each workload, before and after the peer"
    )
    parser.add_argument("--peer", type=Path, help="script of the other engine; without it the engine runs alone")
    parser.add_argument("--peer-python", default="python3", help="interpreter that has what the peer needs")
    parser.add_argument("--peer-args", default="--modes gen,cb --compile 0 --cache= --reps 1", help="more for the peer")
    args = parser.parse_args()

    workloads = args.workloads.split(",")
    ours: dict[str, list[float]] = defaultdict(list)
    peers: dict[str, dict[str, float]] = defaultdict(dict)
    with random_llm(SHAPE, dtype="float32", max_model_len=longest(SHAPE, workloads)) as llm:
        for half in ("before", "after")[: 2 if args.peer else 1]:
            for name in workloads:
                result = time_workload(llm, SHAPE, name, args.repeats, warmups=half == "before")
                report(result | {"engine": "jaxengine", "when": half})
                ours[name].append(result["out_tok_s"])
            if args.peer and half == "before":
                options = f"--device cpu --dtype float32 --model {SHAPE} --workloads {args.workloads} {args.peer_args}"
                for row in peer_results(f"{args.peer_python} {args.peer.resolve()} {options}"):
                    report(row)
                    peers[row["workload"]][row["engine"]] = row["out_tok_s"]
    print(f"\noutput tokens/s, {SHAPE}, float32, {os.cpu_count()} cores")
    for name in workloads:
        speeds = " and ".join(f"{speed:.1f}" for speed in ours[name])
        line = f"{name:<8} jaxengine {speeds}"
        if peers[name]:
            best = max(peers[name].values())
            line += f"; {', '.join(f'{k} {v:.1f}' for k, v in peers[name].items())}; {min(ours[name]) / best:.2f} times"
        print(line)


if __name__ == "__main__":
    main()
