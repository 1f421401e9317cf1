"""Log-probabilities of sampled tokens, of prompts, and of whole vocabularies."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.sampling import prompt_logprobs, prompt_vocab_logprobs
from tests.sampling_cases import DRAWS, R, V, draw, equations, log_softmax, make_fields, random_logits


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
    got = jax.jit(prompt_vocab_logprobs, static_argnums=1)(logits, lambda x: x)
    np.testing.assert_allclose(got, log_softmax(logits), atol=1e-5)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_neutral_log_probabilities(mode):
    drawn = DRAWS[mode](random_logits(), make_fields())
    assert drawn.logprob.tolist() == [0] * R and drawn.rank.tolist() == [0] * R
    assert drawn.top_ids.shape == drawn.top_logprobs.shape == drawn.vocab_logprobs.shape == (R, 0)


# -- prompts

T, E, CHUNK = 50, 8, 16


prompt_logprobs_jit = jax.jit(prompt_logprobs, static_argnums=(1, 4, 5))


def prompt():
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(E, V)).astype(np.float32)
    head = partial(jnp.dot, b=kernel, precision=jax.lax.Precision.HIGHEST)
    return rng.normal(size=(T, E)).astype(np.float32), head, rng.integers(0, V, T).astype(np.int32)


@pytest.mark.parametrize("k", [0, 5])
def test_prompt_log_probabilities(k):
    hidden, head, targets = prompt()
    found = prompt_logprobs_jit(hidden, head, np.arange(T), targets, k, CHUNK)
    logits = np.asarray(head(hidden))
    expected = log_softmax(logits)
    own = expected[np.arange(T), targets]
    np.testing.assert_allclose(found.logprob, own, atol=1e-5)
    assert found.rank.tolist() == (1 + (expected > own[:, None]).sum(-1)).tolist()
    assert found.top_ids.tolist() == np.argsort(-logits, axis=-1, kind="stable")[:, :k].tolist()
    np.testing.assert_allclose(
        found.top_logprobs, np.take_along_axis(expected, np.asarray(found.top_ids), -1), atol=1e-5
    )
    whole = prompt_logprobs_jit(hidden, head, np.arange(T), targets, k, 1000)
    for a, b in zip(found, whole):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_head_is_computed_for_what_is_asked_for():
    hidden, head, targets = prompt()
    rows = []

    def counted(x):
        jax.debug.callback(lambda count: rows.append(int(count)), len(x))
        return head(x)

    places, asked = np.full(T, -1, np.int32), [40, 3, 4, 17, 0]
    places[:5] = asked
    found = prompt_logprobs(jnp.asarray(hidden), counted, places, np.roll(targets, 7), 5, CHUNK)
    jax.effects_barrier()
    assert rows == [CHUNK]
    everything = prompt_logprobs_jit(hidden[asked], head, np.arange(5), np.roll(targets, 7)[:5], 5, CHUNK)
    for a, b in zip(found, everything):
        np.testing.assert_allclose(a[:5], b, atol=1e-5)


def test_the_best_are_searched_for_only_where_they_are_asked_for():
    hidden, head, targets = prompt()
    found, without = (
        jax.tree.map(np.asarray, prompt_logprobs(jnp.asarray(hidden), head, np.arange(T), targets, 5, CHUNK, any_best))
        for any_best in (np.True_, np.False_)
    )
    assert (without.logprob.tolist(), without.rank.tolist()) == (found.logprob.tolist(), found.rank.tolist())
    assert found.top_ids.any() and not without.top_ids.any()


def test_prompt_log_probabilities_of_the_whole_vocabulary():
    hidden, head, targets = prompt()
    whole = np.asarray(jax.jit(prompt_vocab_logprobs, static_argnums=1)(hidden[:CHUNK], head))
    found = prompt_logprobs_jit(hidden[:CHUNK], head, np.arange(CHUNK), targets[:CHUNK], 5, CHUNK)
    assert whole.dtype == np.float32
    assert whole[np.arange(CHUNK), targets[:CHUNK]].tolist() == found.logprob.tolist()
    assert np.take_along_axis(whole, np.asarray(found.top_ids), -1).tolist() == found.top_logprobs.tolist()


def shapes(function, *args):
    return {v.aval.shape for e in equations(jax.make_jaxpr(function)(*args).jaxpr) for v in e.outvars}


def test_prompt_logits_exist_by_the_chunk_only():
    hidden, head, targets = prompt()
    chunked = shapes(lambda h, t: prompt_logprobs(h, head, np.arange(T), t, 5, CHUNK), hidden, targets)
    assert (CHUNK, V) in chunked  # the walk does see what is inside
    assert max(math.prod(shape[:-1]) for shape in chunked if shape[-1:] == (V,)) == CHUNK
    assert (T, V) in shapes(lambda h, t: prompt_logprobs(h, head, np.arange(T), t, 5, T), hidden, targets)
