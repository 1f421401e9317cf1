from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxengine import sampling
from jaxengine.sampling import (
    SamplingFields,
    count_row,
    count_tokens,
    gumbel,
    prompt_logprobs,
    prompt_vocab_logprobs,
    sample,
)

V, R, B = 37, 4, 3  # a vocabulary that does not fill its last word of the mask
WORDS = -(-V // 32)
draw = jax.jit(sample, static_argnames=("mode", "num_logprobs", "logprobs_mode", "whole_vocab"))
# Each new combination of shapes and static arguments compiles for a second: tests share these.
raw = partial(draw, mode="everything", num_logprobs=5, logprobs_mode="raw", whole_vocab=True)
processed = partial(draw, mode="everything", num_logprobs=5, logprobs_mode="processed", whole_vocab=True)
DRAWS = {"greedy": partial(draw, mode="greedy"), "sampled": partial(draw, mode="sampled"), "everything": raw}


def make_fields(rows=R, vocab=V, **changes):
    """Fields of `rows` rows that ask for nothing, but for `changes`: arrays, or one value for all rows."""
    columns = {
        "temperature": (np.float32, 1), "top_k": (np.int32, 0), "top_p": (np.float32, 1), "min_p": (np.float32, 0),
        "presence": (np.float32, 0), "frequency": (np.float32, 0), "repetition": (np.float32, 1),
        "sample_index": (np.int32, 0),
    }  # fmt: skip
    fields = {
        name: np.full(rows, changes.pop(name, default), dtype)
        if np.ndim(changes.get(name)) == 0
        else np.asarray(changes.pop(name), dtype)
        for name, (dtype, default) in columns.items()
    }
    neutral = {
        "position": np.arange(rows, dtype=np.int32),
        "seed": np.tile(np.array([[7, 9]], np.uint32), (rows, 1)),
        "counts": np.zeros((rows, vocab), np.int16),
        "mask": np.full((rows, -(-vocab // 32)), 0xFFFFFFFF, np.uint32),
        "bias_ids": np.full((rows, B), -1, np.int32),
        "bias_values": np.zeros((rows, B), np.float32),
    }
    return SamplingFields(**fields, **{**neutral, **changes})


def take_rows(fields, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], fields)


def random_logits(rows=R, vocab=V, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


# -- the same, in NumPy and by sorting


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kept(logits, top_k, top_p, min_p):
    """Which tokens one row may draw: bool [V], and how close the last cut was to falling elsewhere."""
    probability = np.exp(log_softmax(logits))
    keep = probability >= min_p * probability.max() * (1 - 1e-9)
    if top_k > 0:
        keep &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    if top_p >= 1:
        return keep, 1.0
    probability = np.where(keep, probability, 0) / probability[keep].sum()
    ascending = np.sort(probability)
    below = np.cumsum(ascending)  # vLLM drops those whose cumulated probability is at most 1 - top_p
    first = min(np.searchsorted(below, 1 - top_p, side="right"), len(below) - 1)
    return keep & (probability >= ascending[first]), np.abs(below - (1 - top_p)).min()


def edit(logits, prompt, output, allowed, bias, presence, frequency, repetition):
    logits = np.asarray(logits, np.float64).copy()
    logits[[t for t in range(len(logits)) if t not in allowed]] = -np.inf
    for token, value in bias.items():
        logits[token] += value
    for token in set(prompt) | set(output):
        logits[token] *= repetition if logits[token] <= 0 else 1 / repetition
    for token, times in Counter(output).items():
        logits[token] -= frequency * times + presence
    return logits


# -- what may be drawn

coarse = st.integers(-12, 12).map(lambda i: i / 4)  # many ties, and differences that are exact
params = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.5, 1.0, 2.0]),
    "top_k": st.sampled_from([-1, 0, 1, 2, 5, 20, V, 1000]),
    "top_p": st.sampled_from([1e-6, 0.1, 0.33, 0.5, 0.77, 0.9, 0.999, 1.0]),
    "min_p": st.sampled_from([0.0, 0.01, 0.07, 0.3, 0.6, 1.0]),
})  # fmt: skip


