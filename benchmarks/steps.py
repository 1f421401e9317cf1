"""What one step costs on the device, by what it computes: queued back to back, and op by op from a profile.

    python -m benchmarks.steps --model llama1b --shapes 1x256,64x768,256x640+7x512 --profile 256x768

`256x640*4` are four steps in one call. `queued` is the device's time of a step when the host is far ahead, `ahead`
that of a step when one more call is queued behind its own (as in the engine), `wait` when each call is waited for,
and `call` the host's time for submitting one. A profile is listed by op (see `roofline`) and by kernel.
"""

import argparse
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common import random_llm, rates
from benchmarks.profiles import Kernel, keep_names, median_step, name_of, profile
from benchmarks.roofline import costs, reached, table
from benchmarks.workloads import SHAPES, Shape, Work
from jaxengine.step import SlotWrite, StepInputs, packed_size, unpack

# XLA's own kernel for a small sum is a fusion named after jax's operation.
COLLECTIVE = re.compile(r"nccl|psum|all.?(reduce|gather|to.?all)|reduce.?scatter|collective|permute", re.IGNORECASE)


def step_inputs(runner: Any, work: Work, seed: int = 0) -> tuple[StepInputs, StepInputs]:
    """A step with random tokens, pages in random order: with its slots, and without."""
    rng, buckets = np.random.default_rng(seed), runner.buckets
    counts, lengths = (
        [1] * work.rows + [work.tokens] * work.prompts,
        [work.context] * work.rows + [work.tokens] * work.prompts,
    )
    columns = [-(-(length + work.steps - 1) // runner.config.page_size) for length in lengths]
    pages = np.resize(rng.permutation(min(runner.num_pages) - 1) + 1, sum(columns))
    tables = [table.tolist() for table in np.split(pages, np.cumsum(columns)[:-1])]
    writes = [SlotWrite(i, (0,) * 5, (0, 1, 0, 0, 0, 1), [table] * buckets.groups) for i, table in enumerate(tables)]
    rows, tokens = len(counts), sum(counts)
    kind: Any = "mixed" if work.prompts else "decode"
    bucket = buckets.mixed(tokens) if work.prompts else buckets.decode(rows, work.steps)
    packed = np.zeros(packed_size(kind, bucket), np.int32)
    fields = unpack(kind, bucket, packed)
    fields["slots"][:] = fields["page_updates"][:, :, 0] = buckets.max_num_seqs
    fields["slots"][:rows], fields["lengths"][:rows] = np.arange(rows), lengths
    fields["tokens"][:tokens] = rng.integers(2, runner.vocab_size, tokens)
    if not work.prompts:
        fields["counts"][:rows] = work.steps
        first = StepInputs(kind, bucket, packed, "greedy", slot_writes=writes)
        return first, replace(first, slot_writes=())
    starts = np.cumsum([0, *counts])
    blocks = [(i, at) for i in range(work.rows, rows) for at in range(starts[i], starts[i + 1], buckets.block_q)]
    blocks.sort(key=lambda block: starts[block[0]] - block[1])  # many keys first
    fields["token_row"][:] = fields["block_row"][:] = -1
    fields["positions"][:tokens] = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts)])
    fields["token_row"][:tokens] = np.repeat(np.arange(rows), counts)
    fields["q_start"][:rows], fields["q_len"][:rows] = starts[:-1], counts
    fields["block_row"][: len(blocks)], fields["block_start"][: len(blocks)] = np.transpose(blocks)
    fields["logit_index"][:rows] = starts[1:] - 1
    head = buckets.head(rows)
    head_packed = np.zeros(packed_size("head", head), np.int32)
    head_fields = unpack("head", head, head_packed)
    head_fields["slots"][:] = buckets.max_num_seqs
    head_fields["slots"][:rows], head_fields["positions"][:rows] = np.arange(rows), lengths
    first = StepInputs(kind, bucket, packed, "greedy", head, head_packed, slot_writes=writes)
    return first, replace(first, slot_writes=())


