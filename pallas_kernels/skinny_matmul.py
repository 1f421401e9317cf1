"""Products of few rows with a weight, which take as long as reading it, for Hopper.

Where the weight has too few columns for all multiprocessors, its rows are cut into parts ("split-K"), which whoever
reads the result next adds up: that costs it less than a kernel that does nothing else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.paged_tile import check_tuning

COLUMNS = 64  # of the result, that a warpgroup has: the rows of a wgmma
MOST_PARTS = 4  # reading more costs the next kernel as much as they save here
SMEM_BYTES = 210_000  # of tiles on their way
Activation = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_k: int  # rows of the weight in a tile
    stages: int  # tiles on their way
    parts: int = 1  # of the weight's rows; one only for `gated_matmul`
    warpgroups: int = 1  # that multiply, of a program

    def __post_init__(self) -> None:
        counts = {"stages": self.stages, "parts": self.parts, "warpgroups": self.warpgroups}
        check_tuning({"block_k": self.block_k}, counts)
        if self.block_k < 64:
            raise ValueError(f"block_k={self.block_k} must be at least 64")


def split_tuning(x, kernel) -> TuningConfig | None:
    """The choice for these arrays (or anything with their shapes and dtypes); None for what gains nothing by it."""
    from pallas_kernels.mosaic_tile import multiprocessors  # costs half a second

    (rows, size), programs, most = x.shape, kernel.shape[1] // COLUMNS, multiprocessors()
    if not _takes(x, kernel, COLUMNS) or rows > 128:
        return None
    for parts in range(MOST_PARTS, 1, -1):
        if most // 3 < programs * parts <= most and size % (parts * 128) == 0:
            return TuningConfig(128, _stages(rows, 128, COLUMNS, size // parts), parts)
    return None


def gated_tuning(x, kernel) -> TuningConfig | None:
    """The same for `gated_matmul`."""
    from pallas_kernels.mosaic_tile import multiprocessors

    (rows, size), columns, most = x.shape, kernel.shape[1] // 2, multiprocessors()
    if not _takes(x, kernel, 2 * COLUMNS) or rows > 64 or size % 128:
        return None
    warpgroups = 1 if columns <= COLUMNS * most else 2  # a second wave of few programs would take as long as the first
    programs, more = divmod(columns, warpgroups * COLUMNS)
    if more or not most // 3 < programs <= most:
        return None
    block_k = 128 // warpgroups
    return TuningConfig(block_k, _stages(rows, block_k, 2 * COLUMNS * warpgroups, size), warpgroups=warpgroups)


def _takes(x, kernel, columns: int) -> bool:
    return (
        x.dtype == kernel.dtype
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and x.shape[0] % 8 == 0
        and kernel.shape[1] % columns == 0
    )


def _stages(rows: int, block_k: int, columns: int, size: int) -> int:
    return min(size // block_k, SMEM_BYTES // (2 * block_k * (rows + columns)))


@partial(jax.jit, static_argnames=("tuning", "interpret"))
def split_matmul(
    x: jax.Array, kernel: jax.Array, *, tuning: TuningConfig | None = None, interpret: bool = False
) -> jax.Array:
    """x @ kernel in parts: float32 [P, T, N], which are to be added up.

    x [T, K], kernel [K, N], both bfloat16 or float16. T is a multiple of 8, N of 64, K of parts and tiles; `tuning`
    has the parts. ValueError for other shapes and dtypes, and without `tuning` for those of which `split_tuning` makes
    none.
    """
    tuning = _checked(x, kernel, tuning or split_tuning(x, kernel), COLUMNS)
    from pallas_kernels.skinny_matmul_mosaic import multiply

    return multiply(x, kernel, None, COLUMNS, **asdict(tuning), interpret=interpret)


@partial(jax.jit, static_argnames="parts")
def split_matmul_reference(x: jax.Array, kernel: jax.Array, parts: int) -> jax.Array:
    """The same as `split_matmul` with so many parts in plain jax.numpy."""
    x = x.reshape(len(x), parts, -1).astype(jnp.float32)
    kernel = kernel.reshape(parts, -1, kernel.shape[1]).astype(jnp.float32)
    return jnp.einsum("tpk,pkn->ptn", x, kernel, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("activation", "tuning", "interpret"))
def gated_matmul(
    x: jax.Array,
    kernel: jax.Array,
    activation: Activation,
    *,
    tuning: TuningConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """activation(x @ kernel[:, :F]) * (x @ kernel[:, F:]), for x [T, K] and kernel [K, 2 F] -> [T, F] (Shazeer 2020).

    Both bfloat16 or float16, T a multiple of 8, F of 64 for each warpgroup, K of the tiles. `activation` is
    elementwise, in float32 as all is until the end. ValueError for other shapes and dtypes, and without `tuning` for
    those of which `gated_tuning` makes none.
    """
    tuning = _checked(x, kernel, tuning or gated_tuning(x, kernel), 2 * COLUMNS)
    if tuning.parts != 1:
        raise ValueError(f"{tuning}: an activation is of whole sums, parts must be 1")
    from pallas_kernels.skinny_matmul_mosaic import multiply

    return multiply(x, kernel, activation, COLUMNS, **asdict(tuning), interpret=interpret)[0]


@partial(jax.jit, static_argnames="activation")
def gated_matmul_reference(x: jax.Array, kernel: jax.Array, activation: Activation) -> jax.Array:
    """The same as `gated_matmul` in plain jax.numpy."""
    product = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    gate, up = jnp.split(product, 2, axis=1)
    return (activation(gate) * up).astype(x.dtype)


def _checked(x, kernel, tuning: TuningConfig | None, columns: int) -> TuningConfig:
    shapes = f"{x.shape=} {x.dtype=} {kernel.shape=} {kernel.dtype=}"
    if tuning is None:
        raise ValueError(f"{shapes}: no product of few rows that gains by this kernel")
    whole = x.shape[1] == len(kernel) and len(kernel) % (tuning.parts * tuning.block_k) == 0
    if not whole or not _takes(x, kernel, columns * tuning.warpgroups):
        raise ValueError(
            f"{shapes} {tuning} must be [8 t, K] and [K, {columns * tuning.warpgroups} n] of 16-bit floats"
        )
    return tuning