@given(
    st.lists(st.lists(coarse, min_size=V, max_size=V), min_size=R, max_size=R), st.lists(params, min_size=R, max_size=R)
)
def test_truncation_equals_sorting(logits, rows):
    logits = np.array(logits, np.float32)
    fields = make_fields(**{name: [row[name] for row in rows] for name in rows[0]})
    drawn = processed(logits, fields)
    for i, row in enumerate(rows):
        scaled = logits[i] / row["temperature"]
        keep, margin = kept(scaled, row["top_k"], row["top_p"], row["min_p"])
        assume(margin > 1e-5)
        expected = log_softmax(np.where(keep, scaled, -np.inf))
        got = np.asarray(drawn.vocab_logprobs[i])
        assert ((got > -np.inf) == keep).all()
        np.testing.assert_allclose(got[keep], expected[keep], atol=1e-5)
        token = int(drawn.tokens[i])
        assert keep[token] and drawn.logprob[i] == got[token] and drawn.rank[i] == 1 + (got > got[token]).sum()
        order = np.argsort(-scaled, kind="stable")[:5]
        assert drawn.top_logprobs[i].tolist() == got[drawn.top_ids[i]].tolist()
        assert drawn.top_ids[i].tolist()[: keep.sum()] == order.tolist()[: keep.sum()]


def test_top_k_of_arbitrary_floats():
    logits = random_logits(scale=5)
    got = np.asarray(processed(logits, make_fields(top_k=[1, 2, 7, 36])).vocab_logprobs)
    assert (got > -np.inf).sum(-1).tolist() == [1, 2, 7, 36]
    logits[0, :] = np.float32(1.0)
    logits[0, 5] = np.nextafter(np.float32(1), np.float32(2))  # the next float is told apart
    got = np.asarray(processed(logits, make_fields(top_k=1)).vocab_logprobs)
    assert (got > -np.inf).sum(-1).tolist() == [1, 1, 1, 1] and got[0, 5] == 0


def test_draws_follow_the_distribution():
    draws = 512 * R
    logits = random_logits(1, scale=1.5)
    fields = make_fields(top_k=[0, 6, 0, 6], top_p=[1, 1, 0.7, 0.9], temperature=[1, 0.7, 1.5, 1])
    fields = take_rows(fields, np.repeat(np.arange(R), draws))
    fields = replace(fields, position=np.tile(np.arange(draws, dtype=np.int32), R))
    tokens = np.asarray(draw(np.tile(logits, (R * draws, 1)), fields, mode="sampled").tokens).reshape(R, draws)
    for i in range(R):
        row = take_rows(fields, i * draws)
        scaled = logits[0].astype(np.float64) / row.temperature
        keep, _ = kept(scaled, row.top_k, row.top_p, 0)
        probability = np.exp(log_softmax(np.where(keep, scaled, -np.inf)))
        found = np.bincount(tokens[i], minlength=V) / draws
        assert (found[~keep] == 0).all()
        assert (np.abs(found - probability) <= 5 * np.sqrt(probability / draws)).all()


def test_temperature_zero_takes_the_largest_logit_and_the_lowest_id():
    logits = np.round(random_logits())
    expected = np.argmax(logits, axis=-1).tolist()
    assert np.sum(logits == logits.max(-1, keepdims=True)) > R  # there are ties
    fields = make_fields(temperature=0, top_k=3, top_p=0.5)
    assert all(DRAWS[mode](logits, fields).tokens.tolist() == expected for mode in DRAWS)
    mixed = replace(fields, temperature=np.array([1, 0, 1, 0], np.float32))
    assert all(DRAWS[mode](logits, mixed).tokens.tolist()[1::2] == expected[1::2] for mode in ("sampled", "everything"))


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e6, 3e38])
def test_extreme_temperatures(temperature):
    logits = random_logits()
    logits[:, 30:] = -np.inf
    drawn = processed(logits, make_fields(temperature=temperature, top_p=0.9))
    assert not np.isnan(np.asarray(drawn.vocab_logprobs)).any() and (np.asarray(drawn.tokens) < 30).all()
    if temperature < 1:
        assert drawn.tokens.tolist() == logits.argmax(-1).tolist()


def test_a_row_with_nothing_allowed_is_no_nan():
    logits = np.full((R, V), -np.inf, np.float32)
    drawn = processed(logits, make_fields(temperature=[0, 1, 1, 1], top_p=[1, 1, 0.5, 1], top_k=[0, 0, 0, 4]))
    assert ((0 <= np.asarray(drawn.tokens)) & (np.asarray(drawn.tokens) < V)).all()
    assert (np.asarray(drawn.vocab_logprobs) == -np.inf).all() and (np.asarray(drawn.logprob) == -np.inf).all()
    broken = draw(np.full((R, V), np.nan, np.float32), make_fields(), mode="greedy").tokens
    assert (np.asarray(broken) < V).all()


