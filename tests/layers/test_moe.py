"""The mixture of experts against a loop over tokens in NumPy; padding; what a device has of the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine.config import ExpertsConfig
from jaxengine.layers.attention import AttentionInputs, LayerInputs
from jaxengine.layers.moe import MoE
from jaxengine.layers.ops import ops
from jaxengine.models import flatten
from jaxengine.weights.checkpoint import read_config
from tests.references import tiny

HIDDEN, INNER, COUNT = 16, 12, 5


def inputs(page, implementation="xla"):
    step = AttentionInputs(*[None] * 9, layer_group=(), implementation=implementation, block_q=4)
    return LayerInputs(step, np.asarray(page, np.int32), np.zeros((1, 1), np.int32))


def arrays():
    shapes = {
        "gate_proj": (COUNT, HIDDEN, INNER),
        "up_proj": (COUNT, HIDDEN, INNER),
        "down_proj": (COUNT, INNER, HIDDEN),
    }
    drawn = {
        name: {"kernel": 0.3 * tiny.uniform(name, np.prod(shape)).reshape(shape)} for name, shape in shapes.items()
    }
    return {"gate": {"kernel": tiny.uniform("gate", HIDDEN * COUNT).reshape(HIDDEN, COUNT)}, "experts": drawn}


def with_biases():
    params = arrays()
    params["gate"]["bias"] = tiny.uniform("gate bias", COUNT)
    for name, each in params["experts"].items():
        shape = COUNT, each["kernel"].shape[2]
        each["bias"] = tiny.uniform(f"{name} bias", np.prod(shape)).reshape(shape)
    return params


def moe(params, per_token=2, normalize=True, swiglu=None):
    experts = ExpertsConfig(COUNT, per_token, INNER, normalize, (0,), "bias" in params["gate"], swiglu)
    config = read_config(tiny.config("mixtral"), "float32", ())
    object.__setattr__(config, "experts", experts)
    return MoE(config, jax.tree.map(jnp.asarray, params), None)


def by_hand(params, x, per_token, normalize, swiglu=None):
    out = np.zeros(x.shape)

    def product(row, name, expert):
        array = params["experts"][name]
        return row @ array["kernel"][expert].astype(np.float64) + (array["bias"][expert] if "bias" in array else 0)

    for token, row in enumerate(x.astype(np.float64)):
        shares = np.exp(row @ params["gate"]["kernel"] + params["gate"].get("bias", 0))
        shares /= shares.sum()
        best = np.argsort(-shares)[:per_token]
        for expert in best:
            gate, up = product(row, "gate_proj", expert), product(row, "up_proj", expert)
            alpha, one = 1, 0
            if swiglu is not None:
                (alpha, limit), one = swiglu, 1
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            weight = shares[expert] / (shares[best].sum() if normalize else 1)
            out[token] += weight * product(gate / (1 + np.exp(-alpha * gate)) * (up + one), "down_proj", expert)
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("per_token", "normalize"), [(2, True), (2, False), (1, True), (COUNT, False)])
def test_tokens_are_sums_of_their_experts(per_token, normalize, implementation):
    params, x = arrays(), tiny.uniform("x", 9 * HIDDEN).reshape(9, HIDDEN)
    out = jax.jit(lambda x: moe(params, per_token, normalize)(x, inputs([3] * 9, implementation)))(x)
    np.testing.assert_allclose(out, by_hand(params, x, per_token, normalize), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("swiglu", [None, (1.702, 0.7)])
def test_experts_with_biases(swiglu, implementation):
    """The softmax of the chosen, as gpt_oss has it, is the normalized one; padding is zero, its bias too."""
    params, x = with_biases(), tiny.uniform("x", 9 * HIDDEN).reshape(9, HIDDEN)
    page = np.array([3, 3, 0, 3, 3, 3, 3, 3, 0])
    out = jax.jit(lambda x: moe(params, swiglu=swiglu)(x, inputs(page, implementation)))(x)
    expected = by_hand(params, x, 2, True, swiglu) * (page > 0)[:, None]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_padding_is_no_work_and_disturbs_nothing(monkeypatch):
    """It is multiplied by no expert, even where it is not a number; its own result is zero."""
    layer, x, sizes = moe(arrays()), tiny.uniform("x", 9 * HIDDEN).reshape(9, HIDDEN), []
    page = np.array([3, 0, 4, 0, 0, 5, 3, 0, 0])
    product = ops("xla").grouped_matmul
    spied = ops("xla")._replace(grouped_matmul=lambda *args: sizes.append(args[2]) or product(*args))
    alone = jax.jit(lambda x: layer(x, inputs(page[page > 0])))(x[page > 0])
    monkeypatch.setattr("jaxengine.layers.moe.ops", lambda implementation: spied)
    run = jax.jit(lambda x: (layer(x, inputs(page)), sizes[-1]))
    out, multiplied = map(np.asarray, run(np.where(page[:, None] == 0, np.nan, x)))
    np.testing.assert_allclose(out[page > 0], alone, rtol=1e-5, atol=1e-6)
    assert not out[page == 0].any()
    assert multiplied.sum() == 2 * 4


def test_parameters_have_canonical_names():
    assert {path for path, _ in flatten(nnx.state(moe(arrays())))} == {
        "gate.kernel", "experts.gate_proj.kernel", "experts.up_proj.kernel", "experts.down_proj.kernel",
    }  # fmt: skip
