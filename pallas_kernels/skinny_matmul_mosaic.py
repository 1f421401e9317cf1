"""`split_matmul` and `gated_matmul` in Pallas Mosaic GPU.

Columns of the weight are the rows of a wgmma, and the rows of x its columns, of which it takes any multiple of 8. A
warpgroup of a program has some columns of the result; tiles of x and of the weight come by TMA.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_parts import name_alike, store_transposed
from pallas_kernels.mosaic_tile import swizzle

PRODUCER_REGISTERS = 40


def multiply(
    x: jax.Array,
    kernel: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None,
    own: int,
    *,
    block_k: int,
    stages: int,
    parts: int,
    warpgroups: int,
    interpret: bool,
) -> jax.Array:
    """`split_matmul`'s [P, T, N] or, with an activation, `gated_matmul`'s as [1, T, F]. own: columns of a warpgroup."""
    (rows, size), kinds = x.shape, 1 if activation is None else 2  # gate and up, side by side in the kernel
    columns, depth, width = own * warpgroups, size // parts, kernel.shape[1] // kinds
    dtype = jnp.float32 if activation is None else x.dtype
    block = partial(plgpu.BlockSpec, transforms=swizzle(x.dtype), memory_space=plgpu.SMEM)

    def body(x_ref, kernel_ref, out_ref):
        if not interpret:
            name_alike(x_ref)
        warpgroup, tile, part = (jax.lax.axis_index(name) for name in ("warpgroup", "tile", "part"))

        def add(_, x_tile, *tiles_and_sums):
            *tiles, sums = tiles_and_sums
            for weight, total in zip(tiles, sums):
                weight = weight.at[:, pl.ds(warpgroup * own, own)]
                plgpu.wgmma(total, weight.transpose((1, 0)), x_tile.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return sums

        def compute(stream):
            def scope(*sums):
                stream(sums)
                found = [total[...] for total in sums]
                value = found[0] if activation is None else activation(found[0]) * found[1]
                place = out_ref.at[part, :, pl.ds(tile * columns + warpgroup * own, own)]
                _store(place, value.astype(dtype), interpret)

            pl.run_scoped(scope, *[plgpu.ACC((own, rows), jnp.float32)] * kinds)

        tiles = [block((block_k, columns), lambda i: (i, 0))] * kinds
        stream = plgpu.emit_pipeline_warp_specialized(
            add,
            grid=(depth // block_k,),
            memory_registers=PRODUCER_REGISTERS,
            in_specs=[block((rows, block_k), lambda i: (0, i)), *tiles],
            wg_axis="warpgroup",
            num_compute_wgs=warpgroups,
            max_concurrent_steps=stages,
            compute_context=compute,
        )
        inner, starts = pl.ds(part * depth, depth), (i * width + tile * columns for i in range(kinds))
        stream(x_ref.at[:, inner], *(kernel_ref.at[inner, pl.ds(start, columns)] for start in starts))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, rows, width), dtype),
        grid=(width // columns, parts),
        grid_names=("tile", "part"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        # Not warpgroups' semantics, which take longer to lower.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="skinny_matmul",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, kernel)


def _store(ref, value: jax.Array, simulated: bool) -> None:
    """ref [T, n] in global memory = value [n, T]; `simulated`: interpret mode knows Pallas's words only."""
    if simulated:
        ref[...] = value.T
    else:
        store_transposed(ref, value)
