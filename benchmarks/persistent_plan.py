"""What the persistent layer kernel is given and gives, how its work is cut, and its twin; see `persistent_layer`."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROWS = 8  # tokens that a product has room for
KEYS = 64  # in a tile of attention
SHARED_BYTES = 225 * 1024
OUT, GATE_UP, DOWN, QKV = PRODUCTS = range(4)
STAMPS = ("start", "attended", *(f"{name}.{p}" for p in ("o", "gate_up", "down", "qkv")
                                 for name in ("begin", "weights", "input", "product")), "end")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Shapes, and how the work is cut. ValueError for what the kernel does not take."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    rows: int  # tokens, of ROWS that there is room for
    page_size: int = 16
    normed: bool = False  # q and k
    eps: float = 1e-5
    programs: int = 128
    parts: int = 4  # of a row's keys
    columns: int = 128
    depth: int = 128
    kv_stages: int = 2
    flight: int = 0  # units under way at a time, 0 = one a stage: a full memory pipe delays the counters
    stamped: bool = False  # also when each program came where, see STAMPS

    def __post_init__(self) -> None:
        units = [self.tiles(p) * self.blocks(p) for p in PRODUCTS]
        whole = all(k % self.depth == 0 and n % self.columns == 0 for k, n in self.shapes)
        if (
            not whole
            or min(units) < self.programs
            or self.columns % 128
            or self.depth % 128
            or self.dim not in (64, 128)
            or KEYS % self.page_size
            or self.page_size % 8
            or not 1 <= self.rows <= ROWS
            or not 0 <= self.flight <= self.stages
        ):
            raise ValueError(f"not for this kernel: {self}, with {units} units of its products")

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of o, gate and up side by side, down, and q, k and v side by side."""
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        return (q, self.hidden), (self.hidden, 2 * self.inner), (self.inner, self.hidden), (self.hidden, q + 2 * kv)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def items(self) -> int:
        """Of attention: a part of the keys of a row and KV head."""
        return self.rows * self.kv_heads * self.parts

    @property
    def stages(self) -> int:
        unit = 2 * self.depth * (self.columns + ROWS)
        return (SHARED_BYTES - 8 * 1024 - 4 * self.kv_stages * KEYS * self.dim) // unit

    def tiles(self, p: int) -> int:
        return self.shapes[p][1] // self.columns

    def blocks(self, p: int) -> int:
        return self.shapes[p][0] // self.depth

    def width(self, p: int) -> int:
        """Columns of the output of a tile: gate and up make one."""
        return self.columns // 2 if p == GATE_UP else self.columns

    def others(self, p: int) -> int:
        """Programs that have a part of a tile beside the one that has its start, at most."""
        units, blocks = self.tiles(p) * self.blocks(p), self.blocks(p)
        owner = [((unit + 1) * self.programs - 1) // units for unit in range(units)]
        return max(owner[(tile + 1) * blocks - 1] - owner[tile * blocks] for tile in range(self.tiles(p)))


class Inputs(NamedTuple):
    weights: Any  # of o, gate and up, down, next q k v: bfloat16 [in, out]
    qkv: Any  # bfloat16 [ROWS, heads + 2 kv_heads, each times dim]
    hidden: Any  # float32 [ROWS, hidden]
    gains: Any  # float32 [hidden] of the norms after o and after down
    head_gains: Any  # float32 [2, dim] of q and of k: the gain, and its halves exchanged; or none
    table: Any  # int32 [ROWS, pages]
    lengths: Any  # int32 [ROWS], this token included
    angles: Any  # float32 [2, ROWS, dim], see `factors`
    k_pages: Any  # [pages * kv_heads, page_size, dim]
    v_pages: Any


class State(NamedTuple):
    """Refs for one layer after another of a step; zeros before the first."""

    done: Any  # int32 [4]: attention's heads, o's, gate and up's, down's tiles that are written; they only grow
    tile_parts: Any  # int32 [tiles of all products]
    item_parts: Any  # int32 [ROWS * kv_heads]
    squares: Any  # float32 [tiles, rounded up to 64, ROWS] after o and after down


class Outputs(NamedTuple):
    attended: Any  # bfloat16 [ROWS, heads * dim]
    products: (
        Any  # of the four, bfloat16; that of gate and up is silu(gate) * up, those of o and down are hidden * gain
    )
    hidden: Any  # float32 [ROWS, hidden] after o and after down
    tile_sums: Any  # float32 [4, programs, columns, ROWS]
    item_sums: Any  # float32 [items * group * dim]
    item_scores: Any  # float32 [items, 2, 64]: largest score and sum of weights of each head
    stamps: Any  # int32 [programs, STAMPS], or none


def factors(cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Those of a head, and of it with its halves exchanged, that rotate it by angles of these [rows, dim / 2]."""
    return jnp.stack([jnp.concatenate([cos, cos], 1), jnp.concatenate([-sin, sin], 1)])


def layer_reference(plan: Plan, inputs: Inputs) -> tuple[Outputs, jax.Array, jax.Array]:
    """The same in float32, rounded where the kernel's values are, and the pages; for `plan.rows` rows."""
    R, dim, f32, dtype = plan.rows, plan.dim, jnp.float32, inputs.qkv.dtype
    lengths, table = inputs.lengths[:R], inputs.table[:R]
    heads = inputs.qkv[:R].reshape(R, -1, dim).astype(f32)
    q, k, v = jnp.split(heads, [plan.heads, plan.heads + plan.kv_heads], axis=1)

    def rounded(x):
        return x.astype(dtype).astype(f32)

    def rotated(x, gain):
        if plan.normed:
            x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + plan.eps) * gain[0]
        same, other = inputs.angles[:, :R, None]
        return rounded(x * same + jnp.roll(x, dim // 2, axis=-1) * other)

    gains = inputs.head_gains or (None, None)
    q, k = rotated(q, gains[0]), rotated(k, gains[1])
    at = jnp.arange(R), (lengths - 1) // plan.page_size
    places = table[at][:, None] * plan.kv_heads + jnp.arange(plan.kv_heads), ((lengths - 1) % plan.page_size)[:, None]
    pools = [pool.at[places].set(x.astype(dtype)) for pool, x in ((inputs.k_pages, k), (inputs.v_pages, v))]

    def gathered(pool):  # [R, heads, keys, dim]
        x = pool.reshape(-1, plan.kv_heads, plan.page_size, dim)[table].astype(f32)
        return jnp.repeat(x.swapaxes(1, 2).reshape(R, plan.kv_heads, -1, dim), plan.group, axis=1)

    product = partial(jnp.einsum, precision="highest")
    keys, values = map(gathered, pools)
    seen = jnp.arange(keys.shape[2]) < lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, product("rhd,rhkd->rhk", q, keys) * dim**-0.5, -jnp.inf), axis=-1)
    attended = rounded(product("rhk,rhkd->rhd", weights, values).reshape(R, -1))
    x, stream = attended, inputs.hidden[:R]
    hidden: list[jax.Array] = []
    results: list[jax.Array] = []
    scale = jnp.ones((R, 1), f32)
    for p in PRODUCTS:
        y = product("rk,kn->rn", x, inputs.weights[p].astype(f32))
        if p in (OUT, DOWN):
            stream = stream + y
            scale = jax.lax.rsqrt((stream * stream).mean(axis=1, keepdims=True) + plan.eps)
            y = stream * inputs.gains[len(hidden)]
            hidden.append(stream)
        else:
            y = y * scale
        if p == GATE_UP:
            gate, up = jnp.split(y, 2, axis=1)
            y = jax.nn.silu(gate) * up
        x = rounded(y)
        results.append(x)
    return Outputs(attended, tuple(results), tuple(hidden), None, None, None, None), *pools
