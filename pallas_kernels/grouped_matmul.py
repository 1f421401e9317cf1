"""Products of rows that are sorted by group with one kernel for each group: the experts of a mixture.

Each program finds its group from the groups' sizes, so a step costs no launch for a list of tiles. Groups without rows
are not read: a decode step moves the kernels of the experts that its tokens chose, and no others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import paged_tile as tile
from pallas_kernels import triton_tile


@dataclass(frozen=True)
class TuningConfig:
    """How the work is cut; changes speed, and results only by rounding."""

    block_rows: int  # rows of a program, all of one group
    block_out: int  # columns of the result
    block_in: int  # of the sum, at a time
    num_warps: int
    num_stages: int = 3

    def __post_init__(self) -> None:
        blocks = {"block_rows": self.block_rows, "block_out": self.block_out, "block_in": self.block_in}
        tile.check_tuning(blocks | {"num_warps": self.num_warps}, {"num_stages": self.num_stages})
        if min(blocks.values()) < triton_tile.MIN_ROWS:
            raise ValueError(
                f"{self} must have blocks of at least {triton_tile.MIN_ROWS}, the least the tensor cores take"
            )

    @classmethod
    def from_shapes(cls, x, kernel, products: int = 1) -> "TuningConfig":
        """The choice for these arrays (or anything with their shapes and dtypes), with so many kernels at once."""
        single = x.dtype == jnp.float32  # on the plain cores, which need more registers
        most = 32 if single else 128
        block_rows = max(triton_tile.MIN_ROWS, min(most, pl.next_power_of_2(pl.cdiv(x.shape[0], kernel.shape[0]))))
        block_out = 128 // products if block_rows == 128 else 64
        return cls(block_rows, block_out, block_in=32 if single else 64, num_warps=8 if block_rows == 128 else 4)


@partial(jax.jit, static_argnames=("tuning", "interpret"))
def grouped_matmul(
    x: jax.Array,
    kernel: jax.Array,
    sizes: jax.Array,
    *,
    tuning: TuningConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x[i] @ kernel[g] for each row i of group g, summed in float32.

    x [M, K] of one dtype with kernel [G, K, N]; its first sizes[0] rows are group 0's, the next sizes[1] group 1's, and
    so on; sizes int32 [G], some of them perhaps 0. Returns [M, N] like x; rows beyond the groups' hold anything.
    ValueError for shapes that do not fit.
    """
    _check(x, (kernel,), sizes)
    return _call(x, (kernel,), sizes, lambda y: y, tuning, interpret, "grouped_matmul")


