"""The references against naive NumPy loops: key by key, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import paged_tile as tile
from tests.pallas_kernels.cases import (
    Case,
    decode_inputs,
    extend_inputs,
    naive_decode,
    naive_extend,
    naive_rope_write,
    naive_write,
    relative_error,
    rope_write_inputs,
    write_inputs,
)

DECODE = [
    Case(head_dim=8, group=2, page_size=4, lengths=(0, 1, 4, 13)),
    Case(head_dim=6, group=3, page_size=4, window=5, softcap=2.0, queries=3, lengths=(0, 2, 9, 3, 17)),
    Case(head_dim=8, group=3, page_size=4, window=5, sinks=True, queries=2, lengths=(0, 2, 9)),
]
EXTEND = [
    Case(head_dim=8, group=2, page_size=4, block_q=4, lengths=(6, 9, 0, 17), new_tokens=(6, 1, 0, 5)),
    Case(head_dim=6, group=3, page_size=4, block_q=4, window=5, softcap=2.0, lengths=(11, 4), new_tokens=(7, 3)),
    Case(head_dim=8, group=3, page_size=4, block_q=4, sinks=True, softcap=2.0, lengths=(11, 4), new_tokens=(7, 3)),
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


@pytest.mark.parametrize("cache", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_kv_write_reference_casts_and_drops_page_zero(cache):
    args = write_inputs(Case(head_dim=6, page_size=4, cache=cache), tokens=11)
    for got, expected in zip(kernels.kv_write_reference(*args), naive_write(*args)):
        assert got.dtype == cache
        np.testing.assert_array_equal(*(np.asarray(x).astype(np.float32) for x in (got, expected)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("cache, most", [("float8_e4m3fn", 448), ("float8_e5m2", 57344)])
def test_floats_of_8_bits_saturate_and_keep_nan(cache, most, dtype):
    values = jnp.array([most, 1.2 * most, -1e30, jnp.inf, -jnp.inf, jnp.nan, 1.0625, -0.0, 1e-9], jnp.float32)
    held = tile.stored(values.astype(dtype), jnp.dtype(cache)).astype(jnp.float32)
    one = 1.0  # ties to even: 1.0625 lies between 1 and 1.125 or 1.25
    np.testing.assert_array_equal(held, np.array([most, most, -most, most, -most, np.nan, one, -0.0, 0], np.float32))


def test_paged_extend_reference_keeps_what_lies_in_no_block():
    args = extend_inputs(EXTEND[0])
    mine = np.full_like(args[0], 7)
    out = kernels.paged_extend_reference(*args, mine, block_q=4, **EXTEND[0].options)
    zeros = kernels.paged_extend_reference(*args, block_q=4, **EXTEND[0].options)
    outside = ~np.asarray(zeros).any(axis=(1, 2))
    assert outside.tolist() == [False] * 6 + [True] + [False] * 5 + [True] * 3
    np.testing.assert_array_equal(out, np.where(outside[:, None, None], mine, zeros))


@pytest.mark.parametrize("normed, pairs", [(False, 3), (True, 2)])
def test_rope_write_reference(normed, pairs):
    args = rope_write_inputs(Case(head_dim=6, group=3, page_size=4), 11, pairs, normed)
    out = kernels.rope_write_reference(*args, eps=0.1)
    for got, expected in zip(out, naive_rope_write(*args, eps=0.1)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_add_rms_norm_reference():
    x, y, (scale, *_) = np.random.default_rng(0).standard_normal((3, 5, 12)).astype(np.float32)
    total, normed = kernels.add_rms_norm_reference(x, y, scale, eps=0.1)
    np.testing.assert_array_equal(total, x + y)
    exact = (x + y).astype(np.float64)
    expected = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-6)
    narrow = x.astype(jnp.bfloat16)
    in_parts = kernels.add_rms_norm_reference(
        narrow, np.stack([y / 4, y / 2, y / 4]), scale.astype(jnp.bfloat16), eps=0.1
    )
    np.testing.assert_array_equal(in_parts[0], (narrow.astype(np.float32) + y).astype(jnp.bfloat16))
    np.testing.assert_allclose(in_parts[1].astype(np.float32), normed, rtol=5e-2, atol=1e-2)


def test_gated_activation_reference_rounds_the_activation():
    x = np.random.default_rng(0).standard_normal((5, 14)).astype(jnp.bfloat16)
    gate, up = x[:, :7].astype(np.float64), x[:, 7:].astype(np.float32)
    active = (gate / (1 + np.exp(-gate))).astype(jnp.bfloat16).astype(np.float32)
    out = kernels.gated_activation_reference(x, jax.nn.silu)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out), (active * up).astype(jnp.bfloat16))
