"""Beam search against brute force over the model's own log-probabilities."""

import numpy as np
import pytest

from jaxengine import BeamSearchParams, RequestError
from tests.tiny_llm import EOS, VOCAB, fresh_llm, reference_logprobs, shared_llm

PROMPTS = [[40, 50, 60], [7], [11 * i % 590 + 3 for i in range(20)]]


def expand(kind, prompt, width, length, ends, temperature, length_penalty):
    """Plain beam search: every continuation of every beam, in NumPy."""
    live, done = [(tuple(prompt), 0.0)], []
    for step in range(length):
        grown = []
        for tokens, total in live:
            logprobs = reference_logprobs(kind, tokens)[-1] / temperature
            logprobs -= np.logaddexp.reduce(logprobs)
            grown += [((*tokens, token), total + logprobs[token]) for token in range(VOCAB)]
        grown.sort(key=lambda beam: -beam[1])
        live = []
        for tokens, total in grown:
            if len(live) == width:
                break
            if tokens[-1] in ends:
                done.append((tokens, total, len(tokens) - 1))
            elif step == length - 1:
                done.append((tokens, total, len(tokens)))
                if len(done) > 4 * width:
                    break
            else:
                live.append((tokens, total))
    return sorted(done, key=lambda beam: -beam[1] / beam[2] ** length_penalty)[:width]


CASES = {
    "greedy": {"beam_width": 1, "max_tokens": 4},
    "wide": {"beam_width": 4, "max_tokens": 3},
    "beyond max_logprobs": {"beam_width": 11, "max_tokens": 2},
    "hot": {"beam_width": 3, "max_tokens": 3, "temperature": 2.5},
    "short": {"beam_width": 3, "max_tokens": 4, "length_penalty": -1.0},
    "long": {"beam_width": 3, "max_tokens": 4, "length_penalty": 2.0},
    "ignore_eos": {"beam_width": 3, "max_tokens": 3, "ignore_eos": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "windows"])
def test_against_brute_force(kind, case):
    params = BeamSearchParams(**CASES[case])
    llm = shared_llm(kind)
    # Ends that do come: the first beams' own tokens.
    likely = {int(np.argsort(reference_logprobs(kind, prompt)[-1])[-2]) for prompt in PROMPTS}
    ends = llm.frontend.eos_token_ids
    llm.frontend.eos_token_ids = (EOS, *likely)
    try:
        results = llm.beam_search([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    finally:
        llm.frontend.eos_token_ids = ends
    stopped = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        want = expand(
            kind, prompt, params.beam_width, params.max_tokens, () if params.ignore_eos else (EOS, *likely),
            params.temperature or 1.0, params.length_penalty,
        )  # fmt: skip
        assert [tuple(beam.tokens) for beam in result.sequences] == [tokens for tokens, _, _ in want]
        np.testing.assert_allclose([b.cum_logprob for b in result.sequences], [t for _, t, _ in want], atol=1e-3)
        for beam in result.sequences:
            ended = beam.tokens[-1] in (EOS, *likely) and not params.ignore_eos
            assert beam.finish_reason == ("stop" if ended else "length")
            assert beam.text == llm.get_tokenizer().decode(beam.tokens[len(prompt) :])
            stopped += ended
    assert bool(stopped) == (params.beam_width > 1 and not params.ignore_eos)


def test_the_beams_share_their_pages():
    with fresh_llm() as llm:
        llm.beam_search([9 * i % 590 + 3 for i in range(40)], BeamSearchParams(beam_width=4, max_tokens=6))
        metrics = llm.get_metrics()
        assert metrics["prefix_cache_hits"] > 0.8 * metrics["prefix_cache_queries"] * 40 / 46


def test_prompts_and_the_longest_length(capsys):
    llm = shared_llm()
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    [text] = llm.beam_search("hello", params, use_tqdm=True)
    assert "Beam search" in capsys.readouterr().err
    [ids] = llm.beam_search(llm.encode("hello"), params)
    assert text == ids
    assert len(llm.beam_search(["hello", "world"], params)) == 2 and llm.beam_search([], params) == []
    [longest] = llm.beam_search([5] * 254, BeamSearchParams(beam_width=2, max_tokens=9, ignore_eos=True))
    assert {len(beam.tokens) for beam in longest.sequences} == {256}
    for bad in ("", [VOCAB], [5] * 256):
        with pytest.raises(RequestError):
            llm.beam_search(bad, params)
