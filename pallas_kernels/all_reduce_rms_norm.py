"""The sum of all devices' products, added to the residual stream and normalized, in one kernel over peers' memory.

A collective of XLA's costs a decode step 20 to 30 us on the device and as much on the host. Here each device stores its
rows into workspaces of the others (one process, NVLink) and waits for theirs. An empty word has all bits set, which no
data has, so that data need neither flags nor fences; who read a word empties it. XLA sees neither the addresses nor the
writes: for it the kernel is one like any other, and a node of its CUDA graphs.

Why no two calls meet in a word: they take two halves in turn. A device that writes a row of call n + 2 has ended call
n + 1, so it had that row from all others, who had sent it after the end of n.
"""

import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

EMPTY = -1


@dataclass(frozen=True)
class TuningConfig:
    num_warps: int

    @classmethod
    def from_shapes(cls, x: jax.Array) -> "TuningConfig":
        """Sixteen bytes of a row for each thread."""
        threads = pl.next_power_of_2(x.shape[1]) * x.dtype.itemsize // 16
        return cls(min(max(threads // 32, 1), 32))


def workspace_words(devices: int, rows: int, row_bytes: int) -> int:
    """int32 words of the memory that each device needs: all EMPTY before the first call."""
    return (_header(rows) + 2 * devices * rows * row_bytes) // 4


@partial(jax.jit, static_argnames=("eps", "tuning"))
def all_reduce_rms_norm(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    addresses: jax.Array,
    workspace: jax.Array,
    *,
    eps: float,
    tuning: TuningConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x + the devices' sum of y, and that over its root mean square (Zhang & Sennrich 2019), times `scale`.

    x, y [T, E] of one dtype; scale [E]. The sum is float32, over the devices in their order, so that all have the same.
    addresses int32 [devices + 1, 2]: of the devices' workspaces, low half first, this device's, the next one's and so
    on; then which one this is, and the workspaces' rows, T at least. workspace int32 [`workspace_words`]: this one's,
    given so that XLA keeps it for as long. Calls on the same workspaces have the same E and come in the same order on
    all devices. Returns two arrays like x. ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or x.shape != y.shape or x.dtype != y.dtype or scale.shape != x.shape[1:]:
        raise ValueError(f"{x.shape=} {x.dtype=} {y.shape=} {y.dtype=} {scale.shape=} must be [T, E], [T, E], [E]")
    words = workspace_words(len(addresses) - 1, len(x), x.shape[1] * x.dtype.itemsize)
    if len(addresses) < 3 or not words <= workspace.size < 2**29:
        raise ValueError(
            f"{addresses.shape=} {workspace.shape=}: of two devices at least; {words} words for these rows, under 2**29"
        )
    tuning = tuning or TuningConfig.from_shapes(x)
    # No two threads may have the same word: the second would wait for what the first has emptied.
    threads, room = 32 * tuning.num_warps, pl.next_power_of_2(x.shape[1]) * x.dtype.itemsize
    if x.dtype.itemsize > 4 or x.shape[1] * x.dtype.itemsize % 16 or room < 16 * threads:
        raise ValueError(f"{x.shape=} {x.dtype=}: rows must have a multiple of 16 bytes, and 16 for each of {threads=}")
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return tuple(
        pl.pallas_call(
            partial(_kernel, eps=eps),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
            grid=(len(x),),
            in_specs=[whole] * 5,
            out_specs=[whole] * 2,
            compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
            name="all_reduce_rms_norm",
        )(x, y, scale, addresses, workspace)
    )


def all_reduce_rms_norm_reference(
    x: jax.Array, y: jax.Array, scale: jax.Array, axis: str | tuple[str, ...], *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The same as `all_reduce_rms_norm` in plain jax.numpy, inside a program over `axis` of a mesh."""
    total = (x.astype(jnp.float32) + jax.lax.psum(y.astype(jnp.float32), axis)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(x.dtype) * scale


def _header(rows):
    """Bytes of the rows' counters of calls; what is sent comes after."""
    return (rows + 31) // 32 * 128


def _kernel(x_ref, y_ref, scale_ref, addresses_ref, workspace_ref, sum_ref, norm_ref, *, eps: float):
    row, size, devices = pl.program_id(0), x_ref.shape[1], addresses_ref.shape[0] - 1
    e = jnp.arange(pl.next_power_of_2(size))
    mask = e < size if e.size > size else None
    x, y, scale = (
        plt.load(ref, mask=mask, other=None if mask is None else 0)
        for ref in (x_ref.at[row, e], y_ref.at[row, e], scale_ref.at[e])
    )
    own = {"LOW": addresses_ref[0, 0], "HIGH": addresses_ref[0, 1]}
    rank, rows = addresses_ref[devices, 0], addresses_ref[devices, 1]
    counter = jnp.broadcast_to(row * 4, (1,))
    call = _asm(READ, counter, jnp.int32, OFFSET=counter, **own) + 1

    row_bytes = size * x_ref.dtype.itemsize
    apart = rows * row_bytes  # bytes between the rows of two devices
    place = _header(rows) + (call & 1) * devices * apart + row * row_bytes + e * x_ref.dtype.itemsize
    target = place + rank * apart
    if mask is not None:
        place, target = (jnp.where(mask, offset, -1) for offset in (place, target))
    for peer in range(1, devices):
        y = _asm(SEND, y, y.dtype, OFFSET=target, LOW=addresses_ref[peer, 0], HIGH=addresses_ref[peer, 1])
    parts = _asm(_receive(devices, y.dtype), y, jnp.float32, OFFSET=place, RANK=rank, APART=apart, **own)

    total = (x.astype(jnp.float32) + parts).astype(x.dtype)
    wide = total.astype(jnp.float32)
    # Nobody reads the counter after this sum, which all threads wait for.
    squares = jnp.broadcast_to((wide * wide).sum(), (1,))
    squares = _asm(WRITE, squares, jnp.float32, OFFSET=counter, VALUE=call, **own)
    normed = (wide * jax.lax.rsqrt(squares / size + eps)).astype(x.dtype)
    scaled = (normed.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)
    plt.store(sum_ref.at[row, e], total, mask=mask)
    plt.store(norm_ref.at[row, e], scaled, mask=mask)


# -- PTX. To Triton these are functions of elements, which it may move or drop: what stores returns what it was given,
# for what has to come later to take.

ADDRESS = """.reg .b64 address, offset; .reg .pred p;
mov.b64 address, {LOW, HIGH}; cvt.u64.u32 offset, OFFSET; add.s64 address, address, offset;
"""
READ = ADDRESS + "ld.volatile.global.b32 OUT0, [address];"
WRITE = ADDRESS + "st.volatile.global.b32 [address], VALUE; mov.b32 OUT0, DATA0;"
# Data to their place, those at offset -1 to none. What looks EMPTY is NaN in all dtypes, and another one will do.
SEND = ADDRESS + "setp.ne.b32 p, OFFSET, -1; .reg .pred empty;"
SEND += "".join(
    f"\nsetp.eq.b32 empty, DATA{i}, {EMPTY}; selp.b32 OUT{i}, 0x7fffffff, DATA{i}, empty;" for i in range(4)
)
SEND += "\n@p st.volatile.global.v4.b32 [address], {OUT0, OUT1, OUT2, OUT3};"
WIDEN = {  # the parts of a word to float32
    "bfloat16": ("shl.b32 word, {0}, 16; mov.b32 f, word;", "and.b32 word, {0}, 0xffff0000; mov.b32 f, word;"),
    "float16": ("mov.b32 {{h0, h1}}, {0}; cvt.f32.f16 f, h0;", "mov.b32 {{h0, h1}}, {0}; cvt.f32.f16 f, h1;"),
    "float32": ("mov.b32 f, {0};",),
}


def _receive(devices: int, dtype) -> str:
    """The sum over the devices, in their order, of what they sent and, of this one, the data; -1: nobody sent."""
    code = (
        ADDRESS
        + """.reg .b64 apart; .reg .b32 word, most; .reg .b16 h0, h1; .reg .f32 f; .reg .pred nothing;
cvt.u64.u32 apart, APART; setp.eq.b32 nothing, OFFSET, -1;"""
    )
    words = [[f"word{device}_{i}" for i in range(4)] for device in range(devices)]
    loads = compared = emptied = ""
    for device, own in enumerate(words):
        code += f"""
.reg .b64 at{device}; .reg .pred from{device}; .reg .b32 {", ".join(own)};
mad.lo.u64 at{device}, apart, {device}, address;
setp.ne.b32 from{device}, RANK, {device}; @nothing setp.ne.b32 from{device}, 0, 0;"""
        code += "".join(f" mov.b32 {word}, DATA{i};" for i, word in enumerate(own))
        loads += f"\n@from{device} ld.volatile.global.v4.b32 {{{', '.join(own)}}}, [at{device}];"
        compared += "".join(f" max.u32 most, most, {word};" for word in own)
        emptied += f"\n@from{device} st.volatile.global.v4.b32 [at{device}], {{word, word, word, word}};"
    code += f"\nwait: mov.b32 most, 0;{loads}\n{compared}\nsetp.eq.b32 p, most, {EMPTY}; @p bra wait;"
    code += f"\nmov.b32 word, {EMPTY};{emptied}"
    widen = WIDEN[dtype.name]
    for i, each in enumerate(zip(*words, strict=True)):
        for j, template in enumerate(widen):
            out = f"OUT{i * len(widen) + j}"
            for device, word in enumerate(each):
                add = f"add.f32 {out}, {out}, f;" if device else f"mov.b32 {out}, f;"
                code += f"\n{template.format(word)} {add}"
    return code


def _asm(code: str, data: jax.Array, dtype, **scalars) -> jax.Array:
    """`code` for each sixteen bytes of `data`, or for the one word that it is: from `DATA0` and so on, and `scalars` of
    the first element, by name, to `OUT0` and so on, of `dtype`.
    """
    words, pack = (4, 16 // data.dtype.itemsize) if data.size > 1 else (1, 1)
    outs = pack * jnp.dtype(dtype).itemsize // 4
    operands = {f"OUT{i}": f"${i}" for i in range(outs)} | {f"DATA{i}": f"${outs + i}" for i in range(words)}
    operands |= {name: f"${outs + words + i * pack}" for i, name in enumerate(scalars)}
    for name, operand in operands.items():
        code = re.sub(rf"\b{name}\b", operand, code)
    out, given = ("f" if of == jnp.float32 else "r" for of in (dtype, data.dtype))
    [result] = plt.elementwise_inline_asm(
        f"{{ {code} }}",
        args=[data, *(jnp.broadcast_to(scalar, data.shape) for scalar in scalars.values())],
        constraints=",".join([f"=&{out}"] * outs + [given] * words + ["r"] * pack * len(scalars)),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(data.shape, dtype)],
    )
    return result