# -- independence


def mixed_fields(rows=R):
    return make_fields(
        rows, temperature=np.resize([1, 0, 0.7, 2], rows), top_k=np.resize([0, 5, 9, 0], rows),
        top_p=np.resize([1, 0.5, 0.8, 0.9], rows), min_p=np.resize([0, 0, 0.05, 0], rows),
        seed=np.random.default_rng(3).integers(0, 2**32, (rows, 2), dtype=np.uint32),
        sample_index=np.resize([0, 0, 1], rows), position=np.arange(rows, dtype=np.int32) * 7,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["sampled", "everything"])
def test_a_row_does_not_depend_on_its_neighbours(mode):
    rows = 32
    logits, fields = random_logits(rows), mixed_fields(rows)
    tokens = np.asarray(draw(logits, fields, mode="sampled").tokens)
    assert len(set(tokens.tolist())) > 10
    for size in (1, R):  # other batches, other places in them, with and without neighbours that want a search
        for start in range(0, rows, size):
            part = slice(start, start + size)
            assert DRAWS[mode](logits[part], take_rows(fields, part)).tokens.tolist() == tokens[part].tolist()
    order = np.random.default_rng(0).permutation(rows)
    assert DRAWS[mode](logits[order], take_rows(fields, order)).tokens.tolist() == tokens[order].tolist()


def test_log_probabilities_do_not_depend_on_neighbours():
    logits, fields = random_logits(), mixed_fields()
    order = np.array([2, 0, 3, 1])
    one, two = processed(logits, fields), processed(logits[order], take_rows(fields, order))
    for a, b in zip(one, two):
        assert np.asarray(a)[order].tolist() == np.asarray(b).tolist()


def test_padding_the_vocabulary_changes_no_token():
    logits, fields = random_logits(), mixed_fields()
    padded = np.pad(logits, ((0, 0), (0, 27)), constant_values=-np.inf)
    assert draw(padded, fields, mode="sampled").tokens.tolist() == draw(logits, fields, mode="sampled").tokens.tolist()


def test_narrow_logits_are_taken_to_float32():
    narrow = jnp.asarray(random_logits(), jnp.bfloat16)
    for a, b in zip(processed(narrow, mixed_fields()), processed(narrow.astype(jnp.float32), mixed_fields())):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()


# -- noise

noise = jax.jit(gumbel, static_argnums=(1, 2))


