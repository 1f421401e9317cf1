"""What `jaxengine bench kernels` makes of its measurements, and what it measures on; the kernels' twins stand in."""

import json
from functools import partial

import numpy as np
import pytest

import pallas_kernels
from jaxengine.benchmark import device, kernels
from jaxengine.benchmark.kernels import BALANCED, LLAMA_8B, PAGE, SKEWED, Experts, Heads
from jaxengine.errors import UnsupportedError

SMALL = Heads(4, 2, 16)


@pytest.fixture
def twins(monkeypatch):
    """The references instead of the kernels, which want a GPU; few and short samples; a small cache to exceed."""
    for name in (
        "add_rms_norm",
        "gated_activation",
        "gated_matmul",
        "kv_write",
        "grouped_matmul",
        "grouped_gated_matmul",
    ):
        monkeypatch.setattr(pallas_kernels, name, getattr(pallas_kernels, f"{name}_reference"))
    monkeypatch.setattr(pallas_kernels, "split_matmul", partial(pallas_kernels.split_matmul_reference, parts=2))
    decode = pallas_kernels.paged_decode_reference
    monkeypatch.setattr(pallas_kernels, "paged_decode", lambda *args, tuning, **kw: decode(*args, **kw))
    monkeypatch.setattr(device, "PAUSE_S", 0)
    monkeypatch.setattr(device, "SAMPLE_S", 0)
    monkeypatch.setattr(kernels, "seconds", partial(device.seconds, samples=2))
    monkeypatch.setattr(kernels, "L2_BYTES", 30_000)
    monkeypatch.setattr(kernels, "OPS", 2)


def test_the_skewed_rows_have_as_many_keys_as_the_balanced_ones():
    (balanced, heads), (skewed, same) = kernels.DECODE[BALANCED], kernels.DECODE[SKEWED]
    assert heads == same == LLAMA_8B
    assert len(balanced) == len(skewed) == 128 and sum(balanced) == sum(skewed) == 2**17
    assert skewed[0] == 16384 and {903, 904} == set(skewed[1:])


