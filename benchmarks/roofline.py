"""What each op of a step must compute and move, and which share of the device's limits it reaches.

An op's limit is the time that its operations take at the rate of matrix products, or its bytes at the read bandwidth,
whichever is longer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.profiles import Kernel, span
from benchmarks.workloads import Shape, Work

# The names in a kernel's path, and the op each is counted as.
OPS = {
    "embed": "embedding",
    "add_rms_norm": "norms",
    "all_reduce_rms_norm": "norms",
    "norm": "norms",
    "qkv_proj": "q k v",
    "rope_write": "rotation, KV write",
    "paged_decode": "decode attention",
    "paged_extend": "extend attention",
    "o_proj": "o",
    "gate_up_proj": "gate and up",
    "gated_activation": "activation",
    "down_proj": "down",
    "head": "head",
    "sample": "sampling",
}
WHOLE, OTHER = "whole layers", "other"
OPS["decode_layer"] = WHOLE
OF_LAYER = ("norms", "q k v", "rotation, KV write", "decode attention", "o", "gate and up", "activation", "down")


class Cost(NamedTuple):
    """The least that an op must do."""

    flops: float
    bytes: float  # inputs read once, results written once

    def seconds(self, bandwidth: float, flops: float) -> float:
        return max(self.bytes / bandwidth, self.flops / flops)


class Reached(NamedTuple):
    """An op of a step."""

    op: str
    kernels: int
    us: float
    cost: Cost | None  # None: nothing that a step must do
    share: float  # of its limit: the time that its cost takes at the device's rates, over the time it took


def costs(shape: Shape, work: Work) -> dict[str, Cost]:
    """Of the ops of a call in bfloat16, padding not counted."""
    if work.steps > 1:
        each = [costs(shape, replace(work, context=work.context + i, steps=1)) for i in range(work.steps)]
        return {op: Cost(*map(sum, zip(*(cost[op] for cost in each)))) for op in each[0]}
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    prompt_tokens, sampled = work.prompts * work.tokens, work.rows + work.prompts
    tokens, keys = work.rows + prompt_tokens, work.rows * work.context
    pairs = work.prompts * work.tokens * (work.tokens + 1) // 2  # of query and key

    def product(width: int, out: int, rows: int = tokens, out_bytes: int = 2) -> Cost:
        return Cost(2 * rows * width * out, 2 * width * (out + rows) + out_bytes * rows * out)

    of_layer = {
        "norms": Cost(2 * 5 * tokens * hidden, 2 * 2 * 4 * tokens * hidden),  # two, each with the sum before it
        "q k v": product(hidden, q + 2 * kv),
        "rotation, KV write": Cost(3 * tokens * (q + kv), 2 * 2 * tokens * (q + 2 * kv)),
        "decode attention": Cost(4 * keys * q, 2 * (2 * keys * kv + 2 * work.rows * q)),
        "extend attention": Cost(4 * pairs * q, 2 * prompt_tokens * (2 * kv + 2 * q)),
        "o": product(q, hidden),
        "gate and up": product(hidden, 2 * inner),
        "activation": Cost(5 * tokens * inner, 2 * 3 * tokens * inner),
        "down": product(inner, hidden),
    }
    once = {
        "embedding": Cost(0, 2 * 2 * tokens * hidden),
        "head": product(hidden, shape.vocab_size, sampled, 4),
        "sampling": Cost(sampled * shape.vocab_size, 4 * sampled * shape.vocab_size),
    }
    return {op: Cost(layers * cost.flops, layers * cost.bytes) for op, cost in of_layer.items() if cost.bytes} | once


def op_of(kernel: Kernel) -> str:
    """The innermost name that is an op's."""
    return next((OPS[name] for name in reversed(kernel.path.split("/")) if name in OPS), OTHER)


def reached(kernels: Sequence[Kernel], limits: dict[str, Cost], bandwidth: float, flops: float) -> list[Reached]:
    """By op, the most costly first. Rates in bytes/s and operations/s."""
    by_op: dict[str, list[float]] = {}
    for kernel in kernels:
        by_op.setdefault(op_of(kernel), []).append(kernel.us)
    found = []
    whole = Cost(*map(sum, zip(*(limits[op] for op in OF_LAYER if op in limits))))
    for op, times in by_op.items():
        us, cost = sum(times), whole if op == WHOLE else limits.get(op)
        share = cost.seconds(bandwidth, flops) * 1e6 / us if cost else 0.0
        found.append(Reached(op, len(times), us, cost, share))
    return sorted(found, key=lambda op: -op.us)


def table(ops: Sequence[Reached], kernels: Sequence[Kernel]) -> str:
    """What `reached` gave, for people."""
    busy, whole = sum(op.us for op in ops), span(kernels)
    lines = [f"{len(kernels)} kernels, busy {busy:.0f} us of {whole:.0f}"]
    lines += [f"{'op':<20}{'kernels':>8}{'us':>10}{'of step':>9}{'GFLOP':>10}{'MB':>9}{'of limit':>10}"]
    for op in ops:
        cost = f"{op.cost.flops / 1e9:10.2f}{op.cost.bytes / 1e6:9.1f}{op.share:10.2f}" if op.cost else ""
        lines.append(f"{op.op:<20}{op.kernels:8}{op.us:10.1f}{op.us / busy:9.3f}{cost}")
    return "\n".join(lines)
