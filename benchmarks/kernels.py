"""The attention kernels' speed on a GPU, as shares of what the card reads and multiplies in the same run.

    python3 -m benchmarks.kernels

Each call runs an op several times in one program, each time on other pages than the last (more than the L2 holds) and
on the result of the one before. A sample is many calls queued; the figure is the median of the samples.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels

# Of an H200, through JAX. A run that does not reach them was disturbed, or ran on another card.
READ_BYTES_PER_S, MATMUL_FLOPS = 4.44e12, 790e12
TOLERANCE = 0.03
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16  # Llama-3.1-8B
DECODE = [(128, 1024), (32, 2048), (8, 32768), (1, 8192)]  # rows, context
EXTEND = [2048, 8192]  # new tokens of one row
WRITE = [128, 8192]  # tokens
BLOCK_Q = 32
L2_BYTES = 60e6
SAMPLE_S, PAUSE_S = 0.02, 0.1


def seconds(call: Callable[[], Any], ops: int, samples: int = 9) -> tuple[float, float]:
    """Median time per op of `call`, which queues `ops` of them, and the spread: the quartiles' distance over it.

    A sample queues calls for SAMPLE_S before it waits for the last, as waiting alone costs 0.3 ms. Samples stand
    PAUSE_S apart, so that the card's power limit does not lower its clock.
    """

    def sample(calls: int) -> float:
        time.sleep(PAUSE_S)
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        return time.perf_counter() - begin

    sample(3)
    calls = max(1, math.ceil(10 * SAMPLE_S / sample(10)))
    low, median, high = np.percentile([sample(calls) / (calls * ops) for _ in range(samples)], [25, 50, 75])
    return float(median), float((high - low) / median)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))()


def read_rate() -> float:
    """Bytes per second of a sum over 4.3 GB."""
    x = normal(0, 2**15, 2**16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return x.nbytes / seconds(lambda: total(x), 1)[0]


def matmul_rate() -> float:
    """Operations per second of a bfloat16 product of 8192^3."""
    n = 8192
    a, b = normal(0, n, n), normal(1, n, n)
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / seconds(lambda: product(a, b), 1)[0]


def paged_inputs(rows: int, context: int) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """K and V pools and enough page tables, disjoint and in random order, for their bytes to exceed the L2 thrice."""
    pages = rows * context // PAGE
    copies = 1 + int(3 * L2_BYTES // (rows * context * 4 * KV_HEADS * DIM))
    tables = np.random.default_rng(0).permutation(copies * pages).reshape(copies, rows, context // PAGE) + 1
    k_pages, v_pages = (normal(seed, copies * pages + 1, KV_HEADS, PAGE, DIM) for seed in (1, 2))
    return k_pages, v_pages, [jnp.asarray(table, jnp.int32) for table in tables]


def time_decode(rows: int, context: int) -> dict:
    k_pages, v_pages, tables = paged_inputs(rows, context)
    tables = tables * max(1, 16 // len(tables))
    lengths = jnp.full((rows,), context, jnp.int32)
    decode = partial(kernels.paged_decode, scale=DIM**-0.5)

    @jax.jit
    def chain(q, k_pages, v_pages, tables, lengths):
        for table in tables:
            q = decode(q, k_pages, v_pages, table, lengths)
        return q

    q = normal(3, rows, 1, HEADS, DIM)
    reference = partial(kernels.paged_decode_reference, scale=DIM**-0.5)
    out, expected = (function(q, k_pages, v_pages, tables[0], lengths) for function in (decode, reference))
    time_s, spread = seconds(lambda: chain(q, k_pages, v_pages, tables, lengths), len(tables))
    size = rows * context * KV_HEADS * DIM * 4
    return {"op": f"decode {rows} x {context}", "us": time_s * 1e6, "spread": spread, "bytes": size,
            "bytes_per_s": size / time_s, "error": error(out, expected)}  # fmt: skip


def time_extend(tokens: int) -> list[dict]:
    """One row of new tokens only, beside cuDNN's attention on the same keys and values laid out densely."""
    k_pages, v_pages, tables = paged_inputs(1, tokens)
    tables = tables[:4]
    starts = jnp.arange(0, tokens, BLOCK_Q, dtype=jnp.int32)
    one = partial(jnp.full, (1,), dtype=jnp.int32)
    index = jnp.zeros_like(starts), starts, one(0), one(tokens), one(tokens)
    extend = partial(kernels.paged_extend, block_q=BLOCK_Q, scale=DIM**-0.5)
    dense = [tuple(pool[table[0]].swapaxes(1, 2).reshape(1, tokens, KV_HEADS, DIM) for pool in (k_pages, v_pages))
             for table in tables]  # fmt: skip
    attention = partial(jax.nn.dot_product_attention, is_causal=True, scale=DIM**-0.5, implementation="cudnn")

    @jax.jit
    def paged(q, k_pages, v_pages, tables, index):
        for table in tables:
            q = extend(q, k_pages, v_pages, table, *index)
        return q

    @jax.jit
    def cudnn(q, dense):
        for k, v in dense:
            q = attention(q, k, v)
        return q

    q = normal(3, tokens, HEADS, DIM)
    difference = error(paged(q, k_pages, v_pages, tables[:1], index), cudnn(q[None], dense[:1])[0])
    flops = 2 * 2 * HEADS * DIM * tokens * (tokens + 1) / 2
    results = []
    for name, call in (("extend", lambda: paged(q, k_pages, v_pages, tables, index)),
                       ("cudnn", lambda: cudnn(q[None], dense))):  # fmt: skip
        time_s, spread = seconds(call, len(tables))
        results.append({"op": f"{name} {tokens}", "us": time_s * 1e6, "spread": spread, "flops": flops,
                        "flops_per_s": flops / time_s, "error": difference})  # fmt: skip
    return results


