import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import config
from jaxengine.layers.activation import ACTIVATIONS


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


DEFINITIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "tanh": math.tanh,
    "sigmoid": sigmoid,
}


def test_every_activation_a_config_may_name_is_defined():
    assert set(ACTIVATIONS) == set(config.ACTIVATIONS) == set(DEFINITIONS)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activation(name):
    x = np.linspace(-6, 6, 241)
    expected = [DEFINITIONS[name](value) for value in x]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), expected, rtol=2e-5, atol=2e-6)
