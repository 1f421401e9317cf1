"""Log-probabilities through LLM against the model's own, computed without an engine."""

import numpy as np
import pytest

from jaxengine import LLM, RequestError, SamplingParams
from tests.tiny_llm import (
    OPTIONS,
    VOCAB,
    check_integrity,
    dense_logprobs,
    fresh_llm,
    model_folder,
    reference_logprobs,
    shared_llm,
)

PROMPT = [11 * i % 590 + 3 for i in range(45)]  # two chunks


@pytest.fixture(scope="module", params=["llama", "windows"])
def kind(request):
    return request.param


def ask(kind, **params):
    params = SamplingParams(**({"temperature": 0, "max_tokens": 5} | params))
    [output] = shared_llm(kind).generate([PROMPT], params, use_tqdm=False)
    return output


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_of_the_output(kind):
    output = ask(kind, logprobs=4)
    [completion] = output.outputs
    want = reference_logprobs(kind, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 : -1]
    found = completion.logprobs
    close(found.logprobs, want[range(5), completion.token_ids])
    close(found.top_logprobs, -np.sort(-want, axis=1)[:, :4])
    close(np.take_along_axis(want, found.top_token_ids, axis=1), found.top_logprobs)
    close(completion.cumulative_logprob, found.logprobs.sum())
    assert (found.ranks == 1).all()
    # lm-evaluation-harness tests greediness by equality of floats.
    assert (found.logprobs == found.top_logprobs[:, 0]).all()
    for i, token in enumerate(completion.token_ids):
        entry = found[i]
        assert len(entry) == 4 and next(iter(entry)) == token
        assert entry[token].decoded_token == shared_llm(kind).get_tokenizer().token_text(token)


def test_of_drawn_tokens(kind):
    output = ask(kind, logprobs=2, temperature=2.0, seed=1, max_tokens=8)
    [completion] = output.outputs
    want = reference_logprobs(kind, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 : -1]
    own = want[range(8), completion.token_ids]
    close(completion.logprobs.logprobs, own)
    ranks = completion.logprobs.ranks
    assert np.abs(ranks - 1 - (want > own[:, None]).sum(axis=1)).max() <= 1  # two may be as good as equal
    assert ranks.max() > 3 and len(completion.logprobs[int(ranks.argmax())]) == 3


def test_of_the_prompt(kind):
    llm = shared_llm(kind)
    output = ask(kind, prompt_logprobs=3)
    want = reference_logprobs(kind, PROMPT)
    found = output.prompt_logprobs
    assert len(found) == len(PROMPT) and found[0] is None
    assert found.token_ids.tolist() == PROMPT[1:]
    close(found.logprobs, want[range(44), PROMPT[1:]])
    close(found.top_logprobs, -np.sort(-want[:-1], axis=1)[:, :3])
    again = ask(kind, prompt_logprobs=3, prompt_logprobs_start=40)
    assert again.num_cached_tokens > 0, "pages before the start are served from the cache"
    assert len(again.prompt_logprobs) == len(PROMPT) and again.prompt_logprobs[39] is None
    assert again.prompt_logprobs.token_ids.tolist() == PROMPT[40:]
    close(again.prompt_logprobs.logprobs, found.logprobs[39:])
    # In the company of others, and whatever the chunks.
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    outputs = llm.generate([[7] * 20, PROMPT, PROMPT[:13], PROMPT], params, use_tqdm=False)
    for other in (outputs[1], outputs[3]):
        close(other.prompt_logprobs.logprobs, found.logprobs)
    close(outputs[2].prompt_logprobs.logprobs, found.logprobs[:12])


def test_of_the_whole_vocabulary(kind):
    output = ask(kind, logprobs=-1, prompt_logprobs=-1)
    [completion] = output.outputs
    want = reference_logprobs(kind, [*PROMPT, *completion.token_ids])
    assert completion.logprobs.top_logprobs.shape == (5, VOCAB)
    assert output.prompt_logprobs.top_logprobs.shape == (44, VOCAB)
    for found, rows in ((output.prompt_logprobs, want[:44]), (completion.logprobs, want[44:-1])):
        close(np.take_along_axis(rows, found.top_token_ids, axis=1), found.top_logprobs)
        assert (np.diff(found.top_logprobs, axis=1) <= 0).all()
        ranks = (found.top_token_ids == found.token_ids[:, None]).argmax(axis=1)
        assert (np.take_along_axis(found.top_logprobs, ranks[:, None], axis=1)[:, 0] == found.logprobs).all()


