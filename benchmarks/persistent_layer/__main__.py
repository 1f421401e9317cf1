"""Prototype: the layer of a decode step as one persistent kernel (Hopper), beside the kernels that the engine runs.

    python -m benchmarks.persistent_layer --model llama1b --rows 1 --context 257 --flight 0,2 --stamps

No engine code uses it: so far it has not won, see the log in README.md. First it is compared with float32 (a single
layer, fresh inputs), then both are timed, all layers in one program; with `--stamps`, then, when its programs come
where. Worth an engine path would be 1.3 times the engine's layer at 1 to 8 rows of the 1B and of Qwen3-0.6B.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import rates, report
from benchmarks.persistent_layer.plan import PRODUCTS, ROWS, STAMPS, Inputs, Plan, factors, layer_reference
from benchmarks.workloads import SHAPES
from jaxengine.layers.activation import ACTIVATIONS
from jaxengine.layers.ops import Implementation, ops


def plan_of(model: str, **options: Any) -> Plan:
    s = SHAPES[model]
    normed = s.model_type == "qwen3"
    sizes = s.hidden_size, s.num_heads, s.num_kv_heads, s.head_dim, s.intermediate_size
    return Plan(*sizes, normed=normed, eps=1e-6 if normed else 1e-5, **options)


class Layers(NamedTuple):
    """Random layers and what a step of them is given; the next layer's q k v product belongs to a layer."""

    weights: list[tuple[jax.Array, ...]]
    pools: list[tuple[jax.Array, jax.Array]]  # [pages * kv_heads, page_size, dim]
    rest: Inputs  # but for these


