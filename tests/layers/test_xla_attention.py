"""The XLA twin of the kernels against their references, over ragged lengths, blocks of pages and every option."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as kernels
from jaxengine.layers import xla_attention
from tests.pallas_kernels.cases import Case, decode_inputs, extend_inputs, pairwise, relative_error

STATIC = ("scale", "window", "softcap")
decode = jax.jit(xla_attention.paged_decode, static_argnames=STATIC)
extend = jax.jit(xla_attention.paged_extend, static_argnames=("block_q", *STATIC))
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}
OPTIONS = {
    "head_dim": (16, 20),
    "group": (1, 3),
    "page_size": (8, 64, 256),  # many to a block, a few, more than a block
    "dtype": ("float32", "bfloat16"),
    "cache": (None, "float8_e4m3fn", "float8_e5m2"),
    "window": (None, 1, 30, 200),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "kv_heads": (1, 2),
}
LENGTHS = ((0, 1, 40, 127), (128, 129, 0, 300), (1, 3), (0, 0, 5))
DECODE = [Case(**choice) for choice in pairwise(OPTIONS | {"lengths": LENGTHS, "queries": (1, 3)})]
EXTEND = [
    Case(**choice | {"new_tokens": tuple(min(n, length) for n, length in zip((7, 1, 0, 40), choice["lengths"]))})
    for choice in pairwise(OPTIONS | {"lengths": LENGTHS, "block_q": (4, 16)})
]


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=pytest.mark.full if i % 4 else ())
                                  for i, c in enumerate(DECODE)])  # fmt: skip
def test_decode(case):
    args = decode_inputs(case)
    out = decode(*args, **case.options)
    assert out.dtype == case.dtype
    assert relative_error(out, kernels.paged_decode_reference(*args, **case.options)) < TOLERANCE[case.dtype]


def test_decode_of_rows_whose_items_are_spread_over_several_steps_of_the_loop():
    case = Case(head_dim=16, group=3, page_size=8, lengths=(700, 3, 0, 400))
    args = decode_inputs(case)
    items_a_step = xla_attention.ROW_ITEMS * len(case.lengths)
    assert items_a_step * xla_attention.ITEM_TOKENS < 700, "each row would end in the step that it begins in"
    out = decode(*args, **case.options)
    assert relative_error(out, kernels.paged_decode_reference(*args, **case.options)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=pytest.mark.full if i % 4 else ())
                                  for i, c in enumerate(EXTEND)])  # fmt: skip
def test_extend(case):
    args = extend_inputs(case)
    out = extend(*args, block_q=case.block_q, **case.options)
    assert out.dtype == case.dtype
    expected = kernels.paged_extend_reference(*args, block_q=case.block_q, **case.options)
    assert relative_error(out, expected) < TOLERANCE[case.dtype]


rows = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 20)), min_size=4, max_size=4)


@settings(max_examples=25)
@given(rows, st.sampled_from([None, 5]), st.booleans(), st.integers(0, 9))
def test_any_rows(rows, window, sinks, seed):
    """Drawn lengths and chunks, in arrays of fixed sizes so that few programs are compiled."""
    lengths = tuple(length for length, _ in rows)
    new = tuple(min(count, length) for length, count in rows)
    case = Case(head_dim=8, group=2, page_size=8, window=window, sinks=sinks, lengths=lengths, block_q=4)
    args = decode_inputs(case, seed)
    args = args[0], *sized(*args[1:4]), args[4]
    out = decode(*args, **case.options)
    assert relative_error(out, kernels.paged_decode_reference(*args, **case.options)) < 1e-6

    q, k, v, table, block_row, block_start, *rest = extend_inputs(replace(case, new_tokens=new), seed)
    spare = 24 - len(block_row)
    blocks = np.pad(block_row, (0, spare), constant_values=-1), np.pad(block_start, (0, spare))
    args = np.pad(q, ((0, 84 - len(q)), (0, 0), (0, 0))), *sized(k, v, table), *blocks, *rest
    out = extend(*args, block_q=4, **case.options)
    assert relative_error(out, kernels.paged_extend_reference(*args, block_q=4, **case.options)) < 1e-6


def sized(k, v, table):
    k, v = (np.concatenate([pool, np.zeros((80 - len(pool), *pool.shape[1:]), pool.dtype)]) for pool in (k, v))
    return k, v, np.pad(table, ((0, 0), (0, 20 - table.shape[1])), mode="edge")
