"""The kernel of `decode_layer`, in Mosaic GPU.

Every multiprocessor has one program, of three warpgroups. Warpgroup 1 streams weights by TMA, as fast as stages become
free; it never waits for another program, as weights do not depend on activations. Warpgroup 2 streams keys and
values, then each product's input, once all of it is there. Warpgroup 0 computes. Between products a counter in global
memory says how much of one's output is written.

A product is cut into units of `depth` rows x `columns` columns of the weight. They are numbered along K, then from
column tile to column tile; each program has an equal run of them. Whoever has a tile's first unit adds up, in order,
what those that have the others wrote, so results do not depend on who is first. Operands are swapped: columns of the
weight are the rows of a wgmma, tokens its 8 columns. The norm's scale is a factor of the product's result.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer_plan import DOWN, GATE_UP, KEYS, OUT, PRODUCTS, QKV, ROWS, Plan
from pallas_kernels.mosaic_parts import (
    WGMMA,
    load_heads,
    load_if,
    load_rows,
    load_transposed,
    name_alike,
    signal,
    store,
    store_heads,
    store_rows,
    store_transposed,
    wait,
)
from pallas_kernels.mosaic_tile import clear_beyond, swizzled
from pallas_kernels.paged_tile import HIDDEN, LOG2E, div, rem

TOGETHER = 3  # parts of a row's keys that are asked for at a time
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 56


class Inputs(NamedTuple):
    """Refs in global memory."""

    weights: Any  # of each product: bfloat16 [in, out]
    qkv: Any  # bfloat16 [ROWS, (heads + 2 kv_heads) * dim]
    stream: Any  # float32 [ROWS, hidden]
    gains: Any  # [hidden] of the norms after o and after down
    head_gains: Any  # [dim] of q and of k, or none
    table: Any  # int32 [ROWS, pages]
    lengths: Any  # int32 [ROWS], this token included
    page: Any  # int32 [ROWS], 0: nowhere
    offset: Any  # int32 [ROWS]
    cut: Any  # int32 [2]: rows, parts of a row's keys
    factors: Any  # float32 [2, ROWS, dim]: of a head, and of it with its halves exchanged, which rotate it together


class Outputs(NamedTuple):
    attended: Any  # bfloat16 [ROWS, heads * dim]
    products: Any  # bfloat16: of gate and up it is silu(gate) * up, of o and down hidden * gain
    hidden: Any  # float32 [ROWS, hidden] after o and after down
    squares: Any  # float32 [tiles, rounded up to 64, ROWS] of these two
    tile_sums: Any  # float32 [4, programs, columns, ROWS]
    item_sums: Any  # float32 [items * group * dim]
    item_scores: Any  # float32 [items, 2, 64]: largest score and sum of weights of each head


class Scratch(NamedTuple):
    weights: Any  # [stages, columns / 64, depth, 64]
    inputs: Any  # [stages, ROWS, depth]
    keys: Any  # [kv_stages, KEYS, dim]
    values: Any
    weights_full: Any
    inputs_full: Any
    empty: Any
    kv_full: Any
    kv_empty: Any


class Span(NamedTuple):
    """The program's units of a product."""

    start: jax.Array
    units: jax.Array
    before: jax.Array  # of the program's units, those of earlier products


class Context(NamedTuple):
    plan: Plan
    inputs: Inputs
    k_pages: Any  # [pages * kv_heads, page_size, dim]
    v_pages: Any
    # Each product's, what it waits for: attention's heads, o's, gate and up's, down's tiles that are written; they only
    # grow. Then rows' and heads', then tiles' parts that are written: zeros again at the end.
    counters: Any
    out: Outputs
    scratch: Scratch
    program: jax.Array
    spans: list[Span]
    rows: jax.Array
    parts: jax.Array