def random_layers(plan: Plan, context: int, count: int, seed: int = 0) -> Layers:
    """Rows of `context` tokens, the new one included, their pages in random order."""
    keys = iter(jax.random.split(jax.random.key(seed), 16 + 6 * count))

    @partial(jax.jit, static_argnums=1)
    def normal(key, shape, scale=1.0):
        return jax.random.normal(key, shape) * scale

    def narrow(shape, scale=1.0):
        return normal(next(keys), shape, scale).astype(jnp.bfloat16)

    def gain(size):
        return 1 + 0.1 * normal(next(keys), (size,))

    weights = [tuple(narrow(shape, shape[0] ** -0.5) for shape in plan.shapes) for _ in range(count)]
    columns = -(-context // plan.page_size)
    pages = 1 + np.random.default_rng(seed).permutation(ROWS * columns).reshape(ROWS, columns)
    pool = (1 + ROWS * columns) * plan.kv_heads, plan.page_size, plan.dim
    pools = [(narrow(pool), narrow(pool)) for _ in range(count)]
    turn = 6 * jax.random.uniform(next(keys), (ROWS, plan.dim // 2))
    head_gains = [gain(plan.dim) for _ in range(2 if plan.normed else 0)]
    rest = Inputs(
        (), narrow((ROWS, plan.shapes[-1][1])), normal(next(keys), (ROWS, plan.hidden)),
        (gain(plan.hidden), gain(plan.hidden)), tuple(jnp.stack([g, jnp.roll(g, plan.dim // 2)]) for g in head_gains),
        jnp.asarray(pages, jnp.int32), jnp.full(ROWS, context, jnp.int32), factors(jnp.cos(turn), jnp.sin(turn)),
        (), (),
    )  # fmt: skip
    return Layers(weights, pools, rest)


def persistent(plan: Plan, weights: Sequence, pools: Sequence, rest: Inputs) -> tuple[list, list]:
    """All layers, each the kernel once -> its outputs and pools. A program that returns all of them has the host make
    hundreds of arrays, which takes it longer than the kernels take.
    """
    from benchmarks.persistent_layer.kernel import layer, new_state  # imports Mosaic GPU

    state, outputs, written = new_state(plan), [], []

    @jax.jit  # traced once, as the layers differ in their arrays only
    def run(weights, qkv, hidden, k_pages, v_pages, state):
        pools = jax.new_ref(k_pages), jax.new_ref(v_pages)
        inputs = rest._replace(weights=weights, qkv=qkv, hidden=hidden, k_pages=pools[0], v_pages=pools[1])
        return layer(plan, inputs, state), pools[0][...], pools[1][...]

    qkv, hidden = rest.qkv, rest.hidden
    for of_layer, pool in zip(weights, pools):
        out, *pool = run(of_layer, qkv, hidden, *pool, state)
        qkv, hidden = out.products[-1], out.hidden[-1]
        outputs.append(out)
        written.append(tuple(pool))
    return outputs, written


def last_of(plan: Plan, *arguments: Any) -> tuple[Any, list]:
    """As `engines`: of the last layer q, k, v and stream; and pools."""
    outputs, pools = persistent(plan, *arguments)
    return (outputs[-1].products[-1], outputs[-1].hidden[-1]), pools


def stamps_of(plan: Plan, *arguments: Any) -> tuple[Any, list]:
    """Of the layer in the middle; and pools."""
    outputs, pools = persistent(plan, *arguments)
    return outputs[len(outputs) // 2].stamps, pools


def engines(
    plan: Plan, implementation: Implementation, weights: Sequence, pools: Sequence, rest: Inputs
) -> tuple[Any, list]:
    """The same by the engine's operations, as `models.llama` has them -> the last q, k, v and stream, and pools."""
    op, silu, dtype = ops(implementation), ACTIVATIONS["silu"], rest.qkv.dtype
    rows = max(2, plan.rows)  # as the engine's steps
    lengths, table = rest.lengths[:rows], rest.table[:rows]
    page = jnp.take_along_axis(table, (lengths[:, None] - 1) // plan.page_size, axis=1)[:, 0]
    cos, sin = rest.angles[0, :rows, : plan.dim // 2], rest.angles[1, :rows, plan.dim // 2 :]
    scales = [gain[0].astype(dtype) for gain in rest.head_gains]
    qkv, hidden, written = rest.qkv[:rows], rest.hidden[:rows].astype(dtype), []
    for (o, gate_up, down, next_qkv), of_layer in zip(weights, pools):
        heads, shape = qkv.reshape(rows, -1, plan.dim), (-1, plan.kv_heads, plan.page_size, plan.dim)
        kv = [pool.reshape(shape) for pool in of_layer]
        offset = (lengths - 1) % plan.page_size
        q, *kv = op.rope_write(*kv, heads, cos, sin, page, offset, *scales, eps=plan.eps)
        options: dict[str, Any] = {"scale": plan.dim**-0.5, "window": None, "softcap": None}
        y = op.paged_decode(q[:, None], *kv, table, lengths, **options).reshape(rows, -1)
        hidden, y = op.add_rms_norm(hidden, y @ o, rest.gains[0].astype(dtype), eps=plan.eps)
        y = op.gated_activation(y @ gate_up, silu)
        hidden, y = op.add_rms_norm(hidden, y @ down, rest.gains[1].astype(dtype), eps=plan.eps)
        qkv = y @ next_qkv
        written.append(tuple(pool.reshape(-1, plan.page_size, plan.dim) for pool in kv))
    return (qkv, hidden), written


def error(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(plan: Plan, context: int, seed: int) -> dict[str, float]:
    """Relative errors of a layer against float32, in which what comes before a value is float32 too."""
    layers = random_layers(plan, context, 1, seed)
    expected, *pools = jax.jit(layer_reference, static_argnums=0)(
        plan, layers.rest._replace(weights=layers.weights[0], k_pages=layers.pools[0][0], v_pages=layers.pools[0][1])
    )
    (found,), written = jax.jit(partial(persistent, plan))(layers.weights, layers.pools, layers.rest)
    names = "attended", *(f"product {p}" for p in PRODUCTS), "hidden 0", "hidden 1"
    values = [[out.attended, *out.products, *out.hidden] for out in (found, expected)]
    errors = {name: error(a[: plan.rows], b) for name, a, b in zip(names, *values)}
    return errors | {name: error(a, b) for name, a, b in zip(("k pages", "v pages"), written[0], pools)}


def microseconds(step: Callable, layers: Layers, calls: int = 12, repeats: int = 5) -> tuple[float, Any]:
    """Of a layer, calls queued, median of several times; and what the last step gave beside the pools."""
    program, times = jax.jit(step, donate_argnums=1), []
    pools = jax.tree.map(lambda pool: pool + 0, layers.pools)  # they are donated
    for _ in range(3):
        results, pools = program(layers.weights, pools, layers.rest)
    jax.block_until_ready(results)
    for _ in range(repeats):
        begin = perf_counter()
        for _ in range(calls):
            results, pools = program(layers.weights, pools, layers.rest)
        jax.block_until_ready(results)
        times.append((perf_counter() - begin) / calls)
    return statistics.median(times) / len(layers.weights) * 1e6, results


def print_stamps(stamps: np.ndarray) -> None:
    """Of one layer, int32 [programs, STAMPS]: microseconds from the first program's start; least, median, most."""
    since = (stamps.astype(np.int64) - stamps[:, 0].min()) / 1e3
    for name, of_programs in zip(STAMPS, since.T):
        print(f"{name:>16} {of_programs.min():6.1f} {np.median(of_programs):6.1f} {of_programs.max():6.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama1b", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=257)
    parser.add_argument("--layers", type=int, default=0, help="instead of the model's")
    parser.add_argument("--parts", type=int, default=4, help="of a row's keys")
    parser.add_argument("--programs", type=int, default=128)
    parser.add_argument("--flight", default="0,2", help="units of weights under way at a time, 0 = as many as fit")
    parser.add_argument("--stamps", action="store_true")
    args = parser.parse_args()
    count = args.layers or SHAPES[args.model].num_layers
    plan = partial(plan_of, args.model, rows=args.rows, parts=args.parts, programs=args.programs)
    flights = [int(n) for n in args.flight.split(",")]
    bandwidth, _ = rates()
    errors = check(plan(flight=flights[0]), args.context, seed=1)
    report({"model": args.model, "rows": args.rows, "errors": {name: f"{e:.1e}" for name, e in errors.items()}})
    if not max(errors.values()) < 1e-2:
        raise SystemExit("the kernel is wrong")
    layers = random_layers(plan(), args.context, count)
    floor = sum(weight.nbytes for weight in layers.weights[0]) / bandwidth * 1e6
    steps = {"engine's kernels": partial(engines, plan(), "triton")}
    steps |= {f"persistent, flight {n}": partial(last_of, plan(flight=n)) for n in flights}
    for name, step in steps.items():
        found, _ = microseconds(step, layers)
        report({"model": args.model, "rows": args.rows, "context": args.context, "layer by": name, "us": found,
                "share of the weights' floor": floor / found})  # fmt: skip
    for n in flights if args.stamps else ():
        _, stamps = microseconds(partial(stamps_of, plan(flight=n, stamped=True)), layers, repeats=1)
        print(f"flight {n}, layer {count // 2}, microseconds of the programs: least, median, most")
        print_stamps(np.asarray(stamps))


if __name__ == "__main__":
    main()
