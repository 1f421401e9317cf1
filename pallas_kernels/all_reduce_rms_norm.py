"""The sum of all devices' products, added to the residual stream and normalized, in one kernel over peers' memory.

A collective of XLA's costs a decode step 20 to 30 us, and its host as much. Here each device stores its rows straight
into memory of the others (NVLink, one process), four bytes of data beside four of a number that rises with each call,
and waits for theirs: eight bytes arrive together, so data need no flag of their own and no fence. XLA sees neither the
addresses nor the writes; the kernel is one node of a CUDA graph like any other.

Why no two calls meet in a slot: slots alternate between two halves. A device that writes a row of call n + 2 has ended
n + 1, so it had the others' rows of n + 1, which they sent after they had read all of n.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


@dataclass(frozen=True)
class TuningConfig:
    num_warps: int

    @classmethod
    def from_shapes(cls, x: jax.Array) -> "TuningConfig":
        """Sixteen bytes of a row for each thread."""
        threads = pl.next_power_of_2(x.shape[1]) * x.dtype.itemsize // 16
        return cls(min(max(threads // 32, 1), 32))


def workspace_words(devices: int, rows: int, row_bytes: int) -> int:
    """int32 words of the memory that each device needs, zeros before the first call."""
    return (_header(rows) + 2 * devices * rows * 2 * row_bytes) // 4


@partial(jax.jit, static_argnames=("eps", "tuning"))
def all_reduce_rms_norm(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    peers: jax.Array,
    *,
    eps: float,
    tuning: TuningConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x + the devices' sum of y, and that over its root mean square (Zhang & Sennrich 2019), times `scale`.

    x, y [T, E] of one dtype; scale [E]. The sum is float32, over the devices in their order, so that all have the same.
    peers int32 [devices + 1, 2]: the addresses of the devices' workspaces (`workspace_words`), low half first, this
    device's, the next one's and so on; then which one this is, and the workspaces' rows, T at least. Calls on the same
    workspaces have the same E and come in the same order on all devices. Returns two arrays like x. ValueError for
    shapes that do not fit.
    """
    if x.ndim != 2 or x.shape != y.shape or x.dtype != y.dtype or scale.shape != x.shape[1:]:
        raise ValueError(f"{x.shape=} {x.dtype=} {y.shape=} {y.dtype=} {scale.shape=} must be [T, E], [T, E], [E]")
    if x.dtype.itemsize > 4 or x.shape[1] * x.dtype.itemsize % 16:
        raise ValueError(f"{x.shape=} {x.dtype=}: rows must have a multiple of 16 bytes")
    tuning = tuning or TuningConfig.from_shapes(x)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return tuple(
        pl.pallas_call(
            partial(_kernel, eps=eps),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
            grid=(len(x),),
            in_specs=[whole] * 4,
            out_specs=[whole] * 2,
            compiler_params=plt.CompilerParams(num_warps=tuning.num_warps, num_stages=1),
            name="all_reduce_rms_norm",
        )(x, y, scale, peers)
    )


