"""Scores against a dense forward of the model: whatever is cached, grouped, cut or truncated."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine import RequestError, SamplingParams
from jaxengine.scoring import by_context, encode_pairs, rolling_windows, score_pairs
from tests.tiny_llm import MAX_LENGTH, VOCAB, check_integrity, fresh_llm, reference_logprobs, shared_llm

KINDS = pytest.mark.parametrize("kind", ["llama", "windows"])
CONTEXT = [11 * i % 590 + 3 for i in range(75)]
ENDINGS = [[5, 6, 7], [5, 9], [400, 401, 402, 403], [8]]
TEXTS = [("def f(x):", " return x"), ("def f(x):", " pass"), ("import os  ", "x"), ("", "class A:"), ("a b ", " c")]


def want_logprobs(kind, context, continuation):
    rows = reference_logprobs(kind, [*context, *continuation[:-1]])[len(context) - 1 :]
    return rows[range(len(continuation)), continuation], rows.argmax(axis=1) == continuation


def assert_scores(kind, pairs, scores):
    for (context, continuation), score in zip(pairs, scores, strict=True):
        logprobs, greedy = want_logprobs(kind, context, continuation)
        assert score.token_ids.tolist() == list(continuation)
        np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-4)
        assert score.logprob == pytest.approx(logprobs.sum(), abs=1e-4 * len(logprobs))
        assert score.greedy.tolist() == greedy.tolist() and score.is_greedy == greedy.all()


class Computed:
    """Counts the tokens that the engine's steps compute."""

    def __init__(self, llm):
        self.count, scheduler = 0, llm._loop._engine.scheduler
        schedule = scheduler.schedule

        def counted():
            rows = schedule()
            self.count += int(rows.count.sum())
            return rows

        scheduler.schedule = counted


@KINDS
@pytest.mark.parametrize("cached", [True, False])
def test_pairs_equal_a_dense_forward(kind, cached):
    pairs = [(CONTEXT, ending) for ending in ENDINGS] + [([9], [7, 8]), (CONTEXT[:20], CONTEXT[20:60])]
    with fresh_llm(kind, enable_prefix_caching=cached) as llm:
        computed = Computed(llm)
        scores = llm.score(pairs, use_tqdm=False)
        assert_scores(kind, pairs, scores)
        whole = sum(len(a) + len(b) - 1 for a, b in pairs)
        assert computed.count == sum(score.num_computed_tokens for score in scores)
        assert computed.count <= whole - 3 * 72 if cached else computed.count == whole
        assert llm.loglikelihood(pairs[:2], use_tqdm=False) == [
            (pytest.approx(score.logprob, abs=1e-4), score.is_greedy) for score in scores[:2]
        ]
        check_integrity(llm)
        assert llm.get_metrics()["generation_tokens"] == 0


@KINDS
def test_what_the_model_would_say_is_greedy(kind):
    llm = shared_llm(kind)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    [output] = llm.generate([CONTEXT], params, use_tqdm=False)
    said = output.outputs[0].token_ids
    other = [*said[:5], said[5] ^ 1]
    scores = llm.score([(CONTEXT, said), (CONTEXT, other)], use_tqdm=False)
    assert [score.is_greedy for score in scores] == [True, False]
    assert scores[1].greedy.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("page_size, again", [(16, 8), (1, 1)])
def test_four_endings_cost_little_more_than_their_context(page_size, again):
    """1,000 tokens of context, in pages of 16 and of one token; `again`: those that the last page does not hold."""
    from jaxengine import LLM
    from tests.tiny_llm import OPTIONS, model_folder

    context = np.random.default_rng(0).integers(3, VOCAB, 1000).tolist()
    endings = [np.random.default_rng(i).integers(3, VOCAB, 12).tolist() for i in range(4)]
    options = OPTIONS | {"page_size": page_size, "max_num_batched_tokens": 512}
    with LLM(model_folder(), **options, hf_overrides={"max_position_embeddings": 2048}) as llm:
        computed = Computed(llm)
        scores = llm.score([(context, ending) for ending in endings], use_tqdm=False)
    assert [score.num_context_tokens for score in scores] == [1000] * 4
    # No pair's last token is computed; the context's last one is by each, as it tells of the ending's first.
    assert computed.count == (1000 + 11) + 3 * (again + 11) <= 1068 < 1.3 * 1000
    assert computed.count == sum(score.num_computed_tokens for score in scores)


@KINDS
def test_sums_depend_on_neither_order_nor_company(kind):
    llm = shared_llm(kind)
    alone = {}
    rng = np.random.default_rng(0)
    pool = [(CONTEXT[:n], rng.integers(3, VOCAB, m).tolist()) for n in (1, 8, 33, 75) for m in (1, 3, 9)]

    @settings(max_examples=15)
    @given(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=12), st.booleans())
    def check(chosen, reset):
        if reset:
            llm.reset_prefix_cache()
        for i in chosen:
            if i not in alone:
                [alone[i]] = llm.score([pool[i]], use_tqdm=False)
        scores = llm.score([pool[i] for i in chosen], use_tqdm=False)
        for i, score in zip(chosen, scores, strict=True):
            np.testing.assert_allclose(score.logprobs, alone[i].logprobs, atol=1e-4)
            assert score.token_ids.tolist() == pool[i][1]

    check()


