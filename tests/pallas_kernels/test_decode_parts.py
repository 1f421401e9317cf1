"""How decode cuts rows into parts: every block once, within the parts there are, long rows first."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels as kernels
from pallas_kernels.paged_decode import TuningConfig, _blocks, _cut
from tests.pallas_kernels.cases import Case, decode_inputs, relative_error

BLOCK, PAGE = 16, 8


def cut(lengths, *, parts=6, min_part=32, queries=1, window=None):
    tuning = TuningConfig(BLOCK, parts, 4, min_part=min_part)
    lengths = jnp.asarray(lengths, jnp.int32)
    found = _cut(lengths, queries, 4096, PAGE, window, tuning)
    return [np.asarray(x) for x in (*found, _blocks(lengths, queries, PAGE, window, BLOCK)[1])]


LENGTH = st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 4096))


@given(
    # Few sizes, as each number of rows and of parts compiles some twenty operations.
    st.one_of(*(st.lists(LENGTH, min_size=rows, max_size=rows) for rows in (1, 5, 9))),
    st.sampled_from([1, 6, 12]),
    st.sampled_from([16, 32, 256]),
    st.sampled_from([None, 40, 1000]),
)
def test_each_row_has_its_parts_and_each_part_fits(lengths, parts, min_part, window):
    row, place, row_parts, start, blocks = cut(lengths, parts=parts, min_part=min_part, window=window)
    assert row_parts.min() >= 1 and row_parts.sum() <= len(row)
    expected = {(r, i): start[r] + i for r, count in enumerate(row_parts) for i in range(count)}
    assert {(r, i): at for at, (r, i) in enumerate(zip(row, place)) if r >= 0} == expected
    # Several parts only where each has work enough; and the rows with several come first.
    assert all(count == 1 or blocks[r] * BLOCK / count > min_part / 2 for r, count in enumerate(row_parts))
    used = row[: row_parts.sum()]
    assert (np.diff((row_parts[used] > 1).astype(int)) <= 0).all() and (row[len(used) :] == -1).all()


def test_even_rows_stay_whole_and_a_long_one_is_cut():
    assert (cut([900] * 12)[2] == 1).all()
    row, _, row_parts, *_ = cut([900] * 11 + [4096])
    assert row_parts.tolist() == [1] * 11 + [3] and row[:3].tolist() == [11] * 3
    assert cut([4000])[2].tolist() == [5]  # all of the six that run at once but the one that a row has anyway


def test_a_long_row_among_short_ones():
    case = Case(head_dim=32, group=3, queries=2, lengths=(40, 0, 30, 600, 33))
    args = decode_inputs(case)
    tuning = TuningConfig(BLOCK, 4, 4, min_part=32)
    assert np.asarray(_cut(jnp.asarray(args[-1]), 2, 608, 16, None, tuning).parts).max() >= 3
    out = kernels.paged_decode(*args, **case.options, tuning=tuning, interpret=True)
    assert relative_error(out, kernels.paged_decode_reference(*args, **case.options)) < 1e-5