def all_reduce_rms_norm_reference(
    x: jax.Array, y: jax.Array, scale: jax.Array, axis, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The same as `all_reduce_rms_norm` in plain jax.numpy, inside a program over the mesh axis (or axes) `axis`."""
    total = (x.astype(jnp.float32) + jax.lax.psum(y.astype(jnp.float32), axis)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(x.dtype) * scale


def _header(rows):
    """Bytes of the rows' counters, before the slots."""
    return (rows + 31) // 32 * 128


def _kernel(x_ref, y_ref, scale_ref, peers_ref, sum_ref, norm_ref, *, eps: float):
    row, size, devices = pl.program_id(0), x_ref.shape[1], peers_ref.shape[0] - 1
    e = jnp.arange(pl.next_power_of_2(size))
    mask = e < size if e.size > size else None
    x, y, scale = (
        plt.load(ref, mask=mask, other=None if mask is None else 0)
        for ref in (x_ref.at[row, e], y_ref.at[row, e], scale_ref.at[e])
    )
    rank, rows = peers_ref[devices, 0], peers_ref[devices, 1]
    own = peers_ref[0, 0], peers_ref[0, 1]
    counter = jnp.broadcast_to(row * 4, (1,))
    call = _asm(COUNT, counter, *own, counter, counter) + 1

    # A thread has two slots in turn: neighbours write neighbouring ones, first all of the first half of the row's.
    row_slots = size * x_ref.dtype.itemsize // 8
    slot = e * x_ref.dtype.itemsize // 8
    place = slot % 2 * (row_slots // 2) + slot // 2

    def slots(source):
        """Where this row from a device lies; -1 for masked elements."""
        row_start = (((call & 1) * devices + source) * rows + row) * row_slots
        offsets = _header(rows) + (row_start + place) * 16
        return offsets if mask is None else jnp.where(mask, offsets, -1)

    sent, at = y, slots(rank)
    for peer in range(1, devices):
        sent = _exchange(SEND, sent, peers_ref[peer, 0], peers_ref[peer, 1], at, call)
    total = x.astype(jnp.float32)
    parts = jnp.zeros_like(total)
    for source in range(devices):
        at = slots(source)
        parts += _exchange(RECEIVE, sent, *own, jnp.where(source == rank, -1, at), call).astype(jnp.float32)
    total = (total + parts).astype(x.dtype)
    wide = total.astype(jnp.float32)
    squares = jnp.broadcast_to((wide * wide).sum(), (1,))
    # After that sum all threads have read the counter.
    squares = _asm(COUNTED, squares, *own, counter, call)
    normed = (wide * jax.lax.rsqrt(squares / size + eps)).astype(x.dtype)
    scaled = (normed.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)
    plt.store(sum_ref.at[row, e], total, mask=mask)
    plt.store(norm_ref.at[row, e], scaled, mask=mask)


# -- PTX. What Triton calls elementwise must look like a function: stores return what they were given, and what has to
# come after takes it.

ADDRESS = """
.reg .b64 address, offset; .reg .pred p;
mov.b64 address, {LOW, HIGH};
cvt.u64.u32 offset, OFFSET;
add.s64 address, address, offset;
"""
COUNT = f"{{ {ADDRESS} ld.volatile.global.b32 $0, [address]; }}"
COUNTED = f"{{ {ADDRESS} st.volatile.global.b32 [address], CALL; mov.b32 $0, DATA; }}"
SEND = f"""{{ {ADDRESS}
setp.ne.b32 p, OFFSET, -1;
@p st.volatile.global.v4.b32 [address], {{DATA0, CALL, DATA1, CALL}};
mov.b32 $0, DATA0; mov.b32 $1, DATA1; }}"""
RECEIVE = f"""{{ {ADDRESS}
.reg .b32 data0, data1, call0, call1;
mov.b32 data0, DATA0; mov.b32 data1, DATA1;
setp.eq.b32 p, OFFSET, -1;
@p bra done;
wait:
ld.volatile.global.v4.b32 {{data0, call0, data1, call1}}, [address];
setp.ne.b32 p, call0, CALL;
@p bra wait;
setp.ne.b32 p, call1, CALL;
@p bra wait;
done:
mov.b32 $0, data0; mov.b32 $1, data1; }}"""


def _asm(code: str, data, low, high, offset, call):
    """One instance for a scalar of 32 bits."""
    names = {"DATA": "$1", "LOW": "$2", "HIGH": "$3", "OFFSET": "$4", "CALL": "$5"}
    for name, operand in names.items():
        code = code.replace(name, operand)
    kind = "f" if data.dtype == jnp.float32 else "r"
    [out] = plt.elementwise_inline_asm(
        code,
        args=[jnp.broadcast_to(arg, (1,)) for arg in (data, low, high, offset, call)],
        constraints=f"=&{kind},{kind},r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(data.shape, data.dtype)],
    )
    return out


def _exchange(code: str, data, low, high, offsets, call):
    """One instance for each eight bytes of data, which take a slot of sixteen."""
    pack = 8 // data.dtype.itemsize
    names = {"DATA0": "$2", "DATA1": "$3"}
    names |= {name: f"${4 + i * pack}" for i, name in enumerate(("LOW", "HIGH", "OFFSET", "CALL"))}
    for name, operand in names.items():
        code = code.replace(name, operand)
    low, high, call = (jnp.broadcast_to(scalar, data.shape) for scalar in (low, high, call))
    [out] = plt.elementwise_inline_asm(
        code,
        args=[data, low, high, offsets, call],
        constraints=",".join(["=&r"] * 2 + ["r"] * (2 + 4 * pack)),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(data.shape, data.dtype)],
    )
    return out
