"""Log-probabilities of sampled tokens, of prompts, and of whole vocabularies."""

import jax
import numpy as np
import pytest

from jaxengine.sampling import log_softmax as device_log_softmax
from jaxengine.sampling import token_logprobs
from tests.sampling_cases import DRAWS, R, V, draw, log_softmax, make_fields, random_logits


@pytest.mark.parametrize(("mode", "k"), [("raw", 0), ("processed", 1), ("processed", 20), ("raw", V + 9)])
def test_log_probabilities(mode, k):
    logits, temperature = random_logits(), np.array([0, 0.5, 1, 2], np.float32)
    drawn = draw(logits, make_fields(temperature=temperature), mode="everything", num_logprobs=k, logprobs_mode=mode)
    scale = np.where(temperature > 0, temperature, 1)[:, None] if mode == "processed" else 1
    expected = log_softmax(logits / scale)
    token = np.asarray(drawn.tokens)
    own = expected[np.arange(R), token]
    np.testing.assert_allclose(drawn.logprob, own, atol=1e-5)
    assert drawn.rank.tolist() == (1 + (expected > own[:, None]).sum(-1)).tolist()
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    assert drawn.top_ids.tolist() == order.tolist() and drawn.top_logprobs.shape == (R, min(k, V))
    np.testing.assert_allclose(drawn.top_logprobs, np.take_along_axis(expected, order, -1), atol=1e-5)
    assert drawn.vocab_logprobs.shape == (R, 0)


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_greedy_tokens_log_probability_is_the_float_of_the_best(mode):
    logits = random_logits(64, 1000, scale=4)
    fields = make_fields(64, 1000, temperature=0)
    drawn = draw(logits, fields, mode="everything", num_logprobs=20, logprobs_mode=mode, whole_vocab=True)
    assert np.asarray(drawn.logprob).tobytes() == np.asarray(drawn.top_logprobs).max(-1).tobytes()
    assert np.asarray(drawn.logprob).tobytes() == np.asarray(drawn.vocab_logprobs).max(-1).tobytes()
    assert drawn.rank.tolist() == [1] * 64


def test_log_probabilities_of_a_large_vocabulary_are_exact_enough():
    logits = random_logits(1, 151_936, scale=0.5)
    np.testing.assert_allclose(jax.jit(device_log_softmax)(logits), log_softmax(logits), atol=1e-5)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_neutral_log_probabilities(mode):
    drawn = DRAWS[mode](random_logits(), make_fields())
    assert drawn.logprob.tolist() == [0] * R and drawn.rank.tolist() == [0] * R
    assert drawn.top_ids.shape == drawn.top_logprobs.shape == drawn.vocab_logprobs.shape == (R, 0)


# -- of given tokens

token_logprobs_jit = jax.jit(token_logprobs, static_argnums=2)


def given(count: int = 50):
    return random_logits(count), np.random.default_rng(5).integers(0, V, count).astype(np.int32)


@pytest.mark.parametrize("k", [0, 5, V + 9])
def test_log_probabilities_of_given_tokens(k):
    logits, tokens = given()
    found, expected = token_logprobs_jit(logits, tokens, k), log_softmax(logits)
    own = expected[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(found.logprob, own, atol=1e-5)
    assert found.rank.tolist() == (1 + (expected > own[:, None]).sum(-1)).tolist()
    assert found.top_ids.tolist() == np.argsort(-logits, axis=-1, kind="stable")[:, :k].tolist()
    np.testing.assert_allclose(
        found.top_logprobs, np.take_along_axis(expected, np.asarray(found.top_ids), -1), atol=1e-5
    )
    alone = token_logprobs_jit(logits, tokens, 0)
    assert alone.logprob.tolist() == found.logprob.tolist(), "whether a neighbour asks for the best or not"


def test_log_probabilities_of_the_whole_vocabulary_are_those_of_its_tokens():
    logits, tokens = given()
    whole, found = np.asarray(jax.jit(device_log_softmax)(logits)), token_logprobs_jit(logits, tokens, 5)
    assert whole.dtype == np.float32
    assert whole[np.arange(len(tokens)), tokens].tolist() == found.logprob.tolist()
    assert np.take_along_axis(whole, np.asarray(found.top_ids), -1).tolist() == found.top_logprobs.tolist()