def time_steps(runner: Any, work: Work, calls: int = 100) -> dict[str, float]:
    """Milliseconds a step; of `call`, a call."""
    first, inputs = step_inputs(runner, work)
    runner.submit(first).result()
    for _ in range(3):
        runner.submit(inputs).result()
    begin = time.perf_counter()
    [runner.submit(inputs) for _ in range(calls)][-1].result()
    queued = (time.perf_counter() - begin) / calls
    call_seconds, flight = [], runner.submit(inputs)
    begin = time.perf_counter()
    for _ in range(calls):
        called = time.perf_counter()
        ahead = runner.submit(inputs)
        call_seconds.append(time.perf_counter() - called)
        flight.result()
        flight = ahead
    one_ahead = (time.perf_counter() - begin) / calls
    flight.result()
    begin = time.perf_counter()
    for _ in range(20):
        runner.submit(inputs).result()
    waited = (time.perf_counter() - begin) / 20
    seconds = {"queued": queued, "ahead": one_ahead, "wait": waited}
    return {name: value * 1e3 / work.steps for name, value in seconds.items()} | {
        "call": statistics.median(call_seconds) * 1e3
    }


def profile_step(runner: Any, work: Work, steps: int = 10) -> list[list[Kernel]]:
    """The kernels of each of `steps` steps, as `profiles.profile` has them; the programs are compiled by then."""
    first, inputs = step_inputs(runner, work)
    runner.submit(first).result()
    runner.submit(inputs).result()
    return profile(runner, inputs, steps)


def by_name(steps: Sequence[Sequence[Kernel]]) -> list[tuple[str, float, float]]:
    """(kernel without its number, calls a step, microseconds a step) of profiled steps, the most costly first."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for kernel in (kernel for step in steps for kernel in step):
        spent[name_of(kernel.name)].append(kernel.us)
    found = [(name, len(us) / len(steps), sum(us) / len(steps)) for name, us in spent.items()]
    return sorted(found, key=lambda kernel: -kernel[2])


def in_collectives(kernels: list[tuple[str, float, float]], shape: Shape, work: Work, devices: int) -> dict[str, Any]:
    """What of a profiled call is spent in collectives over so many devices, waiting for the others included, beside the
    bytes that each sends around a ring for two sums a layer and the embedding's; GB/s of that."""
    found = [kernel for kernel in kernels if COLLECTIVE.search(kernel[0])]
    us, rows = sum(us for *_, us in found), work.rows * work.steps + work.prompts * work.tokens
    sent = (2 * shape.num_layers + 1) * 2 * (devices - 1) / devices * rows * shape.hidden_size * 2
    return {
        "kernels_us": sum(us for *_, us in kernels),
        "collectives_us": us,
        "collectives": sum(count for _, count, _ in found),
        "sent_bytes": sent,
        "GB/s": sent / us / 1e3 if us else 0.0,
        "names": [f"{name[:60]}: {count:.0f} x {us / count:.1f} us" for name, count, us in found[:5]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument("--shapes", default="1x256,64x768,256x768", help="see Work.parse; several with commas")
    parser.add_argument("--profile", default="", help="shapes of which each kernel is listed")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    args = parser.parse_args()

    keep_names()
    shape = SHAPES[args.model]
    bandwidth, flops = rates()
    options = {"attention": args.attention, "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs}
    with random_llm(args.model, **options) as llm:
        runner = llm._runner
        print(f"{args.model}\n{'step':>18}{'floor':>9}{'queued':>9}{'share':>7}{'ahead':>9}{'wait':>9}{'call':>8} ms")
        for name in args.shapes.split(","):
            floor = (work := Work.parse(name)).floor_ms(shape, bandwidth, flops)
            ms = time_steps(runner, work)
            print(f"{name:>18}{floor:9.3f}{ms['queued']:9.3f}{floor / ms['queued']:7.2f}"
                  f"{ms['ahead']:9.3f}{ms['wait']:9.3f}{ms['call']:8.3f}", flush=True)  # fmt: skip
        for name in filter(None, args.profile.split(",")):
            kernels = median_step(profile_step(runner, work := Work.parse(name)))
            print(f"{name}\n{table(reached(kernels, costs(shape, work), bandwidth, flops), kernels)}")
            for plain, count, us in by_name([kernels])[:40]:
                print(f"{us:9.1f} us {count:4.0f} x {us / count:8.2f}  {plain[:110]}")


if __name__ == "__main__":
    main()
