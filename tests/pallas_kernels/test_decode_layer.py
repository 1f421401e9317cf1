"""The layer in one kernel: its twin against the kernels of a layer's parts, lowering for CUDA, and what it refuses."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from tests.pallas_kernels.cases import decode_layer_inputs, relative_error
from tests.pallas_kernels.lowering import lower_for_cuda

module = sys.modules["pallas_kernels.decode_layer"]  # the package has the function under this name
OPTIONS = {"eps": 1e-5, "scale": 0.2}
SMALL = {"hidden": 96, "heads": 6, "kv_heads": 2, "dim": 16, "inner": 80}
LENGTHS = (37, 1, 16, 0, 17, 5)
LLAMA_1B = {"hidden": 2048, "heads": 32, "kv_heads": 8, "dim": 64, "inner": 8192}


@pytest.mark.parametrize("normed", [False, True])
def test_the_twin_gives_what_the_parts_give(normed):
    args = decode_layer_inputs(**SMALL, normed=normed, lengths=LENGTHS, dtype="float32")
    qkv, stream, k_pages, v_pages, weights, table, lengths, page, offset, cos, sin, _ = args
    found = kernels.decode_layer_reference(*args, **OPTIONS)
    scales = (weights.q_scale, weights.k_scale) if normed else ()
    write = partial(kernels.rope_write_reference, eps=OPTIONS["eps"])
    q, *pools = write(k_pages, v_pages, qkv, cos, sin, page, offset, *scales)
    y = kernels.paged_decode_reference(q[:, None], *pools, table, lengths, scale=OPTIONS["scale"])

    def multiply(x, kernel):
        return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)

    add = partial(kernels.add_rms_norm_reference, eps=OPTIONS["eps"])
    total, y = add(stream, multiply(y.reshape(len(qkv), -1), weights.o), weights.norm)
    y = kernels.gated_activation_reference(multiply(y, weights.gate_up), jax.nn.silu)
    total, y = add(total, multiply(y, weights.down), weights.next_norm)
    live = np.asarray(lengths) > 0
    for got, want in zip(found, (multiply(y, weights.next_qkv).reshape(qkv.shape), total)):
        assert relative_error(np.asarray(got)[live], np.asarray(want)[live]) < 1e-5
    for got, want, before in zip(found[2:4], pools, (k_pages, v_pages)):
        assert relative_error(got, want) < 1e-5 < relative_error(got, before)
        np.testing.assert_array_equal(got[0], before[0])  # the null page


def structs(**changes):
    return jax.eval_shape(lambda: decode_layer_inputs(**(LLAMA_1B | changes), lengths=(1,)))


def layers(count, *args):
    """Of equal weights, one after another."""
    run = jax.jit(partial(kernels.decode_layer, **OPTIONS))
    qkv, stream, k_pages, v_pages, *rest, counters = args
    for _ in range(count):
        qkv, stream, k_pages, v_pages, counters = run(qkv, stream, k_pages, v_pages, *rest, counters)
    return stream, k_pages, v_pages


@pytest.mark.parametrize("changes", [{}, {"normed": True, "dim": 128}], ids=str)
def test_all_programs_have_the_very_same_kernel(changes):
    """So it is compiled once, whatever else is in them."""
    args, modules = structs(**changes), []
    for count in (1, 3):
        text = lower_for_cuda(partial(layers, count), *args)
        modules += re.findall(r'module = "((?:[^"\\]|\\.)*)"', text)
        assert text.count("output_operand_alias<") >= 3 * text.count("@mosaic_gpu_v2")  # pools and counters
    assert len(modules) >= 2 and len(set(modules)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"dim": 96},
        {"hidden": 2000},
        {"inner": 8000},
        {"page_size": 24},
        {"hidden": 256},
        {"heads": 20},
    ],
    ids=str,
)
def test_what_it_does_not_take(changes):
    args = structs(**changes)
    with pytest.raises(ValueError, match="kernel"):
        lower_for_cuda(partial(layers, 1), *args)
    qkv, stream, k_pages, _, weights, *_ = args
    assert not module.supports(qkv, stream, k_pages, weights, **OPTIONS)


@pytest.mark.parametrize("card, found", [("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)])
def test_the_card_decides(card, found):
    seen = []

    def program(qkv, stream, k_pages, _, weights, *rest):
        seen.append(module.supports(qkv, stream, k_pages, weights, **OPTIONS))
        return stream

    lower_for_cuda(program, *structs(), card=card)
    assert seen == [found]


def test_rows_must_fit():
    qkv, *args = structs()
    with pytest.raises(ValueError, match="do not fit"):
        lower_for_cuda(partial(layers, 1), jax.ShapeDtypeStruct((4, *qkv.shape[1:]), qkv.dtype), *args)


@pytest.mark.parametrize("i, shape", [(3, (7, 8, 16, 64)), (11, (8,))])
def test_v_and_counters_must_fit(i, shape):
    args = list(structs())
    args[i] = jax.ShapeDtypeStruct(shape, args[i].dtype)
    with pytest.raises(ValueError, match="do not fit"):
        lower_for_cuda(partial(layers, 1), *args)
