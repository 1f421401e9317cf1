"""What one decode step costs on the device, by rows and context: queued back to back, and op by op from a profile.

    python -m benchmarks.steps --model llama1b --shapes 1x256,64x768,256x768 --profile 256x768

`queued` is the device's time of a step when the host is far ahead, `call` the host's time for one, `wait` the time of a
step when each is waited for. A profile runs without command buffers, so its sum is more than `queued`.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import random_llm, rates
from benchmarks.workloads import SHAPES


def decode_inputs(runner: Any, rows: int, context: int, seed: int = 0) -> tuple[Any, Any]:
    """A decode step of `rows` rows with `context` tokens each, pages in random order: with its slots, and without."""
    from dataclasses import replace

    from jaxengine.step import SlotWrite, StepInputs, packed_size, unpack

    bucket = runner.buckets.decode(rows)
    columns = -(-context // runner.config.page_size)
    pages = np.random.default_rng(seed).permutation(min(runner.num_pages) - 1)[: rows * columns] + 1
    tables = np.resize(pages, (rows, columns)).tolist()
    packed = np.zeros(packed_size("decode", bucket), np.int32)
    fields = unpack("decode", bucket, packed)
    fields["slots"][:] = runner.buckets.max_num_seqs
    fields["page_updates"][:, :, 0] = runner.buckets.max_num_seqs
    fields["tokens"][:rows], fields["slots"][:rows], fields["lengths"][:rows] = -1, np.arange(rows), context
    writes = [
        SlotWrite(i, (0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 1), [table] * bucket.groups) for i, table in enumerate(tables)
    ]
    first = StepInputs("decode", bucket, packed, "greedy", slot_writes=writes)
    return first, replace(first, slot_writes=())


def time_steps(runner: Any, rows: int, context: int, steps: int = 100) -> dict[str, float]:
    """Milliseconds a step."""
    first, inputs = decode_inputs(runner, rows, context)
    runner.submit(first).result()
    for _ in range(3):
        runner.submit(inputs).result()
    begin = time.perf_counter()
    flights = [runner.submit(inputs) for _ in range(steps)]
    called = time.perf_counter() - begin
    flights[-1].result()
    queued = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(20):
        runner.submit(inputs).result()
    waited = (time.perf_counter() - begin) / 20
    return {"queued": queued / steps * 1e3, "call": called / steps * 1e3, "wait": waited * 1e3}


def profile_step(runner: Any, rows: int, context: int, steps: int = 10) -> list[tuple[str, float, float]]:
    """(kernel, calls a step, microseconds a step) of the device's kernels, the most costly first."""
    import jax

    first, inputs = decode_inputs(runner, rows, context)
    runner.submit(first).result()
    runner.submit(inputs).result()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            flights = [runner.submit(inputs) for _ in range(steps)]
            flights[-1].result()
        trace = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
        spent: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for plane in trace.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    name = re.sub(r"[._]?\d+$", "", re.sub(r"[._]?\d+$", "", event.name))
                    spent[name] += event.duration_ns
                    calls[name] += 1
    return [(name, calls[name] / steps, ns / 1e3 / steps) for name, ns in spent.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument("--shapes", default="1x256,64x768,256x768", help="ROWSxCONTEXT, several with commas")
    parser.add_argument("--profile", default="", help="shapes of which each kernel is listed")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args = parser.parse_args()

    shape = SHAPES[args.model]
    bandwidth, flops = rates(2**32, 8192)
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s, matrix products {flops / 1e12:.0f} TFLOP/s", flush=True)
    options = {"attention": args.attention, "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs}
    with random_llm(args.model, **options) as llm:
        runner = llm._runner
        print(f"{args.model}\n{'rows':>5}{'context':>9}{'floor':>9}{'queued':>9}{'share':>7}{'call':>8}{'wait':>9} ms")
        for name in args.shapes.split(","):
            rows, context = map(int, name.split("x"))
            floor = (2 * shape.parameters_read + rows * context * shape.kv_bytes()) / bandwidth * 1e3
            ms = time_steps(runner, rows, context)
            print(f"{rows:5}{context:9}{floor:9.3f}{ms['queued']:9.3f}{floor / ms['queued']:7.2f}"
                  f"{ms['call']:8.3f}{ms['wait']:9.3f}", flush=True)  # fmt: skip
        for name in filter(None, args.profile.split(",")):
            rows, context = map(int, name.split("x"))
            kernels = profile_step(runner, rows, context)
            print(
                f"{name}: {sum(count for _, count, _ in kernels):.0f} kernels, {sum(us for *_, us in kernels):.0f} us"
            )
            for kernel, count, us in kernels[:40]:
                print(f"{us:9.1f} us {count:6.1f} x {us / count:8.2f}  {kernel[:110]}")


if __name__ == "__main__":
    main()
