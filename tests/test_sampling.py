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
from jaxengine.sampling import count_row, count_tokens, gumbel, sample
from tests.sampling_cases import (
    DRAWS,
    WORDS,
    B,
    R,
    V,
    draw,
    equations,
    log_softmax,
    make_fields,
    processed,
    random_logits,
    raw,
    take_rows,
)

# -- the same, in NumPy and by sorting


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


@pytest.mark.parametrize("parts", [2, 8])  # as on a CPU, as on a GPU
def test_the_smallest_number_that_holds(parts):
    limits = np.array([0, 1e-30, 1, np.nextafter(np.float32(1), 2), 17.3, 3.4e38, np.inf, np.nan], np.float32)
    found = jax.jit(partial(sampling._narrow, lambda t: t >= limits, len(limits), parts))()
    assert found.tolist() == [*limits[:-1].tolist(), np.inf], "of NaN none holds"


def test_several_thresholds_a_pass_draw_the_same(monkeypatch):
    """As a GPU searches."""
    logits, fields = random_logits(32), mixed_fields(32)
    expected = draw(logits, fields, mode="sampled").tokens.tolist()
    searched: list = []
    monkeypatch.setattr(sampling, "_smallest", lambda *a: searched.append(a) or sampling._narrow(*a, 8))
    assert jax.jit(partial(sample, mode="sampled"))(logits, fields).tokens.tolist() == expected and len(searched) == 2


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
