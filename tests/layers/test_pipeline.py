"""A step in parts, one after another, gives what the whole step gives; tests/sharding/pipeline.py has whole engines."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.kv_cache import LayerCache
from jaxengine.layers.attention import AttentionInputs, attend, write_kv
from jaxengine.layers.pipeline import one_part

TOKENS, SIZE, ROWS, BLOCK_Q, PAGE, COLUMNS, HEADS, DIM = 32, 8, 6, 4, 4, 8, 2, 8


def step(lengths, before):
    """Rows of these tokens, after so many others in the cache; those of one token first."""
    count = len(lengths)
    q_len, past, ends = (np.zeros(ROWS, np.int32) for _ in range(3))
    q_len[:count], past[:count], ends[:count] = lengths, before, np.cumsum(lengths)
    q_start = np.where(q_len > 0, ends - q_len, 0)
    row = np.concatenate([np.repeat(np.arange(count), lengths), np.full(TOKENS - sum(lengths), -1)])
    positions = np.where(row < 0, 0, past[row] + np.arange(TOKENS) - q_start[row])
    tables = 1 + np.random.default_rng(0).permutation(ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    page = np.where(row < 0, 0, tables[row, positions // PAGE])
    blocks = [(i, q_start[i] + j) for i in range(count) if q_len[i] > 1 for j in range(0, q_len[i], BLOCK_Q)]
    block_row, block_start = np.array(blocks + [(-1, 0)] * (TOKENS - len(blocks))).T
    arrays = positions, (page,), positions % PAGE, (tables,), past + q_len, q_start, q_len, block_row, block_start
    return AttentionInputs(*jax.tree.map(np.int32, arrays), (0,), "xla", BLOCK_Q), row >= 0


@partial(jax.jit, static_argnames="size")
def run(inputs, x, cache, start, valid, size):
    """Attention, and the cache afterwards, of `size` tokens from `start` on; None: of all."""
    if size is not None:
        inputs, x = one_part(inputs, start, size, valid), jax.lax.dynamic_slice_in_dim(x, start, size)
    q, k, v = x[:, :HEADS], x[:, -2:-1], x[:, -1:]
    cache = write_kv(k, v, inputs.for_layer(0), cache)
    return attend(q, inputs.for_layer(0), cache, scale=0.3), cache, inputs.lengths


@pytest.mark.parametrize(
    "lengths",
    [
        (1, 1, 1, 20, 5),
        (7, 2, 8, 1 + 8, 3),  # a row of which one token is left in its first part, and one in its last
        (1, 32 - 1),
        (1, 1, 1, 1, 1, 1),
        (3,),  # parts without tokens
        (9, 17),
    ],
)
def test_parts_give_what_the_step_gives(lengths):
    rng = np.random.default_rng(1)
    inputs, real = step(lengths, rng.integers(0, COLUMNS * PAGE - max(lengths) + 1, len(lengths)))
    x = rng.standard_normal((TOKENS, HEADS + 2, DIM), np.float32)
    cache = LayerCache(*jnp.asarray(rng.standard_normal((2, ROWS * COLUMNS + 1, 1, PAGE, DIM), np.float32)))
    want, want_cache, _ = run(inputs, x, cache, 0, True, None)
    found = []
    for start in range(0, TOKENS, SIZE):
        _, untouched, rows = run(inputs, x, cache, start, False, SIZE)
        assert not rows.any() and all(map(np.array_equal, untouched, cache)), "a tick without a part"
        part, cache, rows = run(inputs, x, cache, start, True, SIZE)
        found.append(part)
        assert (np.asarray(rows) > 0).any() == real[start : start + SIZE].any()
    np.testing.assert_allclose(np.concatenate(found)[real], want[real], atol=1e-5)
    np.testing.assert_array_equal(cache, want_cache)
