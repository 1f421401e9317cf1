"""The kernels in interpret mode against their references. Each shape compiles for a second: few and tiny."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as kernels
from pallas_kernels import mosaic_tile
from pallas_kernels import paged_decode_mosaic as decode_mosaic
from pallas_kernels import paged_extend_mosaic as mosaic
from pallas_kernels.paged_decode import TuningConfig as DecodeTuning
from pallas_kernels.paged_extend import TuningConfig as ExtendTuning
from tests.pallas_kernels.cases import (
    Case,
    decode_inputs,
    extend_inputs,
    relative_error,
    rope_write_inputs,
    write_inputs,
)

LIMIT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2, "float8_e4m3fn": 2e-2, "float8_e5m2": 4e-2}

DECODE = [
    Case(head_dim=64, group=1, lengths=(0, 1, 40, 70)),
    Case(head_dim=80, group=7, queries=5, window=20, softcap=3.0, dtype="bfloat16", lengths=(0, 3, 40, 141, 5)),
    Case(head_dim=32, group=16, kv_heads=1, page_size=32, softcap=3.0, dtype="float16", lengths=(300, 1, 0)),
    Case(head_dim=128, group=3, queries=8, window=300, page_size=128, lengths=(8, 700)),
    Case(head_dim=96, group=5, window=17, lengths=(16, 17, 18, 33)),
    # One part a row, and several.
    Case(head_dim=80, group=3, window=20, sinks=True, dtype="bfloat16", lengths=(0, 1, 40)),
    Case(head_dim=64, group=4, queries=3, softcap=3.0, sinks=True, lengths=(1200, 0, 2)),
    Case(head_dim=96, group=3, sinks=True, dtype="bfloat16", cache="float8_e4m3fn", lengths=(0, 1, 40, 70)),
    Case(head_dim=64, group=2, window=30, cache="float8_e5m2", lengths=(0, 3, 300)),
]
EXTEND = [
    Case(head_dim=64, group=1, lengths=(0, 1, 20, 70), new_tokens=(0, 1, 20, 50)),
    Case(head_dim=80, group=5, window=20, softcap=3.0, dtype="bfloat16", lengths=(40, 70, 5), new_tokens=(20, 50, 1)),
    Case(head_dim=32, group=3, kv_heads=1, page_size=64, dtype="float16", lengths=(200, 130), new_tokens=(9, 130)),
    Case(head_dim=96, group=16, kv_heads=1, block_q=8, window=33, lengths=(70, 16), new_tokens=(17, 16)),
    Case(head_dim=64, group=3, sinks=True, softcap=3.0, lengths=(0, 1, 20, 70), new_tokens=(0, 1, 20, 50)),
    Case(head_dim=80, group=2, dtype="bfloat16", cache="float8_e4m3fn", lengths=(40, 1), new_tokens=(20, 1)),
    Case(head_dim=64, group=2, window=20, sinks=True, cache="float8_e5m2", lengths=(40, 1), new_tokens=(20, 1)),
]
# Rows without keys, cut and whole; a page of several tiles and the other way around; queries of two tiles of rows, and
# of part of one.
MOSAIC_DECODE = [
    Case(head_dim=64, group=4, dtype="bfloat16", lengths=(0, 1, 70, 300)),
    Case(head_dim=64, group=3, kv_heads=1, queries=2, dtype="float16", window=70, softcap=3.0, page_size=128,
         lengths=(250, 30, 0)),
    Case(head_dim=64, group=3, queries=3, dtype="bfloat16", sinks=True, lengths=(0, 1, 70, 300)),
    Case(head_dim=64, group=4, kv_heads=1, dtype="bfloat16", cache="float8_e4m3fn", lengths=(0, 1, 70, 300)),
    Case(head_dim=64, group=3, queries=2, dtype="float16", cache="float8_e5m2", window=70, page_size=128,
         lengths=(250, 30, 0)),
]  # fmt: skip
# Two rows, ends within a page and within 64 tokens; a group that leaves a warpgroup without work; blocks of two tiles.
MOSAIC = [
    Case(head_dim=64, group=1, dtype="bfloat16", block_q=64, lengths=(70, 40), new_tokens=(61, 40)),
    Case(head_dim=64, group=3, kv_heads=1, dtype="float16", window=70, softcap=3.0, page_size=8, block_q=128,
         lengths=(250, 30), new_tokens=(130, 30)),
    Case(head_dim=64, group=3, dtype="bfloat16", sinks=True, block_q=64, lengths=(70, 40), new_tokens=(61, 40)),
    Case(head_dim=64, group=1, dtype="bfloat16", cache="float8_e4m3fn", block_q=64, lengths=(300, 40),
         new_tokens=(61, 40)),
    Case(head_dim=64, group=2, kv_heads=1, dtype="float16", cache="float8_e5m2", window=70, page_size=8, block_q=128,
         lengths=(250, 30), new_tokens=(130, 30)),
]  # fmt: skip


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_paged_decode(case):
    args = decode_inputs(case)
    out = kernels.paged_decode(*args, **case.options, interpret=True)
    expected = kernels.paged_decode_reference(*args, **case.options)
    assert out.dtype == case.dtype
    assert relative_error(out, expected) < LIMIT[case.dtype]
    empty = np.array(case.lengths) == 0
    assert not np.asarray(out)[empty].any()


def test_queries_beyond_float16_are_finite_with_pools_of_8_bits():
    """Their products are in float16. NaN stays NaN."""
    case = Case(head_dim=64, dtype="bfloat16", cache="float8_e4m3fn", lengths=(40, 70))
    q, *others = decode_inputs(case)
    q[0], q[1, 0, 0] = 1e30 * np.sign(q[0]), np.nan
    out = np.asarray(kernels.paged_decode(q, *others, **case.options, interpret=True))
    assert np.isfinite(out[0]).all() and np.isnan(out[1, 0, 0]).all() and np.isfinite(out[1, 0, 1]).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its interpreter fails where a barrier's end is not awaited")
@pytest.mark.parametrize("case, consumers", [*((case, 1) for case in MOSAIC_DECODE), (MOSAIC_DECODE[0], 2)], ids=str)
def test_paged_decode_by_mosaic(case, consumers, monkeypatch):
    """With a check for races between the warpgroups and the copies; each stream has several items or parts of one."""
    monkeypatch.setattr(mosaic_tile, "multiprocessors", lambda: 3)
    if consumers > 1:  # the check takes the places of two consumers in a RefUnion for one
        unchecked = plgpu.InterpretGPUParams(detect_races=False)
        monkeypatch.setattr(plgpu, "InterpretGPUParams", lambda **_: unchecked)
    as_bytes = case.cache == "float8_e5m2"
    args, tuning = decode_inputs(case), decode_mosaic.TuningConfig(64, 2, consumers, as_bytes)
    out = kernels.paged_decode(*args, **case.options, tuning=tuning, interpret=True)
    assert relative_error(out, kernels.paged_decode_reference(*args, **case.options)) < LIMIT[case.dtype]
    assert not np.asarray(out)[np.array(case.lengths) == 0].any()


def test_parts_and_tiles_change_only_rounding():
    case = Case(group=2, window=60, lengths=(0, 1, 150, 90))
    args = decode_inputs(case)
    outs = [
        kernels.paged_decode(*args, **case.options, tuning=DecodeTuning(*tuning), interpret=True)
        for tuning in ((64, 1, 4), (16, 7, 4, 3, 16))
    ]
    assert 0 < relative_error(*outs) < 1e-5


@pytest.mark.parametrize("case", EXTEND, ids=str)
def test_paged_extend(case, **tuning):
    args = extend_inputs(case)
    out = kernels.paged_extend(*args, block_q=case.block_q, **case.options, **tuning, interpret=True)
    expected = kernels.paged_extend_reference(*args, block_q=case.block_q, **case.options)
    assert out.dtype == case.dtype
    assert relative_error(out, expected) < LIMIT[case.dtype]
    alone = [i for count, start in zip(case.new_tokens, args[6]) if count == 1 for i in [start]]
    out, outside = np.asarray(out), [*alone, -1, -2, -3]
    assert not out[outside].any(), "tokens in no block"
    mine = np.random.default_rng(0).standard_normal(out.shape).astype(out.dtype)
    options = {"block_q": case.block_q, "interpret": True, **case.options, **tuning}
    kept = np.array(kernels.paged_extend(*args, mine, **options))
    np.testing.assert_array_equal(kept[outside], mine[outside])
    kept[outside] = 0
    np.testing.assert_array_equal(kept, out)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its interpreter fails where a barrier's end is not awaited")
@pytest.mark.parametrize("case, q_buffers", [*((case, 2) for case in MOSAIC), (MOSAIC[0], 1)], ids=str)
def test_paged_extend_by_mosaic(case, q_buffers, monkeypatch):
    """With a check for races between the warpgroups and the copies; both programs have several items of work."""
    monkeypatch.setattr(mosaic_tile, "multiprocessors", lambda: 2)
    options = {"stages": 1 if case.cache else 2, "as_bytes": case.cache == "float8_e5m2"}
    test_paged_extend(case, tuning=mosaic.TuningConfig(block_kv=64, q_buffers=q_buffers, **options))


@pytest.mark.parametrize(
    "case",
    [
        Case(kv_heads=3, head_dim=80, dtype="bfloat16"),
        Case(kv_heads=1, head_dim=64, page_size=32),
        Case(kv_heads=2, head_dim=64, dtype="bfloat16", cache="float8_e4m3fn"),
        Case(kv_heads=1, head_dim=96, cache="float8_e5m2"),
    ],
    ids=str,
)
def test_kv_write(case):
    args = write_inputs(case, tokens=13)
    for got, expected in zip(kernels.kv_write(*args, interpret=True), kernels.kv_write_reference(*args)):
        assert got.dtype == args[0].dtype
        np.testing.assert_array_equal(*(np.asarray(x).astype(np.float32) for x in (got, expected)))


@pytest.mark.parametrize(
    "case, pairs, normed",
    [
        (Case(kv_heads=2, group=4), 32, False),
        (Case(kv_heads=3, group=7, head_dim=80, dtype="bfloat16"), 10, True),
        (Case(kv_heads=1, group=3, head_dim=96, page_size=32), 48, True),
        (Case(kv_heads=2, group=2, dtype="bfloat16", cache="float8_e4m3fn"), 32, False),
        (Case(kv_heads=1, group=3, cache="float8_e5m2"), 16, True),
    ],
    ids=str,
)
def test_rope_write(case, pairs, normed):
    args = rope_write_inputs(case, 13, pairs, normed)
    out = kernels.rope_write(*args, eps=1e-5, interpret=True)
    expected = kernels.rope_write_reference(*args, eps=1e-5)
    for got, want, given in zip(out, expected, (args[2], *args)):
        assert got.dtype == given.dtype
        assert relative_error(got, want) < LIMIT[got.dtype.name]
        got, want = (np.asarray(x).astype(np.float32) for x in (got, want))
        small = abs(want) < 16  # beside which those that saturate would hide any error
        assert relative_error(got[small], want[small]) < LIMIT[case.cache or case.dtype]
    untouched = np.ones(len(args[0]), bool)
    untouched[args[5]] = False
    for got, pool in zip(out[1:], args):
        np.testing.assert_array_equal(np.asarray(got)[untouched], pool[untouched])


@pytest.mark.parametrize("size, dtype", [(256, "float32"), (200, "bfloat16")])
def test_add_rms_norm(size, dtype):
    x, y, (scale, *_) = np.random.default_rng(0).standard_normal((3, 5, size)).astype(dtype)
    out = kernels.add_rms_norm(x, y, scale, eps=1e-5, interpret=True)
    for got, want in zip(out, kernels.add_rms_norm_reference(x, y, scale, eps=1e-5)):
        assert got.dtype == dtype
        assert relative_error(got, want) < LIMIT[dtype]
    parts = np.random.default_rng(1).standard_normal((3, 5, size)).astype(np.float32)
    in_parts = [run(x, parts, scale, eps=1e-5) for run in (partial(kernels.add_rms_norm, interpret=True),
                                                           kernels.add_rms_norm_reference)]  # fmt: skip
    for got, want, before in zip(*in_parts, out):
        assert got.dtype == dtype
        assert relative_error(got, want) < LIMIT[dtype] < relative_error(before, want)


@pytest.mark.parametrize("size, dtype", [(1100, "float32"), (64, "bfloat16")])
def test_gated_activation(size, dtype):
    x = np.random.default_rng(0).standard_normal((5, 2 * size)).astype(dtype)
    out, expected = (
        kernels.gated_activation(x, jax.nn.silu, interpret=True),
        kernels.gated_activation_reference(x, jax.nn.silu),
    )
    assert out.dtype == dtype
    assert relative_error(out, expected) < LIMIT[dtype]


def test_bad_input_is_named():
    q, k, v, table, lengths = decode_inputs(Case())
    good = {"scale": 1.0, "interpret": True}
    for match, args, options in (
        ("queries=9", (q.repeat(9, axis=1), k, v, table, lengths), {}),
        ("window=0", (q, k, v, table, lengths), {"window": 0}),
        ("softcap=-1", (q, k, v, table, lengths), {"softcap": -1.0}),
        ("heads=3", (q.repeat(2, axis=2)[:, :, :3], k, v, table, lengths), {}),
        ("int32", (q.astype(np.int32), k, v, table, lengths), {}),
        (r"lengths.shape=\(2,\)", (q, k, v, table, lengths[:2]), {}),
        (r"sinks.shape=\(3,\) .* heads=2", (q, k, v, table, lengths), {"sinks": np.zeros(3, np.float32)}),
        ("sinks.dtype=dtype.'int32'", (q, k, v, table, lengths), {"sinks": np.zeros(2, np.int32)}),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.paged_decode(*args, **good, **options)
    for match, make in (
        ("block_kv=48", lambda: DecodeTuning(48, 1, 4)),
        ("parts=0", lambda: DecodeTuning(64, 0, 4)),
        ("num_warps=3", lambda: ExtendTuning(64, 64, 3)),
        ("tile_rows=8", lambda: ExtendTuning(8, 64, 4)),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    args = extend_inputs(Case(lengths=(40,), new_tokens=(20,)))
    with pytest.raises(ValueError, match="block_start"):
        kernels.paged_extend(*args[:5], args[5][:1], *args[6:], block_q=16, **good)
    args = write_inputs(Case(), tokens=5)
    with pytest.raises(ValueError, match=r"offset.shape=\(4,\)"):
        kernels.kv_write(*args[:5], args[5][:4], interpret=True)
    args = extend_inputs(Case(lengths=(40,), new_tokens=(20,)))
    with pytest.raises(ValueError, match=r"out.shape"):
        kernels.paged_extend(*args, args[0][1:], block_q=16, **good)
    args = rope_write_inputs(Case(), 5, 32, True)
    for match, wrong in (
        (r"qkv.shape=\(5, 5, 64\)", (*args[:2], args[2][:, :5], *args[3:])),
        (r"cos.shape=\(5, 33\)", (*args[:3], *[np.zeros((5, 33), np.float32)] * 2, *args[5:])),
        (r"page.shape=\(4,\)", (*args[:5], args[5][:4], *args[6:])),
        ("both or neither", args[:-1]),
        (r"k_scale has shape \(9,\)", (*args[:-1], args[-1][:9])),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.rope_write(*wrong, interpret=True)
    with pytest.raises(ValueError, match=r"y.shape=\(1, 4\)"):
        kernels.add_rms_norm(np.zeros((2, 4)), np.zeros((1, 4)), np.zeros(4), eps=0.1, interpret=True)
    with pytest.raises(ValueError, match=r"y.shape=\(3, 2, 4\) y.dtype=dtype.'float16'. .* parts, float32"):
        kernels.add_rms_norm(np.zeros((2, 4)), np.zeros((3, 2, 4), np.float16), np.zeros(4), eps=0.1, interpret=True)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 5\)"):
        kernels.gated_activation(np.zeros((2, 5)), jax.nn.silu, interpret=True)
