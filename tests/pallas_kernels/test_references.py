"""The references against naive NumPy loops: key by key, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from tests.pallas_kernels.cases import (
    Case,
    decode_inputs,
    extend_inputs,
    naive_decode,
    naive_extend,
    naive_write,
    relative_error,
    write_inputs,
)

DECODE = [
    Case(head_dim=8, group=2, page_size=4, lengths=(0, 1, 4, 13)),
    Case(head_dim=6, group=3, page_size=4, window=5, softcap=2.0, queries=3, lengths=(0, 2, 9, 3, 17)),
]
EXTEND = [
    Case(head_dim=8, group=2, page_size=4, block_q=4, lengths=(6, 9, 0, 17), new_tokens=(6, 1, 0, 5)),
    Case(head_dim=6, group=3, page_size=4, block_q=4, window=5, softcap=2.0, lengths=(11, 4), new_tokens=(7, 3)),
]


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_paged_decode_reference(case):
    args = decode_inputs(case)
    out = kernels.paged_decode_reference(*args, **case.options)
    assert relative_error(out, naive_decode(*args, **case.options)) < 1e-6


@pytest.mark.parametrize("case", EXTEND, ids=str)
def test_paged_extend_reference(case):
    args = extend_inputs(case)
    out = kernels.paged_extend_reference(*args, block_q=case.block_q, **case.options)
    assert relative_error(out, naive_extend(*args, block_q=case.block_q, **case.options)) < 1e-6


def test_kv_write_reference_casts_and_drops_page_zero():
    k_pages, v_pages, k, v, page, offset = write_inputs(Case(head_dim=6, page_size=4, dtype="bfloat16"), tokens=11)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    out = kernels.kv_write_reference(k_pages, v_pages, k, v, page, offset)
    for got, expected in zip(out, naive_write(k_pages, v_pages, k, v, page, offset)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(got), expected)
