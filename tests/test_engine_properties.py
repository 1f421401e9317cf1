"""On a real tiny model: whatever happens to a request on the way, its tokens are the model's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine import SamplingParams
from tests.tiny_llm import VOCAB, check_integrity, count_ties, fresh_llm, shared_llm

KINDS = pytest.mark.parametrize("kind", ["llama", "windows", pytest.param("experts", marks=pytest.mark.full)])


def prompt(length, seed=0):
    return np.random.default_rng([length, seed]).integers(3, VOCAB, length).tolist()


def greedy(llm, prompts, max_tokens=8, **options):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False, **options)
    assert all(len(output.outputs[0].token_ids) == max_tokens for output in outputs)
    return outputs


def assert_own_tokens(kind, outputs):
    ties = sum(count_ties(kind, output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs)
    assert ties <= 0.01 * sum(len(output.outputs[0].token_ids) for output in outputs)


@KINDS
def test_a_cached_prefix_changes_nothing(kind):
    llm = shared_llm(kind)
    llm.reset_prefix_cache()
    long = prompt(60)
    first = greedy(llm, [long])
    again = greedy(llm, [long, long[:50] + [5, 6, 7], long[:59]])
    assert first[0].num_cached_tokens == 0
    assert [output.num_cached_tokens for output in again] == [56, 48, 56]
    assert again[0].outputs[0].token_ids == first[0].outputs[0].token_ids
    assert_own_tokens(kind, [*first, *again])


@KINDS
def test_chunks_and_company_change_nothing(kind):
    with fresh_llm(kind, max_num_batched_tokens=16) as llm:
        rows = []
        schedule = llm._loop._engine.scheduler.schedule
        llm._loop._engine.scheduler.schedule = lambda: rows.append(schedule()) or rows[-1]
        outputs = greedy(llm, [prompt(90), prompt(5), prompt(33), prompt(1), prompt(70)])
        assert sum((~step.samples[step.count > 1]).sum() for step in rows) >= 10, "prompts came in chunks"
        assert any(len(set((step.count == 1).tolist())) == 2 for step in rows), "beside decodes"
        check_integrity(llm)
    assert_own_tokens(kind, outputs)


@KINDS
def test_preemption_changes_nothing(kind):
    with fresh_llm(kind, pages=14) as llm:
        outputs = greedy(llm, [prompt(20, i) for i in range(8)], max_tokens=40)
        assert llm.get_metrics()["num_preemptions"] > 0
        check_integrity(llm)
    assert_own_tokens(kind, outputs)


@KINDS
@pytest.mark.parametrize(("flights", "steps"), [(0, 1), (1, 4), (2, 1)])
def test_flights_and_steps_of_a_call_change_nothing(kind, flights, steps):
    with fresh_llm(kind, steps_in_flight=flights, steps_per_call=steps) as llm:
        engine, seen = llm._loop._engine, []
        submit = llm._runner.submit
        llm._runner.submit = lambda inputs: seen.append((len(engine._steps), inputs.bucket.steps)) or submit(inputs)
        outputs = greedy(llm, [prompt(30), prompt(4), prompt(50)], max_tokens=20)
        assert llm.config.steps_per_call == steps
        assert max(seen) == (flights, steps) and {steps for _, steps in seen} == {1, steps}
        check_integrity(llm)
    assert_own_tokens(kind, outputs)


@KINDS
def test_several_completions_and_streams_change_nothing(kind):
    llm = shared_llm(kind)
    hits = llm.get_metrics()["prefix_cache_hits"]
    params = SamplingParams(temperature=0, max_tokens=8, n=3, ignore_eos=True)
    *updates, last = llm.generate([prompt(40, 9)], params, stream=True)
    assert len(updates) >= 7 and llm.get_metrics()["prefix_cache_hits"] - hits >= 2 * 32
    assert len({tuple(completion.token_ids) for completion in last.outputs}) == 1
    assert_own_tokens(kind, [last])


@st.composite
def jobs(draw):
    shared = draw(st.booleans())
    requests = []
    for i in range(draw(st.integers(1, 10))):
        ids = prompt(draw(st.integers(1, 60)), 0 if shared else i)
        requests.append((ids, draw(st.integers(1, 12)), draw(st.integers(-2, 2))))
    return requests


def run_jobs(kind, requests, pages, budget, flights, steps, caching):
    with fresh_llm(
        kind, pages=pages, max_num_batched_tokens=budget, steps_in_flight=flights, steps_per_call=steps,
        enable_prefix_caching=caching,
    ) as llm:  # fmt: skip
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n, _ in requests]
        outputs = llm.generate(
            [ids for ids, _, _ in requests], params, priority=[p for _, _, p in requests], use_tqdm=False
        )
        check_integrity(llm)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [n for _, n, _ in requests]
        assert_own_tokens(kind, outputs)


settings_of_a_run = {
    "requests": jobs(), "pages": st.integers(11, 40), "budget": st.integers(8, 32), "flights": st.integers(0, 2),
    "steps": st.sampled_from([1, 4]), "caching": st.booleans(),
}  # fmt: skip


@KINDS
@settings(max_examples=8)
@given(**settings_of_a_run)
def test_any_run_gives_each_request_its_own_tokens(kind, requests, pages, budget, flights, steps, caching):
    run_jobs(kind, requests, pages, budget, flights, steps, caching)


@pytest.mark.full
@KINDS
@settings(max_examples=300)
@given(**settings_of_a_run)
def test_any_run_gives_each_request_its_own_tokens_full(kind, requests, pages, budget, flights, steps, caching):
    run_jobs(kind, requests, pages, budget, flights, steps, caching)