def test_preempted_scores_are_the_same():
    pairs = [([i + 3, *CONTEXT[:60]], CONTEXT[60:70]) for i in range(8)]
    with fresh_llm(pages=12) as llm:
        long = llm.generate(
            [[7] * 20], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), priority=-9, stream=True
        )
        next(long)
        scores = llm.score(pairs, use_tqdm=False)
        assert len(list(long)[-1].outputs[0].token_ids) == 60
        assert llm.get_metrics()["num_preemptions"] > 0
        check_integrity(llm)
    assert_scores("llama", pairs, scores)


# -- boundaries


def test_boundaries_are_those_of_lm_evaluation_harness():
    llm, encode = shared_llm(), shared_llm().encode
    bos = llm.prefix_token()
    pairs = encode_pairs(TEXTS, encode, llm.prefix_token, True)
    for (context, continuation), (context_ids, ids) in zip(TEXTS, pairs, strict=True):
        if context == "":
            assert (context_ids, ids) == ([bos], encode(continuation, False))
        else:
            kept = context.rstrip()
            assert context_ids == encode(kept)
            assert ids == encode(context + continuation)[len(context_ids) :]
    assert "x" in llm.get_tokenizer().decode(pairs[2][1]) and llm.get_tokenizer().decode(pairs[2][1])[0] == " "
    assert_scores("llama", pairs, llm.score(TEXTS, use_tqdm=False))
    assert encode_pairs([([], [7])], encode, llm.prefix_token, True) == [([bos], [7])]
    assert encode_pairs([([], [bos, 7])], encode, llm.prefix_token, True) == [([bos], [7])]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("ab", r"a pair is \(context, continuation\), not 'ab'"),
        (("a", "b", "c"), "a pair is"),
        (("a", [5]), "must both be texts or both token ids"),
        (("a", ""), "has no tokens"),
        (([5], []), "has no tokens"),
        (([5], [VOCAB]), "token id 600 is out of range"),
        (([5] * 251, [6] * 7), "a context of 251 and a continuation of 7 tokens exceed max_model_len=256 and a last"),
    ],
)
def test_bad_pairs(pair, message):
    with pytest.raises(RequestError, match=message):
        shared_llm().score([("a", " b"), pair], use_tqdm=False)


def test_long_contexts_lose_their_beginning_when_asked():
    llm, context = shared_llm(), [3 + i % 500 for i in range(300)]
    [score] = llm.score([(context, [6] * 7)], truncate=True, use_tqdm=False)
    assert (score.num_truncated_tokens, score.num_context_tokens) == (50, 250)
    assert_scores("llama", [(context[50:], [6] * 7)], [score])
    with pytest.raises(RequestError, match="a continuation of 257 tokens"):
        llm.score([([5], [6] * 257)], truncate=True, use_tqdm=False)
    [full] = llm.score([([5], [6] * 256)], use_tqdm=False)  # all of max_model_len, and a target
    assert len(full.logprobs) == MAX_LENGTH == full.num_computed_tokens


def test_no_pairs():
    assert shared_llm().score([]) == [] == shared_llm().score_rolling([])


# -- order


def test_pairs_of_one_context_stand_together_longest_first():
    pairs = [([1], [2]), ([3, 4, 5], [6]), ([1], [2, 3]), ([9, 9], [1]), ([3, 4, 5], [7, 8])]
    assert by_context(pairs) == [4, 1, 2, 0, 3]


def test_a_failed_request_raises():
    class Failed:
        error = RuntimeError("the device failed")

    with pytest.raises(RuntimeError, match="the device failed"):
        score_pairs(lambda *_, **__: [Failed()], [([1], [2])], max_model_len=9, truncate=False, use_tqdm=False)


# -- rolling


@given(st.integers(0, 60), st.integers(1, 16))
def test_rolling_windows_are_those_of_lm_evaluation_harness(length, size):
    """Its `get_rolling_token_windows(max_seq_len=size, context_len=1)`, made disjoint: written out."""
    tokens = list(range(100, 100 + length))
    windows = list(rolling_windows(tokens, -1, size))
    want, predicted = [], 0
    while predicted < length:
        if predicted == 0:
            count = min(size, length)
            whole, target = [-1, *tokens[: count - 1]], tokens[:count]
        else:
            count = min(length - predicted, size)
            end = predicted + count
            whole, target = tokens[end - size - 1 : end - 1], tokens[end - count : end]
        want.append((whole[: len(whole) - (len(target) - 1)], target))
        predicted += count
    assert windows == want
    assert [t for _, target in windows for t in target] == tokens
    assert all(len(a) + len(b) <= size + 1 and len(a) >= 1 for a, b in windows)


@KINDS
def test_rolling_scores(kind):
    llm, bos = shared_llm(kind), shared_llm(kind).prefix_token()
    long = np.random.default_rng(1).integers(3, VOCAB, 400).tolist()
    scores = llm.score_rolling([long, "def f():\n    return 1", []], use_tqdm=False)
    first, second = want_logprobs(kind, [bos], long[:256])[0], want_logprobs(kind, long[143:256], long[256:])[0]
    np.testing.assert_allclose(scores[0].logprobs, np.concatenate([first, second]), atol=1e-4)
    assert scores[0].token_ids.tolist() == long and scores[0].num_context_tokens == 1 + 113
    short = llm.encode("def f():\n    return 1", False)
    np.testing.assert_allclose(scores[1].logprobs, want_logprobs(kind, [bos], short)[0], atol=1e-4)
    assert (scores[2].logprob, len(scores[2].logprobs)) == (0.0, 0)
    sums = llm.loglikelihood_rolling([long], use_tqdm=False)
    assert sums == [pytest.approx(scores[0].logprob, abs=0.01)]