@partial(jax.jit, static_argnames=("activation", "tuning", "interpret"))
def grouped_gated_matmul(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    sizes: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    *,
    tuning: TuningConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """activation(x[i] @ gate[g]) * (x[i] @ up[g]) for each row i of group g (Shazeer 2020); see `grouped_matmul`.

    gate, up [G, K, N]. `activation` is elementwise; all is computed in float32 and rounded once.
    """
    _check(x, (gate, up), sizes)
    return _call(x, (gate, up), sizes, lambda g, u: activation(g) * u, tuning, interpret, "grouped_gated_matmul")


@jax.jit
def grouped_matmul_reference(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same as `grouped_matmul` in plain jax.numpy; rows beyond the groups' are zero."""
    _check(x, (kernel,), sizes)
    return _each_with_all(x, kernel, sizes).astype(x.dtype)


@partial(jax.jit, static_argnames="activation")
def grouped_gated_matmul_reference(
    x: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The same as `grouped_gated_matmul` in plain jax.numpy; rows beyond the groups' are zero."""
    _check(x, (gate, up), sizes)
    return (activation(_each_with_all(x, gate, sizes)) * _each_with_all(x, up, sizes)).astype(x.dtype)


def _each_with_all(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """Every row with every kernel, of which one product counts; float32."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")

    def add(total, one):
        number, weights = one
        return total + jnp.where((group == number)[:, None], triton_tile.dot(x, weights, (1, 0)), 0), None

    start = jnp.zeros((x.shape[0], kernel.shape[2]), jnp.float32)
    return jax.lax.scan(add, start, (jnp.arange(kernel.shape[0]), kernel))[0]


def _check(x: jax.Array, kernels: Sequence[jax.Array], sizes: jax.Array) -> None:
    shapes = [kernel.shape for kernel in kernels]
    if x.ndim != 2 or any(len(shape) != 3 or shape != shapes[0] or shape[1] != x.shape[1] for shape in shapes):
        raise ValueError(f"{x.shape=} and kernels of shape {shapes} must be [M, K] and [G, K, N]")
    if sizes.shape != shapes[0][:1]:
        raise ValueError(f"{sizes.shape=} must be [{shapes[0][0]}], one for each group")
    if x.dtype not in tile.DTYPES or any(kernel.dtype != x.dtype for kernel in kernels):
        raise ValueError(f"{x.dtype=} and kernels of {[str(kernel.dtype) for kernel in kernels]} must be one dtype, "
                         "bfloat16, float16 or float32")  # fmt: skip


def _call(x, kernels, sizes, combine, tuning, interpret, name) -> jax.Array:
    tuning = tuning or TuningConfig.from_shapes(x, kernels[0], len(kernels))
    (rows, _), (groups, _, out) = x.shape, kernels[0].shape
    # Each group may end within a tile.
    tiles = pl.cdiv(rows, tuning.block_rows) + min(groups, rows)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, combine=combine, tuning=tuning),
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype),
        # The first axis varies fastest: tiles that need the same part of a kernel run side by side.
        grid=(tiles, pl.cdiv(out, tuning.block_out)),
        in_specs=[whole] * (2 + len(kernels)),
        out_specs=whole,
        compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        name=name,
    )(sizes, x, *kernels)


def _kernel(
    sizes_ref,  # [G]
    x_ref,  # [M, K]
    *refs,  # kernels [G, K, N]; out [M, N]
    combine: Callable[..., jax.Array],
    tuning: TuningConfig,
):
    *kernel_refs, out_ref = refs
    groups, (rows, size_in), size_out = sizes_ref.shape[0], x_ref.shape, out_ref.shape[1]
    block_rows, block_out, block_in = tuning.block_rows, tuning.block_out, tuning.block_in
    number = jnp.arange(pl.next_power_of_2(groups))
    sizes = plt.load(sizes_ref.at[number], mask=number < groups, other=0)
    tiles = tile.div(sizes + (block_rows - 1), block_rows)
    this, block = pl.program_id(0), pl.program_id(1)
    group = jnp.sum((jnp.cumsum(tiles) <= this).astype(jnp.int32))

    @pl.when(group < groups)
    def _():
        before = number < group
        first = jnp.sum(jnp.where(before, sizes, 0))
        start = first + (this - jnp.sum(jnp.where(before, tiles, 0))) * block_rows
        end = first + jnp.sum(jnp.where(number == group, sizes, 0))
        row = start + jnp.arange(block_rows)
        real = row < end
        read = jnp.minimum(row, rows - 1)  # what other groups' rows give is not stored
        column = block * block_out + jnp.arange(block_out)
        inside = column < size_out

        def body(i, sums):
            k = i * block_in + jnp.arange(block_in)
            known = k < size_in if size_in % block_in else None
            x = _load(x_ref, (), read, k, None, known)
            limit = inside if size_out % block_out else None
            parts = [_load(ref, (group,), k, column, known, limit) for ref in kernel_refs]
            return tuple(total + triton_tile.dot(x, part, (1, 0)) for total, part in zip(sums, parts))

        zeros = tuple(jnp.zeros((block_rows, block_out), jnp.float32) for _ in kernel_refs)
        sums = jax.lax.fori_loop(0, pl.cdiv(size_in, block_in), body, zeros)
        # Out of bounds where nothing is stored: interpret mode writes masked rows back to where they point.
        at = out_ref.at[jnp.where(real, row, rows)[:, None], column[None, :]]
        plt.store(at, combine(*sums).astype(out_ref.dtype), mask=real[:, None] & inside[None, :])


def _load(
    ref, where: tuple, rows: jax.Array, columns: jax.Array, row_mask: jax.Array | None, column_mask: jax.Array | None
):
    """A block of the matrix at ref[where], zeros where a mask says no; without masks loads are wider."""
    masks = [] if row_mask is None else [row_mask[:, None]]
    masks += [] if column_mask is None else [column_mask[None, :]]
    at = ref.at[(*where, rows[:, None], columns[None, :])]
    if not masks:
        return plt.load(at)
    mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    return plt.load(at, mask=jnp.broadcast_to(mask, (rows.size, columns.size)), other=0)
