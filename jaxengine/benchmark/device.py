"""What a device can do, measured: the limits that every figure is a share of."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    """Random bfloat16, made on the device."""
    return _normal(seed, shape)


@partial(jax.jit, static_argnums=1)
def _normal(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def read_rate(size: int = 2**32) -> float:
    """Bytes per second of a sum over `size` bytes: more than any cache holds."""
    x = normal(0, size // 2**17, 2**16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return x.nbytes / seconds(lambda: total(x), 1)[0]


def matmul_rate(n: int = 8192) -> float:
    """Operations per second of a bfloat16 product of n^3."""
    a, b = normal(0, n, n), normal(1, n, n)
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / seconds(lambda: product(a, b), 1)[0]


def upload_rate(size: int = 2**30) -> float:
    """Bytes per second from the host's memory to the first device, in pieces of 64 MiB."""
    device, pieces = jax.devices()[0], np.ones((max(1, size // 2**26), 2**26), np.uint8)

    def upload() -> float:
        begin = time.perf_counter()
        jax.block_until_ready([jax.device_put(piece, device) for piece in pieces])
        return time.perf_counter() - begin

    return pieces.nbytes / min(upload() for _ in range(3))
