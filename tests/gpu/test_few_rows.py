"""Products of few rows (Hopper): the kernels against their twins, and a whole engine with them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from jaxengine import SamplingParams
from jaxengine.layers.activation import ACTIVATIONS
from pallas_kernels.skinny_matmul import split_tuning
from tests.gpu.test_whole_layers import HOPPER, TOKENS, check_tokens, folder, opened  # noqa: F401
from tests.pallas_kernels.cases import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs Hopper")]
PROMPTS = [[(7 * i + 3 * j) % 2000 for j in range(5 + 9 * i % 40)] for i in range(30)]  # one step, then 30 rows
full = partial(pytest.param, marks=pytest.mark.full)


def inputs(rows, size, columns, dtype):
    keys = jax.random.split(jax.random.key(rows + size))
    x, kernel = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, ((rows, size), (size, columns))))
    return x, kernel * jnp.asarray(size**-0.5, dtype)


@pytest.mark.parametrize(
    ("rows", "size", "columns", "dtype"),
    [(64, 2048, 2048, "bfloat16"), (24, 14336, 4096, "float16"), (128, 6144, 2560, "bfloat16"),
     *(full(rows, 3072, 1024, "bfloat16") for rows in (8, 16, 32, 96))],
)  # fmt: skip
def test_split_matmul(rows, size, columns, dtype):
    x, kernel = inputs(rows, size, columns, dtype)
    if (tuning := split_tuning(x, kernel)) is None:
        pytest.skip("this card has too few multiprocessors")
    found, again = (kernels.split_matmul(x, kernel) for _ in range(2))
    want = kernels.split_matmul_reference(x, kernel, tuning.parts)
    assert found.shape == want.shape and relative_error(found, want) < 1e-5
    np.testing.assert_array_equal(found, again)
    stream, scale = x[:, :columns], jnp.ones(columns, dtype)
    got = kernels.add_rms_norm(stream, found, scale, eps=1e-5)
    for each, expected in zip(got, kernels.add_rms_norm_reference(stream, want, scale, eps=1e-5), strict=True):
        assert relative_error(each, expected) < 1e-2


@pytest.mark.parametrize(
    ("rows", "size", "columns", "dtype", "activation"),
    [(64, 2048, 2 * 8192, "bfloat16", "silu"), (16, 4096, 2 * 14336, "float16", "gelu_pytorch_tanh"),
     *(full(32, 1024, 2 * 3072, "bfloat16", name) for name in ("silu", "relu2", "quick_gelu", "sigmoid"))],
)  # fmt: skip
def test_gated_matmul(rows, size, columns, dtype, activation):
    x, kernel = inputs(rows, size, columns, dtype)
    found = kernels.gated_matmul(x, kernel, ACTIVATIONS[activation])
    want = kernels.gated_matmul_reference(x, kernel, ACTIVATIONS[activation])
    assert found.dtype == dtype and relative_error(found, want) < {"float16": 2e-3, "bfloat16": 1e-2}[dtype]


@pytest.mark.parametrize("attention", ["triton", full("mosaic")])
def test_tokens_are_the_references_best_ones(folder, attention):  # noqa: F811
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    with opened(folder, attention=attention, max_num_seqs=32, max_num_batched_tokens=1024) as llm:
        outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
        decode = {
            key[1].rows: program.as_text() for key, program in llm._runner._programs.items() if key[0] == "decode"
        }
    assert 32 in decode
    for rows, text in decode.items():
        assert ("skinny_matmul" in text) == (rows > 8)
    check_tokens(folder, [output.prompt_token_ids + list(output.outputs[0].token_ids) for output in outputs])
