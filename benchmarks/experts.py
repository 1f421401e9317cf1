"""The grouped product of a mixture of experts on the CPU, in float32, in tiles of one expert each; beside `ragged_dot`,
and every row with every expert.

    python -m benchmarks.experts
"""

import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import report
from jaxengine.layers.xla_grouped import grouped_matmul
from pallas_kernels import grouped_matmul_reference

SHAPES = ((8, 2, 512, 1024), (64, 8, 512, 256), (128, 8, 1024, 384))  # experts, of a token, in, out
TOKENS = (1, 8, 64, 512)
OPS: dict[str, Callable[..., jax.Array]] = {
    "tiles": grouped_matmul,
    "ragged_dot": partial(jax.lax.ragged_dot, precision=jax.lax.Precision.HIGHEST),
    "all": grouped_matmul_reference,
}


def main() -> None:
    rng = np.random.default_rng(0)
    for count, per_token, size_in, size_out in SHAPES:
        kernel = jnp.asarray(rng.standard_normal((count, size_in, size_out)), jnp.float32)
        for tokens in TOKENS:
            chosen = np.argsort(rng.random((tokens, count)), axis=1)[:, :per_token]
            sizes = jnp.asarray(np.bincount(chosen.ravel(), minlength=count), jnp.int32)
            x = jnp.asarray(rng.standard_normal((tokens * per_token, size_in)), jnp.float32)
            times = {f"{name}_ms": round(1e3 * best_of(jax.jit(op), x, kernel, sizes), 2) for name, op in OPS.items()}
            report({"experts": count, "per_token": per_token, "in": size_in, "out": size_out, "tokens": tokens} | times)


def best_of(call: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