def time_write(tokens: int) -> dict:
    """Bytes are counted twice: the new keys and values are read and written."""
    ops, pages = 16, 2**16
    pools = [normal(seed, pages, KV_HEADS, PAGE, DIM) for seed in (1, 2)]
    k, v = normal(3, tokens, KV_HEADS, DIM), normal(4, tokens, KV_HEADS, DIM)
    slots = PAGE + np.random.default_rng(0).permutation((pages - 1) * PAGE)[: ops * tokens].reshape(ops, tokens)
    page, offset = jnp.asarray(slots // PAGE, jnp.int32), jnp.asarray(slots % PAGE, jnp.int32)

    @partial(jax.jit, donate_argnums=(0, 1))
    def chain(k_pages, v_pages, k, v, page, offset):
        for i in range(ops):
            k_pages, v_pages = kernels.kv_write(k_pages, v_pages, k, v, page[i], offset[i])
        return k_pages, v_pages

    def call():
        pools[:] = chain(*pools, k, v, page, offset)
        return pools

    time_s, spread = seconds(call, ops)
    written = pools[0][page[-1], :, offset[-1]]
    size = tokens * KV_HEADS * DIM * 2 * 4
    return {"op": f"kv_write {tokens}", "us": time_s * 1e6, "spread": spread, "bytes": size,
            "bytes_per_s": size / time_s, "error": error(written, k)}  # fmt: skip


def error(out: jax.Array, expected: jax.Array) -> float:
    """Relative to the norm of `expected`."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def main() -> int:
    if jax.default_backend() != "gpu":
        print("benchmarks.kernels needs a GPU")
        return 1
    read, matmul = read_rate(), matmul_rate()
    void = abs(read / READ_BYTES_PER_S - 1) > TOLERANCE or abs(matmul / MATMUL_FLOPS - 1) > TOLERANCE
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: reads {read / 1e12:.2f} TB/s, "
          f"multiplies {matmul / 1e12:.0f} TFLOP/s")  # fmt: skip
    if void:
        print(f"This run is VOID: expected {READ_BYTES_PER_S / 1e12:.2f} TB/s and {MATMUL_FLOPS / 1e12:.0f} TFLOP/s "
              f"within {TOLERANCE:.0%}.")  # fmt: skip
    results = [time_decode(*shape) for shape in DECODE]
    results += [result for tokens in EXTEND for result in time_extend(tokens)]
    results += [time_write(tokens) for tokens in WRITE]
    print(f"{'op':20}{'us':>10}{'spread':>8}{'rate':>16}{'share':>7}{'error':>9}")
    for result in results:
        rate, limit = ("bytes_per_s", read) if "bytes" in result else ("flops_per_s", matmul)
        result["share"] = result[rate] / limit
        unit = "TB/s" if "bytes" in result else "TFLOP/s"
        print(f"{result['op']:20}{result['us']:10.1f}{result['spread']:8.1%}{result[rate] / 1e12:9.2f} {unit:6}"
              f"{result['share']:7.2f}{result['error']:9.1e}")  # fmt: skip
    print(json.dumps({"void": bool(void), "read_bytes_per_s": read, "matmul_flops": matmul, "jax": jax.__version__,
                      "results": results}))  # fmt: skip
    return int(void)


if __name__ == "__main__":
    sys.exit(main())
