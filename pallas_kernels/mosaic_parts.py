"""What kernels in Mosaic need and Pallas has no words for: `decode_layer`'s counters between programs, say.

A warpgroup calls each of these as a whole. "Plain order" is row by row.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.mosaic_tile import swizzle

WGMMA = plgpu.Layout.WGMMA  # [64 n, m]: a thread has pairs of neighbours in a row
LAYOUT = mgpu.WGMMA_LAYOUT
REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
THREADS = 128


def _int(value: int) -> Any:
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _index(value: int) -> Any:
    return mgpu.utils.c(value, ir.IndexType.get())


def _element(ref: Any) -> Any:
    return ir.MemRefType(ref.type).element_type


def _counter(ref: Any) -> Any:
    return mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(ref))


def name_alike(ref: Any) -> None:
    """jax 0.11 gives a kernel of each program a name of its own for dumps, with which it is compiled again; 0.12 does
    not look at it. Any ref of the kernel.
    """

    @plgpu.inline_mgpu(arg_types=(REF,))
    def f(_, __):
        operation: Any = ir.InsertionPoint.current.block.owner
        while operation.name != "builtin.module":
            operation = operation.parent
        operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get("kernel")

    f(ref)


def signal(counter: Any) -> None:
    """One more, once other programs can see what this warpgroup wrote before."""

    @plgpu.inline_mgpu(arg_types=(REF,))
    def f(_, ref):
        mgpu.utils.warpgroup_barrier()
        _counter(ref).signal(1, memory_scope="gpu")

    f(counter)


def wait(counter: Any, value: jax.Array, take: bool = False) -> None:
    """Until the counter has reached the value, int32; `take` subtracts it."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR))
    def f(_, ref, value):
        _counter(ref).wait(value.registers.item(), decrement=take, memory_scope="gpu")

    f(counter, value)


def store(ref: Any, value: jax.Array, layout: Any = WGMMA) -> None:
    """ref in global memory = value, by stores as narrow as the layout makes them."""

    @plgpu.inline_mgpu(arg_types=(REF, layout))
    def f(_, ref, value):
        value.store_untiled(ref, optimized=False)

    f(ref, value)


def store_transposed(ref: Any, value: jax.Array) -> None:
    """ref [m, n] in global memory = value [n, m]."""

    @plgpu.inline_mgpu(arg_types=(REF, WGMMA))
    def f(_, ref, value):
        value.foreach(lambda v, i: memref.store(v, ref, [i[1], i[0]]))

    f(ref, value)


def load_transposed(ref: Any) -> jax.Array:
    """[n, m] of ref [m, n] in global memory."""
    shape = ref.shape[::-1]

    @plgpu.inline_mgpu(arg_types=(REF,), return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=WGMMA))
    def f(_, ref):
        like = mgpu.FragmentedArray.splat(mgpu.utils.c(0, _element(ref)), shape, LAYOUT)
        return like.foreach(lambda _, i: memref.load(ref, [i[1], i[0]]), create_array=True)

    return f(ref)


