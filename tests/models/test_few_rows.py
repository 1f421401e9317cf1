"""Products of few rows by kernels of their own: which models, and the same tokens with their twins in their place."""

import jax
import jax.numpy as jnp
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.layers.linear import Linear
from jaxengine.layers.ops import FewRows, few_rows
from jaxengine.models import llama, prepare
from jaxengine.weights import prepared
from pallas_kernels import gated_matmul_reference, split_matmul_reference
from tests import tiny_llm
from tests.pallas_kernels.lowering import lower_for_cuda

PROMPTS = [[7 + i] * (1 + 9 * i) for i in range(6)]


def answers(monkeypatch, kind, twins, most=8, **options):
    """Greedy tokens, and the products of each kind that were traced with at most so many rows."""
    traced = {"split": 0, "gated": 0}

    def split(x, linear):
        if linear.plain is None or len(x) > most or not twins:
            return None
        traced["split"] += 1
        return split_matmul_reference(x, linear.plain, 2)

    def gated(x, linear, activation):
        if linear is None or linear.plain is None or len(x) > most or not twins:
            return None
        traced["gated"] += 1
        return gated_matmul_reference(x, linear.plain, activation)

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    with monkeypatch.context() as patch:
        patch.setattr(llama, "few_rows", lambda implementation: FewRows(split, gated))
        patch.setattr(prepared, "prepare", lambda *args: prepare(*args[:3], False, *args[4:]))  # as on GPUs
        llama.run_layer.clear_cache()
        with LLM(tiny_llm.model_folder(kind), **(tiny_llm.OPTIONS | options)) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        llama.run_layer.clear_cache()
    return [list(output.outputs[0].token_ids) for output in outputs], traced


@pytest.mark.parametrize("kind", ["llama", "windows", "sinks", "experts"])
def test_the_same_tokens(kind, monkeypatch):
    want, _ = answers(monkeypatch, kind, False)
    found, traced = answers(monkeypatch, kind, True)
    assert found == want
    biased = kind == "sinks"  # gpt_oss has biases, and experts in place of the MLP
    assert bool(traced["split"]) != biased and bool(traced["gated"]) == (kind in ("llama", "windows"))


def test_kernels_that_lie_apart(monkeypatch):
    """Gate and up are two products; those that the stream adds are as ever."""
    traced = answers(monkeypatch, "llama", True, fuse_weights=False)[1]
    assert traced["split"] and not traced["gated"]


@pytest.mark.parametrize("implementation", ["xla", "reference", "triton", "mosaic"])
def test_only_on_cards_that_have_such_kernels(implementation):
    x, gate_up = jnp.zeros((64, 2048), jnp.bfloat16), Linear({"kernel": jnp.zeros((2048, 16384), jnp.bfloat16)})
    down, biased = Linear({"kernel": jnp.zeros((2048, 2048), jnp.bfloat16)}), Linear({"kernel": x.T, "bias": x[:, 0]})
    kinds = few_rows(implementation)

    def lowered(card):
        calls = [
            (kinds.split, down),
            (kinds.split, biased),
            *((kinds.gated, of, jax.nn.silu) for of in (gate_up, None)),
        ]
        programs = [lower_for_cuda(lambda x, f=f, args=args: f(x, *args), x, card=card) for f, *args in calls]
        return ["mosaic_gpu" in program for program in programs]

    assert lowered("NVIDIA H200") == [implementation in ("triton", "mosaic"), False] * 2
    assert not any(lowered("NVIDIA A100"))