def test_every_row_has_pages_of_its_own(monkeypatch):
    monkeypatch.setattr(kernels, "L2_BYTES", 10**5)
    lengths = [40, 1, 16, 17]
    k_pages, _, tables = kernels.paged_inputs(lengths, SMALL)
    used = []
    for table in map(np.asarray, tables):
        for row, length in zip(table, lengths):
            own = -(-length // PAGE)
            assert (row[own:] == 0).all()
            used += row[:own].tolist()
    assert sorted(used) == list(range(1, len(k_pages)))  # each page once, all tables together; not the null page
    assert len(used) * PAGE * 4 * 2 * 16 > 3 * kernels.L2_BYTES


def test_an_op_is_timed_and_compared(twins):
    [decode] = kernels.time_decode("decode", [40, 3, 17], SMALL)
    assert decode["bytes"] == 60 * 2 * 16 * 4
    assert decode["us"] > 0 and decode["error"] == 0
    assert decode["bytes_per_s"] * decode["us"] == pytest.approx(decode["bytes"] * 1e6)
    [half] = kernels.time_decode("decode", [40, 3, 17], SMALL._replace(cache="float8_e4m3fn"))
    assert half["bytes"] == decode["bytes"] / 2 and half["error"] == 0
    [write] = kernels.time_write(6, SMALL, pages=40)
    assert write["bytes"] == 6 * 2 * 16 * 2 * 4 and write["error"] == 0


def test_on_hopper_decode_is_timed_by_both_kernels(twins, monkeypatch):
    seen, decode = [], pallas_kernels.paged_decode
    monkeypatch.setattr(kernels, "on_mosaic_card", lambda: True)
    monkeypatch.setattr(
        pallas_kernels, "paged_decode", lambda *args, tuning, **kw: seen.append(tuning) or decode(*args, tuning=0, **kw)
    )
    results = kernels.time_decode("decode", [40, 3], Heads(4, 2, 64))
    assert [result["op"] for result in results] == ["decode", "decode by Mosaic"]
    assert {type(tuning).__module__ for tuning in seen} == {
        "pallas_kernels.paged_decode",
        "pallas_kernels.paged_decode_mosaic",
    }


@pytest.mark.parametrize(("tokens", "bound"), [(1, "bytes"), (600, "flops")])
def test_experts_are_bound_by_what_takes_longer(twins, tokens, bound):
    [result] = kernels.time_experts("experts", tokens, Experts(3, 2, 16, 8))
    assert {"bytes", "flops"} & set(result) == {bound}
    per_value = 2 * (2 if bound == "bytes" else 2 * tokens)  # of the experts that are hit, or of every row
    assert result[bound] == per_value * 3 * 16 * 8
    assert result["error"] == 0


@pytest.mark.parametrize("time_products", [kernels.time_split, kernels.time_gated])
def test_products_of_few_rows_are_timed_beside_xlas(time_products, twins, monkeypatch):
    [other] = time_products(8, 16, 32)
    assert other["op"].endswith(", XLA") and other["error"] == 0 and other["bytes"] == 2 * 16 * 32
    monkeypatch.setattr(kernels, "on_mosaic_card", lambda: True)
    assert len(time_products(8, 16, 32)) == 1, "no choice is made for these shapes"
    for name in ("split_tuning", "gated_tuning"):
        monkeypatch.setattr(kernels, name, lambda *_: True)
    ours, other = time_products(8, 16, 32)
    assert ours["error"] < 1e-2 and ours["bytes"] == other["bytes"]
    for name in ("split_matmul", "gated_matmul"):
        right = getattr(pallas_kernels, name)
        monkeypatch.setattr(pallas_kernels, name, lambda *args, right=right: 1.5 * right(*args))
    assert time_products(8, 16, 32)[0]["error"] > 0.02


def test_a_wrong_kernel_shows_as_an_error(twins, monkeypatch):
    right = pallas_kernels.paged_decode
    monkeypatch.setattr(pallas_kernels, "paged_decode", lambda *args, **kw: right(*args, **kw) * 1.5)
    [decode] = kernels.time_decode("decode", [40, 3, 17], SMALL)
    assert decode["error"] == pytest.approx(0.5, rel=0.02)


def summary(card, read=4.44e12, matmul=790e12):
    measured = [("bytes", BALANCED, 100.0), ("bytes", SKEWED, 130.0), ("flops", "extend by Triton 2048", 60.0),
                ("flops", "cudnn 2048", 50.0)]  # fmt: skip
    results = [
        {"op": op, "us": us, "spread": 0.01, kind: 4e8, f"{kind}_per_s": 4e8 / us * 1e6, "error": 1e-3}
        for kind, op, us in measured
    ]
    return kernels.summarize(card, read, matmul, results)


def test_ratios_and_shares():
    result = summary("NVIDIA H200")
    assert result["ratios"] == {f"{SKEWED} / {BALANCED}": 1.3, "extend by Triton 2048 / cudnn 2048": 1.2}
    assert result["results"][0]["share"] == pytest.approx(4e12 / 4.44e12)
    shown = kernels.table(result)
    assert all(text in shown for text in (SKEWED, "1.30", "TFLOP/s", "NVIDIA H200"))
    json.dumps(result)


@pytest.mark.parametrize(
    ("card", "read", "void", "said"),
    [
        ("NVIDIA H200", 4.44e12, False, None),
        ("NVIDIA H200", 4.2e12, True, "VOID: expected 4.44 TB/s and 790 TFLOP/s within 3%"),
        ("NVIDIA H100 80GB HBM3", 3.0e12, None, "No known limit of this card is on record"),
    ],
)
def test_only_a_known_card_can_make_a_run_void(card, read, void, said):
    result = summary(card, read)
    assert result["void"] is void
    shown = kernels.table(result)
    assert f"reads {read / 1e12:.2f} TB/s" in shown
    assert said in shown if said else "VOID" not in shown and "No known" not in shown


def test_without_a_gpu_it_says_so():
    with pytest.raises(UnsupportedError, match="run on an NVIDIA GPU, jax found a cpu"):
        kernels.run()