def test_noise_is_that_of_jax_random():
    fields = mixed_fields()
    for i in range(R):
        key = jax.random.wrap_key_data(fields.seed[i], impl="threefry2x32")
        for word in (fields.sample_index[i], fields.position[i], 1):
            key = jax.random.fold_in(key, word)
        bits = jax.vmap(lambda token, key=key: jax.random.key_data(jax.random.fold_in(key, token))[0])(jnp.arange(V))
        uniform = np.minimum((np.asarray(bits, np.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
        np.testing.assert_allclose(noise(fields, V, 1)[i], -np.log(-np.log1p(-uniform)), rtol=1e-5, atol=1e-5)


def test_noise_depends_on_each_of_its_sources_alone():
    fields = make_fields()
    fields = replace(fields, position=np.full(R, 3, np.int32))
    assert (np.ptp(noise(fields, V, 0), axis=0) == 0).all()  # the same in every row
    changed = replace(fields, position=np.array([3, 4, 3, 3], np.int32), sample_index=np.array([0, 0, 1, 0], np.int32),
                      seed=fields.seed + np.array([[0, 0], [0, 0], [0, 0], [0, 1]], np.uint32))  # fmt: skip
    streams = [*np.asarray(noise(changed, V, 0)), np.asarray(noise(fields, V, 1))[0]]
    assert len({stream.tobytes() for stream in streams}) == 5
    assert np.asarray(noise(fields, 64, 0))[:, :V].tobytes() == np.asarray(noise(fields, V, 0)).tobytes()


def test_noise_is_gumbel():
    drawn = np.asarray(noise(make_fields(), 50_000, 0), np.float64).ravel()
    assert np.isfinite(drawn).all()
    assert abs(drawn.mean() - np.euler_gamma) < 0.015 and abs(drawn.var() - np.pi**2 / 6) < 0.03


# -- mask, bias, penalties

edit_logits = jax.jit(sampling.edit_logits)
tokens_of_vocab = st.integers(0, V - 1)
edits = st.fixed_dictionaries({
    "prompt": st.lists(tokens_of_vocab, max_size=12),
    "output": st.lists(tokens_of_vocab, max_size=12),
    "allowed": st.sets(tokens_of_vocab, min_size=1),
    "bias": st.dictionaries(tokens_of_vocab, st.sampled_from([-100.0, -1.5, 0.25, 3.0, -np.inf]), max_size=B),
    "presence": st.sampled_from([0.0, -1.0, 0.5, 2.0]),
    "frequency": st.sampled_from([0.0, -0.5, 0.25, 2.0]),
    "repetition": st.sampled_from([1.0, 0.5, 1.3, 2.0]),
})  # fmt: skip


def counts_of(prompt, output):
    tokens = np.zeros(24, np.int32)
    tokens[: len(prompt) + len(output)] = [*prompt, *output]
    return count(tokens, len(prompt), len(prompt) + len(output), V)


count = jax.jit(count_row, static_argnums=3)


def mask_of(allowed):
    bits = np.zeros(WORDS * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


def edit_fields(rows):
    bias_ids = np.full((len(rows), B), -1, np.int32)
    bias_values = np.zeros((len(rows), B), np.float32)
    for i, row in enumerate(rows):
        bias_ids[i, : len(row["bias"])] = list(row["bias"])
        bias_values[i, : len(row["bias"])] = list(row["bias"].values())
    return make_fields(
        counts=np.stack([counts_of(row["prompt"], row["output"]) for row in rows]),
        mask=np.stack([mask_of(row["allowed"]) for row in rows]),
        bias_ids=bias_ids, bias_values=bias_values,
        **{name: [row[name] for row in rows] for name in ("presence", "frequency", "repetition")},
    )  # fmt: skip


@given(st.lists(edits, min_size=R, max_size=R), st.integers(0, 99))
def test_edits_equal_numpys(rows, seed):
    logits = random_logits(seed=seed)
    got = np.asarray(edit_logits(logits, edit_fields(rows)))
    for i, row in enumerate(rows):
        expected = edit(logits[i], **row)
        banned = expected == -np.inf
        assert ((got[i] == -np.inf) == banned).all()
        np.testing.assert_allclose(got[i][~banned], expected[~banned], rtol=1e-5, atol=1e-5)


def test_neutral_edits_change_no_bit():
    logits = random_logits()
    fields = replace(make_fields(), counts=np.stack([counts_of([1, 2], [2, 3])] * R))
    assert np.asarray(edit_logits(logits, fields)).tobytes() == logits.tobytes()


def test_only_allowed_tokens_are_drawn():
    allowed = {3, 31, 32, 36}
    fields = replace(make_fields(32, temperature=50), mask=np.tile(mask_of(allowed), (32, 1)))
    assert set(raw(random_logits(32), fields).tokens.tolist()) == allowed


def test_edits_reach_the_token_and_the_processed_log_probabilities_only():
    logits = random_logits()
    logits[:, 5] = 20
    fields = replace(make_fields(temperature=0), mask=np.stack([mask_of(set(range(V)) - {5})] * R))
    before, after = raw(logits, fields), processed(logits, fields)
    expected = np.where(np.arange(V) == 5, -np.inf, logits)
    assert before.tokens.tolist() == after.tokens.tolist() == expected.argmax(-1).tolist()
    assert (np.asarray(before.top_ids)[:, 0] == 5).all()
    assert before.rank.tolist() == [2] * R and after.rank.tolist() == [1] * R
    np.testing.assert_allclose(after.logprob, log_softmax(expected).max(-1), atol=1e-5)


def test_counts():
    prompt, output = [1, 1, 4], [4, 6, 6, 6]
    row = np.asarray(counts_of(prompt, output))
    assert row.dtype == np.int16
    assert {t for t in range(V) if row[t] < 0} == set(prompt)
    assert {t: n for t in range(V) if (n := int(row[t]) & 0x7FFF)} == Counter(output)
    slots = np.stack([row, np.zeros(V, np.int16), counts_of([], [])])
    for token in (0, 6, 4):  # one at a time, as steps do it
        slots = jax.jit(count_tokens)(slots, np.array([0, 2]), np.array([token, 9]))
    assert np.asarray(slots[0]).tolist() == counts_of(prompt, [*output, 0, 6, 4]).tolist()
    assert np.asarray(slots[1]).tolist() == [0] * V and int(slots[2][9]) == 3


@pytest.mark.parametrize("prompt", [[], [2]])
def test_counts_do_not_overflow(prompt):
    full = np.asarray(count(np.array([*prompt] + [2] * 40_000), len(prompt), len(prompt) + 40_000, V))
    again = np.asarray(jax.jit(count_tokens)(full[None], np.array([0]), np.array([2])))[0]
    assert again.tolist() == full.tolist() and full[2] & 0x7FFF == 0x7FFF and (full[2] < 0) == bool(prompt)


# -- log-probabilities


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


prompt_logprobs_jit = jax.jit(prompt_logprobs, static_argnums=(1, 3, 4))


def prompt():
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(E, V)).astype(np.float32)
    head = partial(jnp.dot, b=kernel, precision=jax.lax.Precision.HIGHEST)
    return rng.normal(size=(T, E)).astype(np.float32), head, rng.integers(0, V, T).astype(np.int32)


@pytest.mark.parametrize("k", [0, 5])
def test_prompt_log_probabilities(k):
    hidden, head, targets = prompt()
    found = prompt_logprobs_jit(hidden, head, targets, k, CHUNK)
    logits = np.asarray(head(hidden))
    expected = log_softmax(logits)
    own = expected[np.arange(T), targets]
    np.testing.assert_allclose(found.logprob, own, atol=1e-5)
    assert found.rank.tolist() == (1 + (expected > own[:, None]).sum(-1)).tolist()
    assert found.top_ids.tolist() == np.argsort(-logits, axis=-1, kind="stable")[:, :k].tolist()
    np.testing.assert_allclose(
        found.top_logprobs, np.take_along_axis(expected, np.asarray(found.top_ids), -1), atol=1e-5
    )
    whole = prompt_logprobs_jit(hidden, head, targets, k, 1000)
    for a, b in zip(found, whole):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_prompt_log_probabilities_of_the_whole_vocabulary():
    hidden, head, targets = prompt()
    whole = np.asarray(jax.jit(prompt_vocab_logprobs, static_argnums=1)(hidden[:CHUNK], head))
    found = prompt_logprobs_jit(hidden[:CHUNK], head, targets[:CHUNK], 5, CHUNK)
    assert whole.dtype == np.float32
    assert whole[np.arange(CHUNK), targets[:CHUNK]].tolist() == found.logprob.tolist()
    assert np.take_along_axis(whole, np.asarray(found.top_ids), -1).tolist() == found.top_logprobs.tolist()


def equations(jaxpr):
    """Every equation, those of inner functions too, with the values they compute."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes(function, *args):
    return {v.aval.shape for e in equations(jax.make_jaxpr(function)(*args).jaxpr) for v in e.outvars}


def test_prompt_logits_exist_by_the_chunk_only():
    hidden, head, targets = prompt()
    chunked = shapes(lambda h, t: prompt_logprobs(h, head, t, 5, CHUNK), hidden, targets)
    assert (CHUNK, V) in chunked  # the walk does see what is inside
    assert (
        max(shape[-2] * shape[-3] if len(shape) > 2 else shape[0] for shape in chunked if shape[-1:] == (V,)) == CHUNK
    )
    assert (T, V) in shapes(lambda h, t: prompt_logprobs(h, head, t, 5, T), hidden, targets)


# -- what is paid


def primitives(mode, **fields):
    jaxpr = jax.make_jaxpr(partial(sample, mode=mode))(random_logits(), make_fields(**fields)).jaxpr
    return {equation.primitive.name for equation in equations(jaxpr)}


def test_greedy_pays_for_no_sort_and_no_noise():
    assert not primitives("greedy") & {"sort", "top_k", "log", "log1p", "exp", "while", "scan", "cond", "scatter-add"}
    assert "log1p" in primitives("sampled") and not primitives("sampled") & {"sort", "top_k"}


def test_with_64_bit_types_on():
    with jax.enable_x64(True):
        drawn = raw(random_logits(), mixed_fields())
    assert drawn.tokens.dtype == np.int32 and drawn.logprob.dtype == np.float32 and drawn.rank.dtype == np.int32
    assert drawn.tokens.tolist() == raw(random_logits(), mixed_fields()).tokens.tolist()
