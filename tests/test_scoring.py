"""Log-likelihoods: how texts are cut, windows, and what LLM gives against the model's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine import LLM, RequestError, SamplingParams
from jaxengine.scoring import Pair, encode_pair, rolling_pairs, truncate
from tests.tiny_llm import fresh_llm, reference_logprobs, shared_llm

CONTEXT = [11 * i % 590 + 3 for i in range(45)]  # two chunks
ENDINGS = [[7, 8, 9], [7, 8], [100, 200, 300, 400], [5]]


def letters(text):
    """A token for each pair of letters, so that tokens can span the cut between context and continuation."""
    return [hash(text[i : i + 2]) for i in range(0, len(text), 2)]


def test_texts_are_cut_as_the_harness_cuts():
    assert encode_pair(letters, "abcd", "efg") == (letters("abcd"), letters("efg"))
    assert encode_pair(letters, "abc", "def") == (letters("abc"), letters("abcdef")[2:])
    assert encode_pair(letters, "ab  ", "cd") == (letters("ab"), letters("  cd"))
    assert encode_pair(letters, "  ", "cd") == ([], letters("  cd"))
    assert encode_pair(letters, "", "cd") == ([], letters("cd"))


def test_the_beginning_of_a_long_context_is_left_out():
    assert truncate(Pair([1, 2, 3], [4, 5]), 5) == ([1, 2, 3], [4, 5])
    assert truncate(Pair([1, 2, 3], [4, 5]), 3) == ([3], [4, 5])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(2, 17))
def test_windows_hold_each_token_once_with_what_came_before(tokens, longest):
    pairs, start = list(rolling_pairs(tokens, 0, longest)), 0
    for i, (context, continuation) in enumerate(pairs):
        end = start + len(continuation)
        assert continuation == tokens[start:end] and len(context) + len(continuation) <= longest
        assert context == ([0] if i == 0 else tokens[max(0, end - longest) : start]) and context
        start = end
    assert start == len(tokens) and len(pairs) == -(-len(tokens) // (longest - 1))


def expected(kind, context, continuation):
    own = reference_logprobs(kind, [*context, *continuation])[len(context) - 1 : -1]
    return own[range(len(continuation)), continuation], bool((own.argmax(axis=1) == continuation).all())


@pytest.mark.parametrize("kind", ["llama", "windows"])
def test_it_is_the_models_own(kind):
    best = int(reference_logprobs(kind, CONTEXT)[-1].argmax())
    pairs = [(CONTEXT, ending) for ending in [*ENDINGS, [best]]] + [([3], CONTEXT)]
    found = shared_llm(kind).loglikelihood(pairs, use_tqdm=False)
    for (context, continuation), result in zip(pairs, found, strict=True):
        logprobs, greedy = expected(kind, context, continuation)
        assert result.token_ids.tolist() == continuation and result.is_greedy == greedy
        np.testing.assert_allclose(result.token_logprobs, logprobs, rtol=1e-4, atol=1e-4)
        assert result.logprob == pytest.approx(float(result.token_logprobs.sum()), abs=1e-4)
    assert [result.is_greedy for result in found] == [False] * 4 + [True, False]


def test_order_company_and_cache_change_nothing():
    pairs = [(CONTEXT, ending) for ending in ENDINGS] + [(CONTEXT[:20], [9, 9]), ([4], [6])]
    found = shared_llm().loglikelihood(pairs, use_tqdm=False)
    with fresh_llm(enable_prefix_caching=False) as llm:
        uncached = llm.loglikelihood(pairs[::-1], use_tqdm=False)[::-1]
        alone = [llm.loglikelihood([pair], use_tqdm=False)[0] for pair in pairs]
        assert llm.get_metrics()["prefix_cache_hits"] == 0
    for other in (uncached, alone):
        for a, b in zip(found, other, strict=True):
            assert a.is_greedy == b.is_greedy
            np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, rtol=1e-4, atol=1e-4)
    assert shared_llm().loglikelihood([], use_tqdm=False) == []


def test_a_shared_context_is_computed_once(shipped_model):
    """Four endings over a context of 1000 tokens: fewer than 1.1 times the context's tokens are computed."""
    with LLM(shipped_model, max_model_len=1024) as llm:
        context = (llm.encode("def parse(text):\n    return text.strip()\n\n") * 100)[:1000]
        llm.loglikelihood([(context, [7 + i] * 5) for i in range(4)], use_tqdm=False)
        metrics = llm.get_metrics()
    computed = metrics["prefix_cache_queries"] - metrics["prefix_cache_hits"]
    assert metrics["prefix_cache_queries"] == 4 * 1005 and 1020 <= computed < 1.1 * 1000


def test_texts_and_empty_contexts():
    llm = shared_llm()
    tokenizer = llm.get_tokenizer()
    first = llm.model_config.bos_token_id
    text, tokens, empty = llm.loglikelihood(
        [("hello ", "world"), (tokenizer.encode("hello", False), tokenizer.encode(" world", False)), ("", "world")],
        use_tqdm=False,
    )
    assert text.token_logprobs.tolist() == tokens.token_logprobs.tolist()
    [prefixed] = llm.loglikelihood([([first], tokenizer.encode("world", False))], use_tqdm=False)
    np.testing.assert_allclose(empty.token_logprobs, prefixed.token_logprobs, rtol=1e-4, atol=1e-4)


def test_rolling_is_the_sum_of_its_windows():
    llm = shared_llm()
    longest, first = llm.max_model_len - 1, llm.model_config.bos_token_id
    tokens = [7 * i % 590 + 3 for i in range(2 * longest + 5)]
    whole, short = llm.loglikelihood_rolling([tokens, tokens[:9]], use_tqdm=False)
    parts = llm.loglikelihood(list(rolling_pairs(tokens, first, longest)), use_tqdm=False)
    assert len(parts) == 3 and whole.token_ids.tolist() == tokens
    assert whole.logprob == pytest.approx(sum(part.logprob for part in parts), rel=1e-4)
    logprobs, _ = expected("llama", [first], tokens[:9])
    np.testing.assert_allclose(short.token_logprobs, logprobs, rtol=1e-4, atol=1e-4)


def test_long_contexts_lose_their_beginning():
    llm = shared_llm()
    longest = llm.max_model_len - 1
    context = [5 * i % 590 + 3 for i in range(longest + 30)]
    long, cut = llm.loglikelihood([(context, [8, 9]), (context[-longest + 2 :], [8, 9])], use_tqdm=False)
    np.testing.assert_allclose(long.token_logprobs, cut.token_logprobs, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_scored_is_said():
    llm = shared_llm()
    for pairs, complaint in (
        ([([1], [2]), ([1], [])], "pair 1: a continuation of 0 tokens"),
        ([([1], [2] * llm.max_model_len)], "can be scored; the engine's max_model_len decides"),
        ([("a", [2])], "two texts, or two lists of token ids"),
    ):
        with pytest.raises(RequestError, match=complaint):
            llm.loglikelihood(pairs, use_tqdm=False)
    with pytest.raises(RequestError, match="text 1 has no tokens"):
        llm.loglikelihood_rolling(["a", ""], use_tqdm=False)
    # The engine goes on.
    assert llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)[0].finished