def load_if(ref: Any, condition: jax.Array) -> jax.Array:
    """ref [n, m] float32 where the scalar holds, else zeros, whatever is there."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR), return_type=plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=WGMMA))
    def f(_, ref, condition):
        value = mgpu.FragmentedArray.load_untiled(ref, layout=LAYOUT, optimized=False)
        zero = mgpu.FragmentedArray.splat(mgpu.utils.c(0, value.mlir_dtype), value.shape, LAYOUT)
        chosen = np.empty_like(value.registers)
        for i in np.ndindex(chosen.shape):
            chosen[i] = arith.select(condition.registers.item(), value.registers[i], zero.registers[i])
        return mgpu.FragmentedArray(_registers=chosen, _layout=LAYOUT, _is_signed=None)

    return f(ref, condition)


def _pairs(ref: Any, start: Any, count: int, dim: int, turned: bool) -> Iterator[tuple]:
    """(register, row, pointer) for each pair of a thread's values of [64, dim]."""
    pointer = mgpu.utils.memref_ptr(ref)
    base = arith.index_cast(ir.IndexType.get(), start.registers.item())
    registers = np.ndindex(*LAYOUT.registers_shape((64, dim)))
    for register, (row, column) in zip(registers, LAYOUT.thread_idxs((64, dim)), strict=True):
        if turned:
            column = arith.xori(column, _index(dim // 2))
        head = arith.muli(arith.minui(row, _index(count - 1)), _index(dim))
        at = arith.index_cast(_int(0).type, arith.addi(base, arith.addi(head, column)))
        yield register, row, mgpu.utils.getelementptr(pointer, [at], _element(ref))


def load_heads(ref: Any, start: jax.Array, count: int, dim: int, turned: bool = False) -> jax.Array:
    """[64, dim]: row r is ref[start + min(r, count - 1) * dim :][:dim], with its halves exchanged if `turned`."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR), return_type=plgpu.ShapeDtypeStruct((64, dim), ref.dtype, layout=WGMMA))
    def f(_, ref, start):
        size, pair = 2 * mgpu.utils.bytewidth(_element(ref)), ir.VectorType.get((2,), _element(ref))
        registers = np.empty(LAYOUT.registers_shape((64, dim)), object)
        for register, _, pointer in _pairs(ref, start, count, dim, turned):
            registers[register] = llvm.load(pair, pointer, alignment=size)
        return mgpu.FragmentedArray(_registers=registers, _layout=LAYOUT, _is_signed=None)

    return f(ref, start)


def store_heads(ref: Any, start: jax.Array, value: jax.Array, count: int) -> None:
    """The first `count` rows of value [64, dim] to ref[start:]."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, WGMMA))
    def f(_, ref, start, value):
        size = 2 * mgpu.utils.bytewidth(_element(ref))
        for register, row, pointer in _pairs(ref, start, count, value.shape[1], False):
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, _index(count))):
                llvm.store(value.registers[register], pointer, alignment=size)

    f(ref, start, value)


def _eights(width: int, count: int) -> Iterator[tuple]:
    """(register, row, column) of each 8 neighbours of a thread in plain order."""
    thread = arith.remui(mgpu.utils.thread_idx(), _int(THREADS))
    for i in range(count):
        first = arith.muli(arith.addi(thread, _int(THREADS * i)), _int(8))
        yield i, arith.divui(first, _int(width)), arith.remui(first, _int(width))


def load_rows(ref: Any, column: jax.Array, width: int) -> jax.Array:
    """ref[:, column:][:, :width] of 16-bit values in global memory, in plain order: [rows * width]."""
    size = ref.shape[0] * width
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=8)

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR), return_type=plgpu.ShapeDtypeStruct((size,), ref.dtype, layout=layout))
    def f(_, ref, column):
        eight, pointer = ir.VectorType.get((8,), _element(ref)), mgpu.utils.memref_ptr(ref)
        stride = _int(ir.MemRefType(ref.type).shape[1])
        registers = np.empty((size // (8 * THREADS),), object)
        for i, row, c in _eights(width, len(registers)):
            at = arith.addi(arith.muli(row, stride), arith.addi(c, column.registers.item()))
            registers[i] = llvm.load(eight, mgpu.utils.getelementptr(pointer, [at], _element(ref)), alignment=16)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return f(ref, column)


def store_rows(smem: Any, value: jax.Array) -> None:
    """smem [rows, width] of 16-bit values, as `swizzle` says, = value in plain order."""
    width = smem.shape[1]
    layout = plgpu.Layout.WG_STRIDED(value.shape, vec_size=8)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzle(smem.dtype)), layout))
    def f(_, smem, value):
        pointer = mgpu.utils.memref_ptr(smem)
        for i, row, column in _eights(width, value.registers.size):
            above, row = arith.divui(row, _int(8)), arith.remui(row, _int(8))
            left, column = arith.divui(column, _int(64)), arith.remui(column, _int(64))
            tile = arith.addi(arith.muli(above, _int(width // 64)), left)
            eight = arith.xori(arith.divui(column, _int(8)), row)
            within = arith.addi(arith.muli(row, _int(64)), arith.muli(eight, _int(8)))
            at = arith.addi(arith.muli(tile, _int(512)), within)
            element = mgpu.utils.getelementptr(pointer, [at], _element(smem))
            llvm.store(value.registers.flat[i], element, alignment=16)

    f(smem, value)