def _by_row(v: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(v, like.shape, [0])


def _by_column(v: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(v, like.shape, [1])


def _kernel(plan: Plan, structure: Any, *refs) -> None:
    name_alike(refs[0])
    inputs, k_pages, v_pages, counters, out, scratch = jax.tree.unflatten(structure, refs)
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    spans, before = [], jnp.int32(0)
    for p in PRODUCTS:
        units = plan.tiles(p) * plan.blocks(p)
        start, end = (div((program + i) * units, plan.programs) for i in (0, 1))
        spans.append(Span(start, end - start, before))
        before += end - start
    cut = inputs.cut[0], inputs.cut[1]
    c = Context(plan, inputs, k_pages, v_pages, counters, out, scratch, program, spans, *cut)
    for i, work in enumerate((_compute, _stream_weights, _stream_inputs)):
        pl.when(warpgroup == i)(partial(work, c))


def _stream_weights(c: Context) -> None:
    plan, smem = c.plan, c.scratch
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    for p, (start, count, before) in enumerate(c.spans):

        @pl.loop(0, count)
        def _(i, p=p, start=start, before=before):
            n, unit = before + i, start + i
            stage = rem(n, plan.stages)
            pl.when(n >= plan.stages)(lambda: plgpu.barrier_wait(smem.empty.at[stage]))
            late = rem(n - plan.flight, plan.stages)
            pl.when(n >= plan.flight)(lambda: plgpu.barrier_wait(smem.weights_full.at[late]))
            rows = pl.ds(rem(unit, plan.blocks(p)) * plan.depth, plan.depth)
            first = div(unit, plan.blocks(p)) * plan.width(p)
            for j in range(plan.columns // 64):
                side, column = divmod(64 * j, plan.width(p))  # the second side is that of up
                source = c.inputs.weights[p].at[rows, pl.ds(side * plan.inner + first + column, 64)]
                plgpu.copy_gmem_to_smem(source, smem.weights.at[stage, j], smem.weights_full.at[stage])


def _stream_inputs(c: Context) -> None:
    plan, smem, done = c.plan, c.scratch, c.counters
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    # Layers before this one. Nobody adds to that counter before all have read it, as all have a part in gate and up.
    layers = div(done[DOWN + 1], plan.tiles(DOWN))
    _for_items(c, partial(_copy_keys, c))
    wait(done.at[0], (layers + 1) * (c.rows * plan.kv_heads))
    for p, (start, count, before) in enumerate(c.spans):
        if p:
            wait(done.at[p], (layers + 1) * plan.tiles(p - 1))
        source = c.out.products[p - 1] if p else c.out.attended

        def load(i, p=p, start=start, count=count, source=source):
            block = rem(start + jnp.minimum(i, count - 1), plan.blocks(p))
            return load_rows(source, block * plan.depth, plan.depth)

        def copy(i, value, before=before, load=load):
            stage, following = rem(before + i, plan.stages), load(i + 1)
            pl.when(before + i >= plan.stages)(lambda: plgpu.barrier_wait(smem.empty.at[stage]))
            store_rows(smem.inputs.at[stage], value)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.inputs_full.at[stage])
            return following

        jax.lax.fori_loop(0, count, copy, load(jnp.int32(0)))


class Item(NamedTuple):
    """Of attention; scalars."""

    number: jax.Array
    row: jax.Array
    head: jax.Array  # of K and V
    part: jax.Array
    start: jax.Array  # its tiles of keys
    end: jax.Array
    before: jax.Array  # tiles of the program's earlier items


def _for_items(c: Context, function) -> None:
    plan, items = c.plan, c.rows * (c.plan.kv_heads * c.parts)

    def body(i, before):
        number = i * plan.programs + c.program
        real, part = number < items, rem(number, c.parts)
        row = jnp.where(real, div(number, plan.kv_heads * c.parts), 0)
        head = rem(div(number, c.parts), plan.kv_heads)
        tiles = jnp.where(real, div(c.inputs.lengths[row] - 1 + KEYS - 1, KEYS), 0)
        start, end = div(part * tiles, c.parts), div((part + 1) * tiles, c.parts)
        pl.when(real)(lambda: function(Item(number, row, head, part, start, end, before)))
        return before + end - start

    jax.lax.fori_loop(jnp.int32(0), div(items + (plan.programs - 1), plan.programs), body, jnp.int32(0))


def _copy_keys(c: Context, item: Item) -> None:
    plan, smem, inputs = c.plan, c.scratch, c.inputs

    @pl.loop(item.start, item.end)
    def _(tile):
        n = item.before + tile - item.start
        stage = rem(n, plan.kv_stages)
        pl.when(n >= plan.kv_stages)(lambda: plgpu.barrier_wait(smem.kv_empty.at[stage]))
        for j in range(KEYS // plan.page_size):
            column = tile * (KEYS // plan.page_size) + j
            inside = column * plan.page_size < inputs.lengths[item.row] - 1
            page = inputs.table[item.row, jnp.where(inside, column, 0)] * plan.kv_heads + item.head
            page = jnp.where(inside, page, c.k_pages.shape[0])  # a copy from beyond the pool gives zeros
            rows = pl.ds(j * plan.page_size, plan.page_size)
            for pool, target in ((c.k_pages, smem.keys), (c.v_pages, smem.values)):
                plgpu.copy_gmem_to_smem(pool.at[page], target.at[stage, rows], smem.kv_full.at[stage])


def _compute(c: Context) -> None:
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    _for_items(c, partial(_attend, c))
    for p in PRODUCTS:
        _multiply(c, p)
        if p == OUT:  # nobody reads it in this step, so now, when there is time
            _for_items(c, partial(_write_key, c))


def _rotated(c: Context, first: jax.Array, count: int, row: jax.Array, gain: Any) -> jax.Array:
    """`count` heads of q or k from the first on, normed and rotated: bfloat16 [64, dim], the last again and again."""
    dim, qkv = c.plan.dim, c.inputs.qkv.at[row]
    x, turned = (load_heads(qkv, first * dim, count, dim, turned=t).astype(jnp.float32) for t in (False, True))
    load = partial(plgpu.load, layout=WGMMA.reduce(0), optimized=False)
    same, other = load(c.inputs.factors.at[0, row]), load(c.inputs.factors.at[1, row])
    if c.plan.normed:
        scale = jax.lax.rsqrt((x * x).sum(axis=1) * (1 / dim) + c.plan.eps)
        gains = (load_heads(gain, jnp.int32(0), 1, dim, turned=t).astype(jnp.float32) for t in (False, True))
        x, turned = (value * _by_row(scale, x) * factor for value, factor in zip((x, turned), gains))
    return (x * _by_column(same, x) + turned * _by_column(other, x)).astype(c.inputs.qkv.dtype)


def _new_key(c: Context, item: Item) -> tuple[jax.Array, jax.Array]:
    """This token's k and v of a head, each bfloat16 [64, dim]: all rows are the same."""
    plan = c.plan
    k = _rotated(c, plan.heads + item.head, 1, item.row, c.inputs.head_gains[1] if plan.normed else None)
    first = (plan.heads + plan.kv_heads + item.head) * plan.dim
    return k, load_heads(c.inputs.qkv.at[item.row], first, 1, plan.dim)


def _write_key(c: Context, item: Item) -> None:
    page, offset = c.inputs.page[item.row], c.inputs.offset[item.row]

    @pl.when((item.part == c.parts - 1) & (page > 0))
    def _():
        for pool, value in zip((c.k_pages, c.v_pages), _new_key(c, item)):
            store_heads(pool.at[page * c.plan.kv_heads + item.head, offset], jnp.int32(0), value, 1)


def _attend(c: Context, item: Item) -> None:
    """Online softmax (Milakov, Gimelshein 2018); the heads of a group are the rows. The last part has the new key."""
    plan, smem, out = c.plan, c.scratch, c.out
    group, dim, dtype = plan.group, plan.dim, c.inputs.qkv.dtype
    factor, old = LOG2E * plan.scale, c.inputs.lengths[item.row] - 1
    q = _rotated(c, item.head * group, group, item.row, c.inputs.head_gains[0] if plan.normed else None)
    k, v = _new_key(c, item)
    last = item.part == c.parts - 1
    one = last.astype(jnp.float32)
    score = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=1) * factor
    carry = v.astype(jnp.float32) * one, score * one + HIDDEN * (1 - one), score * 0.0 + one

    def body(tile, carry):
        result, top, total = carry
        stage, left = rem(item.before + tile - item.start, plan.kv_stages), old - tile * KEYS
        plgpu.barrier_wait(smem.kv_full.at[stage])
        clear_beyond(smem.values.at[stage], left, True)

        def multiply_keys(accumulator):
            plgpu.wgmma(accumulator, q, smem.keys.at[stage].transpose((1, 0)))
            return accumulator[...]

        scores = pl.run_scoped(multiply_keys, plgpu.ACC((64, KEYS), jnp.float32)) * factor
        seen = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA) < left
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        decay, weight = jnp.exp2(top - new_top), jnp.exp2(scores - _by_row(new_top, scores))
        total = total * decay + weight.sum(axis=1)

        def multiply_values(accumulator):
            plgpu.wgmma(accumulator, weight.astype(dtype), smem.values.at[stage])

        result = pl.run_state(multiply_values)(plgpu.ACC.init(result * _by_row(decay, result)))
        plgpu.barrier_arrive(smem.kv_empty.at[stage])
        return result, new_top, total

    result, top, total = jax.lax.fori_loop(item.start, item.end, body, carry)
    parts = c.counters.at[len(PRODUCTS) + item.row * plan.kv_heads + item.head]

    @pl.when(jnp.logical_not(last))
    def _():
        store_heads(out.item_sums, item.number * group * dim, result, group)
        for i, value in enumerate((top, total)):
            store(out.item_scores.at[item.number, i], value, WGMMA.reduce(1))
        signal(parts)

    @pl.when(last)
    def _():
        wait(parts, c.parts - 1, take=True)
        load = partial(plgpu.load, layout=WGMMA.reduce(1), optimized=False)

        def add(i, carry):
            summed, highest, weights = carry
            for j in range(TOGETHER):
                other = i * TOGETHER + j
                number = item.number - item.part + jnp.minimum(other, c.parts - 2)
                none = (other >= c.parts - 1).astype(jnp.float32)
                more = load_heads(out.item_sums, number * group * dim, group, dim)
                its_top, its_total = (load(out.item_scores.at[number, k]) for k in (0, 1))
                its_top = its_top * (1 - none) + HIDDEN * none
                new = jnp.maximum(highest, its_top)
                mine, its = jnp.exp2(highest - new), jnp.exp2(its_top - new)
                summed = summed * _by_row(mine, summed) + more * _by_row(its, more)
                highest, weights = new, weights * mine + its_total * its
            return summed, highest, weights

        groups = div(c.parts - 1 + TOGETHER - 1, TOGETHER)
        summed, _, weights = jax.lax.fori_loop(jnp.int32(0), groups, add, (result, top, total))
        summed = (summed * _by_row(1 / weights, summed)).astype(dtype)
        store_heads(out.attended.at[item.row], item.head * group * dim, summed, group)
        signal(c.counters.at[0])


def _multiply(c: Context, p: int) -> None:
    plan, smem, (start, count, before), out = c.plan, c.scratch, c.spans[p], c.out
    blocks, end = plan.blocks(p), start + count
    norm = {OUT: 0, DOWN: 1}.get(p)  # which of the norms follows

    @pl.loop(div(start, blocks), div(end - 1, blocks) + 1)
    def _(tile):
        first, last = jnp.maximum(start, tile * blocks), jnp.minimum(end, (tile + 1) * blocks)
        columns = pl.ds(tile * plan.width(p), plan.width(p))
        if norm is not None:  # asked for now, needed after the product
            earlier = load_transposed((out.hidden[0] if norm else c.inputs.stream).at[:, columns])
            gain = plgpu.load(c.inputs.gains[norm].at[columns], layout=WGMMA.reduce(1), optimized=False)

        def product(accumulator):
            def step(unit):
                stage = rem(before + unit - start, plan.stages)
                plgpu.barrier_wait(smem.weights_full.at[stage])
                plgpu.barrier_wait(smem.inputs_full.at[stage])
                for j in range(plan.columns // 64):
                    weight, x = smem.weights.at[stage, j].transpose((1, 0)), smem.inputs.at[stage].transpose((1, 0))
                    plgpu.wgmma(accumulator.at[64 * j : 64 * j + 64], weight, x)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(smem.empty.at[stage])

            step(first)
            found = () if norm is not None else (_norm_scale(c, 0 if p == GATE_UP else 1),)  # known since the input is
            pl.loop(first + 1, last)(step)
            return accumulator[...], *found

        total, *scale = pl.run_scoped(product, plgpu.ACC((plan.columns, ROWS), jnp.float32))
        parts = c.counters.at[plan.first_counter(p) + tile]
        owned = first == tile * blocks

        @pl.when(jnp.logical_not(owned))
        def _():
            store(out.tile_sums.at[p, c.program], total)
            signal(parts)

        @pl.when(owned)
        def _():
            # The program of the tile's last unit tells how many others there are.
            others = div((tile + 1) * blocks * plan.programs - 1, plan.tiles(p) * blocks) - c.program
            pl.when(others > 0)(lambda: wait(parts, others, take=True))
            numbers = [jnp.minimum(c.program + 1 + i, plan.programs - 1) for i in range(plan.others(p))]
            more = [load_if(out.tile_sums.at[p, number], i < others) for i, number in enumerate(numbers)]
            value = sum(more, total)
            if norm is not None:
                value += earlier
                store_transposed(out.hidden[norm].at[:, columns], value)
                store(out.squares[norm].at[tile], (value * value).sum(axis=0), WGMMA.reduce(0))
                value *= _by_row(gain.astype(jnp.float32), value)
            else:
                value *= _by_column(scale[0], value)
            if p == GATE_UP:
                gate, up = value[: plan.width(p)], value[plan.width(p) :]
                value = gate / (1 + jnp.exp(-gate)) * up
            store_transposed(out.products[p].at[:, columns], value.astype(c.inputs.qkv.dtype))
            if p != QKV:
                signal(c.counters.at[p + 1])


def _norm_scale(c: Context, norm: int) -> jax.Array:
    """float32 [ROWS]: one over the root mean square."""
    squares = plgpu.load(c.out.squares[norm], layout=WGMMA, optimized=False)
    written = plgpu.broadcasted_iota(jnp.int32, squares.shape, 0, layout=WGMMA) < c.plan.tiles(OUT)
    squares = jnp.where(written, squares, 0.0)
    return jax.lax.rsqrt(squares.sum(axis=0) * (1 / c.plan.hidden) + c.plan.eps)


def layer(
    plan: Plan, inputs: Inputs, pools: Sequence[jax.Array], counters: jax.Array
) -> tuple[Outputs, jax.Array, jax.Array, jax.Array]:
    """`decode_layer` of a plan: what it computed, and pools and counters."""
    struct, f32, dtype = jax.ShapeDtypeStruct, jnp.float32, inputs.qkv.dtype
    smem = partial(swizzled, dtype=dtype)
    outputs = Outputs(
        struct((ROWS, plan.shapes[OUT][0]), dtype),
        tuple(struct((ROWS, plan.tiles(p) * plan.width(p)), dtype) for p in PRODUCTS),
        (struct((ROWS, plan.hidden), f32),) * 2,
        (struct((pl.cdiv(plan.tiles(OUT), 64) * 64, ROWS), f32),) * 2,
        struct((len(PRODUCTS), plan.programs, plan.columns, ROWS), f32),
        struct((plan.most_items * plan.group * plan.dim,), f32),
        struct((plan.most_items, 2, 64), f32),
    )
    pages = KEYS // plan.page_size
    scratch = Scratch(
        smem((plan.stages, plan.columns // 64, plan.depth, 64)),
        smem((plan.stages, ROWS, plan.depth)),
        smem((plan.kv_stages, KEYS, plan.dim)),
        smem((plan.kv_stages, KEYS, plan.dim)),
        plgpu.Barrier(num_arrivals=plan.columns // 64, num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=2 * pages, num_barriers=plan.kv_stages),
        plgpu.Barrier(num_barriers=plan.kv_stages),
    )
    written = [jax.new_ref(array) for array in (*pools, counters)]
    found = plgpu.kernel(
        partial(_kernel, plan, jax.tree.structure((inputs, *written, outputs, scratch))),
        out_type=jax.tree.leaves(outputs),
        scratch_types=list(scratch),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        # Not warpgroups': inferring their layouts takes jax 0.11 four seconds for each program.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=4096, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="decode_layer",
    )(*jax.tree.leaves(inputs), *written)
    return jax.tree.unflatten(jax.tree.structure(outputs), found), *(ref[...] for ref in written)