def test_that_others_ask_for_them_changes_no_token(kind):
    llm = shared_llm(kind)
    plain = ask(kind, max_tokens=12).outputs[0].token_ids
    fields = [{}, {"logprobs": 2}, {"prompt_logprobs": 0}, {"logprobs": -1}, {"prompt_logprobs": -1}]
    params = [SamplingParams(temperature=0, max_tokens=12, **field) for field in fields]
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [plain] * len(params)


def test_more_than_the_engine_serves():
    llm = shared_llm()
    with pytest.raises(RequestError, match=r"logprobs=21 is more than max_logprobs=20"):
        llm.generate([PROMPT], SamplingParams(logprobs=21), use_tqdm=False)
    with pytest.raises(RequestError, match="prompt_logprobs_start=45 is past"):
        llm.generate([PROMPT], SamplingParams(prompt_logprobs=1, prompt_logprobs_start=45), use_tqdm=False)


def test_processed_mode_is_the_distribution_that_is_drawn_from():
    with fresh_llm(logprobs_mode="processed") as llm:
        shared = llm._runner._programs
        # The programs with log-probabilities are this mode's own.
        llm._runner._programs = {key: p for key, p in shared.items() if key[0] != "head" or key[2] != "everything"}
        params = SamplingParams(temperature=0.7, top_k=5, logprobs=6, max_tokens=3, seed=2, logit_bias={9: 3.0})
        [output] = llm.generate([PROMPT], params, use_tqdm=False)
        [prompt] = llm.generate([PROMPT], SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False)
    [completion] = output.outputs
    logits = reference_logprobs("llama", [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 : -1]
    logits[:, 9] += 3.0
    best = -np.sort(-logits, axis=1)[:, :5] / 0.7
    want = best - np.logaddexp.reduce(best, axis=1, keepdims=True)
    close(completion.logprobs.top_logprobs[:, :5], want)
    assert (completion.logprobs.top_logprobs[:, 5] == -np.inf).all()
    own = completion.logprobs.logprobs
    assert all(value in row for value, row in zip(own, completion.logprobs.top_logprobs))
    close(prompt.prompt_logprobs.logprobs, reference_logprobs("llama", PROMPT)[range(44), PROMPT[1:]])  # always raw


def test_logprobs_are_those_of_a_dense_forward():
    llm, random = shared_llm(), np.random.default_rng(0)
    sequences = [random.integers(3, 600, n).tolist() for n in (2, 9, 33, 120, 256)]
    sequences.append(sequences[2])  # what lies in the prefix cache is computed again
    found = llm.logprobs(sequences)
    assert [len(x) for x in found] == [len(ids) - 1 for ids in sequences]
    for ids, got in zip(sequences, found, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, dense_logprobs(ids), atol=1e-4)
    with pytest.raises(RequestError, match="a prompt of one token"):
        llm.logprobs([[5, 6], [5]])
    check_integrity(llm)


def test_logprobs_agree_with_those_of_sampling():
    llm = shared_llm()
    params = SamplingParams(temperature=1, max_tokens=30, logprobs=0, ignore_eos=True)
    outputs = llm.generate([list(range(40, 60)), [40, 41]], params, use_tqdm=False)
    again = llm.logprobs([[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs])
    for output, found in zip(outputs, again, strict=True):
        np.testing.assert_allclose(found[-30:], output.outputs[0].logprobs.logprobs, atol=1e-4)


def test_chunk_by_chunk_and_only_of_what_is_asked_for():
    with LLM(model_folder(), **OPTIONS) as llm:
        llm._runner.prompt_chunk = 12  # no divisor of a step's 32 tokens
        llm._runner._run, run = lambda name, *args: ran.append((name, args[0])) or run(name, *args), llm._runner._run
        for wanted, start, chunks in ((3, 0, 3 + 1), (0, 40, 1), (-1, 20, 2 + 1)):
            ran: list = []
            asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=wanted, prompt_logprobs_start=start)
            [output] = llm.generate([PROMPT], asked, use_tqdm=False)
            want, first = reference_logprobs("llama", PROMPT), max(1, start)
            close(output.prompt_logprobs.logprobs, want[range(first - 1, 44), PROMPT[first:]])
            assert output.prompt_logprobs.top_logprobs.shape == (45 - first, VOCAB if wanted == -1 else wanted)
            assert [key for name, key in ran if name == "prompt"] == [(12, wanted > 0)] * chunks
            llm.reset_prefix_cache()
        logits = llm._runner._programs["prompt", 12, True].out_info
        assert [x.shape[0] for x in logits] == [12] * 4, "no more of them exist at a time"
