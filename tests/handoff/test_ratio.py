"""What an exact policy-gradient ratio needs: raw and processed log-probabilities of a sample, and its sampling mask."""

import numpy as np

from jaxengine import LLM, SamplingParams
from tests.tiny_llm import OPTIONS, VOCAB, model_folder

PROMPT, COUNT, TEMPERATURE = [5, 6, 7], 6, 0.7


def whole(logprobs, absent):
    """float64 [tokens, vocabulary]."""
    found = np.full((len(logprobs.token_ids), VOCAB), absent)
    np.put_along_axis(found, logprobs.top_token_ids, logprobs.top_logprobs, axis=1)
    return found


def test_processed_log_probabilities_are_those_of_the_raw_ones_within_the_mask():
    sampled = SamplingParams(
        temperature=TEMPERATURE, top_k=5, max_tokens=COUNT, logprobs=-1, seed=3, ignore_eos=True, detokenize=False
    )
    with LLM(model_folder(), logprobs_mode="processed", **OPTIONS) as llm:
        [completion] = llm.generate([PROMPT], sampled, use_tqdm=False)[0].outputs
        ids = list(completion.token_ids)
        scored = SamplingParams(max_tokens=0, prompt_logprobs=-1, prompt_logprobs_start=len(PROMPT), detokenize=False)
        [again] = llm.generate([PROMPT + ids], scored, use_tqdm=False)
        [short] = llm.logprobs([PROMPT + ids])
    raw = whole(again.prompt_logprobs, np.nan)
    np.testing.assert_allclose(np.exp(raw).sum(axis=1), 1, atol=1e-5)
    own = raw[np.arange(COUNT), ids]
    np.testing.assert_allclose(short[-COUNT:], own, atol=1e-5)
    mask = np.isfinite(whole(completion.logprobs, -np.inf))
    assert (mask.sum(axis=1) == 5).all()
    scores = np.where(mask, raw / TEMPERATURE, -np.inf)
    expected = own / TEMPERATURE - np.log(np.exp(scores).sum(axis=1))
    np.testing.assert_allclose(completion.logprobs.logprobs, expected, atol=1e-4)
    assert np.abs(expected - own).min() > 1e-3
