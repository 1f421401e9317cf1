"""Stages of a pipeline: each has some of the layers, and computes one part of a step after another (Huang et al. 2019).

In tick t stage s has part t - s, if there is one, and then hands on hidden states. A stage without a part computes what
nobody reads, and writes to no page. Parts come in the order of their tokens: what an earlier one wrote to the cache, a
later one finds there. Programs run this on each device, over the mesh axis STAGE.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.kv_cache import KVCache
from jaxengine.layers.attention import AttentionInputs
from jaxengine.sharding import STAGE, total


def run_layers(
    model: Any, x: jax.Array, inputs: AttentionInputs, cache: KVCache, size: int
) -> tuple[jax.Array, KVCache]:
    """`model.run_layers` of all stages, for a mixed step, in parts of `size` tokens."""
    tokens, (stage, stages) = len(x), _place()
    parts = -(-tokens // size)
    x, inputs = _pad(x, parts * size), _padded(inputs, parts * size)

    def tick(carry, t):
        received, done, cache = carry
        start = jnp.clip(t - stage, 0, parts - 1) * size
        own = jnp.where(stage == 0, jax.lax.dynamic_slice_in_dim(x, start, size), received)
        valid = (t >= stage) & (t - stage < parts)
        y, cache = model.run_layers(own, one_part(inputs, start, size, valid), cache)
        # The last stage has no part before its first one, which overwrites what comes of that.
        done = jax.lax.dynamic_update_slice_in_dim(done, y, start, 0)
        return (_hand_on(y, stages - 1), done, cache), None

    start = jnp.zeros_like(x[:size]), jnp.zeros_like(x), cache
    (_, done, cache), _ = jax.lax.scan(tick, start, jnp.arange(parts + stages - 1))
    return total(jnp.where(stage == stages - 1, done, 0), STAGE)[:tokens], cache


def decode(
    model: Any,
    inputs: Callable[[Any, jax.Array], AttentionInputs],
    draw: Callable[[Any, jax.Array, jax.Array], jax.Array],
    rows: Any,
    tokens: jax.Array,
    cache: KVCache,
    steps: int,
    least: int,
) -> tuple[KVCache, jax.Array]:
    """`steps` tokens of each row, [steps, rows], as many parts of the rows as stages, each of `least` rows or more.

    inputs, draw: of a part of `rows` (arrays by row) and a step's number; of the step `steps` nothing is written. A
    part that has passed all stages is back at the first just when that has its next token to compute.
    """
    count, (stage, stages) = len(tokens), _place()
    size = max(-(-count // stages), least)
    rows, tokens = jax.tree.map(lambda x: _pad(x, stages * size).reshape(stages, size, *x.shape[1:]), (rows, tokens))

    def part(number):
        return jax.tree.map(lambda x: x[number % stages], rows)

    def tick(carry, t):
        received, tokens, cache = carry
        own, back = t - stage, t - (stages - 1)
        at = inputs(part(own), jnp.where((own >= 0) & (own < steps * stages), own // stages, steps))
        x = jnp.where(stage == 0, model.embed(tokens[own % stages], at.positions), received)
        x, cache = model.run_layers(x, at, cache)
        received = _hand_on(x, stages)
        drawn = draw(part(back), received, back // stages)  # the first stage's are right
        tokens = tokens.at[back % stages].set(jnp.where(back < 0, tokens[back % stages], drawn))
        return (received, tokens, cache), drawn

    hidden = jax.eval_shape(model.embed, tokens[0], tokens[0])
    start = jnp.zeros(hidden.shape, hidden.dtype), tokens, cache
    (_, _, cache), drawn = jax.lax.scan(tick, start, jnp.arange(steps * stages + stages - 1))
    drawn = total(jnp.where(stage == 0, drawn[stages - 1 :], 0), STAGE)
    return cache, drawn.reshape(steps, -1)[:, :count]


def _place() -> tuple[jax.Array, int]:
    return jax.lax.axis_index(STAGE), jax.lax.axis_size(STAGE)


def _hand_on(x: jax.Array, stages: int) -> jax.Array:
    """What the stage before this one has; so many of them hand on, the last of all to the first."""
    return jax.lax.ppermute(x, STAGE, [(i, (i + 1) % jax.lax.axis_size(STAGE)) for i in range(stages)])


def _pad(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, count - len(x)), *((0, 0),) * (x.ndim - 1)))


def _padded(inputs: AttentionInputs, tokens: int) -> AttentionInputs:
    page = tuple(_pad(page, tokens) for page in inputs.page)
    return replace(inputs, positions=_pad(inputs.positions, tokens), page=page, offset=_pad(inputs.offset, tokens))


def one_part(inputs: AttentionInputs, start: jax.Array, size: int, valid: jax.Array) -> AttentionInputs:
    """Those of `size` tokens from `start` on: a row for each token, of length 0 unless a row's tokens begin there.

    So a row of which one token is left is row i of token i, as attention wants it.
    """
    assert inputs.q_start is not None and inputs.q_len is not None

    def own(x):
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def of_row(x):
        return x.at[row].get(mode="fill", fill_value=0)

    token = start + jnp.arange(size)
    ends = jnp.where(inputs.q_len > 0, inputs.q_start + inputs.q_len, jnp.iinfo(jnp.int32).max)
    row = jnp.searchsorted(ends, token, side="right")  # padding: one that has no tokens, or none
    q_start, q_len, lengths = (of_row(x) for x in (inputs.q_start, inputs.q_len, inputs.lengths))
    begins = valid & (token == jnp.maximum(q_start, start)) & (q_len > 0)
    end = jnp.minimum(q_start + q_len, start + size)
    lengths = jnp.where(begins, lengths - (q_start + q_len - end), 0)
    q_len = jnp.where(begins, end - token, 0)
    blocks = jnp.where(q_len > 1, -(-q_len // inputs.block_q), 0)
    block = jnp.arange(size // inputs.block_q + max(1, size // 2))
    block_row = jnp.searchsorted(jnp.cumsum(blocks), block, side="right")
    found = block < jnp.sum(blocks)
    block_row = jnp.where(found, block_row, 0)
    done = (block - (jnp.cumsum(blocks) - blocks)[block_row]) * inputs.block_q
    # From those that see many keys to those that see few, as paged_extend likes it; none at the end.
    order = jnp.argsort(jnp.where(found, q_len[block_row] - lengths[block_row] - done, 1))
    return replace(
        inputs,
        positions=own(inputs.positions),
        page=tuple(jnp.where(valid, own(page), 0) for page in inputs.page),
        offset=own(inputs.offset),
        tables=tuple(map(of_row, inputs.tables)),
        lengths=lengths,
        q_start=jnp.arange(size),
        q_len=q_len,
        block_row=jnp.where(found, block_row, -1)[order],
        block_start=(block_row + done)[order],
    )
