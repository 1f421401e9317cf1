"""What the choice of buckets costs: padding against programs to compile, on a device that takes no time.

    python -m benchmarks.buckets --workloads nano,mixed1k

For each way of spacing the sizes: the rows of decode steps and the tokens of steps with prompts that were padding, as
shares of all that were computed, and how many programs the workload used (each is compiled when it is first needed).
"""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.host import PAGE_SIZE, NoDevice
from benchmarks.workloads import SHAPES, requests
from jaxengine.benchmark.serving import fixed_length
from jaxengine.engine.batch import Buckets, bucket_sizes
from jaxengine.engine.engine import Engine
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.sequence import Request
from jaxengine.kv_cache import CacheGroup
from jaxengine.step import StepInputs, unpack
from jaxengine.text import TextSink

VOCAB = SHAPES["llama8b"].vocab_size
ROWS, TOKENS, SMALLEST_ROWS, SMALLEST_TOKENS, BLOCK_Q = 256, 4096, 2, 64, 64  # as on a GPU

Spacing = Callable[[int, int], tuple[int, ...]]  # smallest, largest -> sizes


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    return bucket_sizes(smallest, largest, largest)


def and_halfway(smallest: int, largest: int) -> tuple[int, ...]:
    sizes = powers_of_two(smallest, largest)
    return tuple(sorted({*sizes, *(size + size // 2 for size in sizes[:-1])}))


def multiples(step: int) -> Spacing:
    return partial(bucket_sizes, step=step)


SPACINGS: dict[str, tuple[Spacing, Spacing]] = {  # of rows, of tokens
    "one size": (lambda _, largest: (largest,), lambda _, largest: (largest,)),
    "powers of two": (powers_of_two, powers_of_two),
    "powers of two and halfway": (and_halfway, and_halfway),
    "multiples of 32 rows, 512 tokens": (multiples(32), multiples(512)),
    "multiples of 32 rows, 256 tokens": (multiples(32), multiples(256)),
}


class Recorder(NoDevice):
    """Counts what the steps compute, and what of it is asked for."""

    def __init__(self) -> None:
        super().__init__(ROWS)
        self.computed: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.programs: set[tuple[str, int]] = set()

    def submit(self, inputs: StepInputs) -> NoDevice:
        kind, bucket = inputs.kind, inputs.bucket
        fields = unpack(kind, bucket, inputs.packed)
        real = fields["slots"] < ROWS if kind == "decode" else fields["token_row"] >= 0
        self.computed[kind] += real.size
        self.asked[kind] += int(np.count_nonzero(real))
        self.programs.add((kind, real.size))
        if inputs.head_bucket is not None:
            self.programs.add(("head", inputs.head_bucket.rows))
        return self

    def padding(self, kind: str) -> float:
        return 1 - self.asked[kind] / max(1, self.computed[kind])


def record(workload: str, rows: Spacing, tokens: Spacing) -> Recorder:
    """Runs all requests of the workload, added at once."""
    prompts, lengths = requests(workload, VOCAB)
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths))
    scheduler = Scheduler(
        [CacheGroup((0,), None, 1, 8)], [1 + ROWS * -(-longest // PAGE_SIZE)], page_size=PAGE_SIZE, max_num_seqs=ROWS,
        max_num_batched_tokens=TOKENS, max_model_len=longest, enable_prefix_caching=False,
    )  # fmt: skip
    buckets = Buckets(rows(SMALLEST_ROWS, ROWS), tokens(SMALLEST_TOKENS, TOKENS), BLOCK_Q, PAGE_SIZE, 1, ROWS)
    recorder = Recorder()
    engine = Engine(scheduler, recorder, buckets, TextSink(None), vocab_size=VOCAB)
    for i, (prompt, length) in enumerate(zip(prompts, lengths)):
        engine.add(Request(str(i), None, prompt, fixed_length(length), max_tokens=length, watched=False))
    while engine.has_work:
        engine.step()
    return recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="fixed256,nano,mixed1k")
    args = parser.parse_args()
    print(
        "| workload | sizes | rows that are padding | tokens that are padding | programs used |\n| - | - | - | - | - |"
    )
    for workload in args.workloads.split(","):
        for name, spacings in SPACINGS.items():
            seen = record(workload, *spacings)
            print(f"| `{workload}` | {name} | {seen.padding('decode'):.1%} | {seen.padding('mixed'):.1%} "
                  f"| {len(seen.programs)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
