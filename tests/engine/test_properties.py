"""Whatever shares the engine, however small its memory: each request gets what it gets alone, and nothing is lost."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.errors import EngineError
from tests.fakes import expected, make_engine, make_request

VOCAB = 16
FULL = settings(max_examples=3000)


@st.composite
def workloads(draw, faults=False):
    """An engine, its requests by the step of their arrival, and a seed for what happens on the way."""
    windows = draw(st.sampled_from([(None,), (None, 5), (3,), (9, None), (1, None)]))
    page_size = draw(st.sampled_from([1, 2, 4]))
    budget = draw(st.integers(1, 24))
    slots = draw(st.integers(1, min(6, budget)))
    prefixes = [draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)) for _ in range(2)]
    requests, longest = [], 0
    for i in range(draw(st.integers(1, 7))):
        prefix = draw(st.sampled_from(prefixes))
        prompt = prefix[: draw(st.integers(1, 24))] + draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))
        asked = {
            "max_tokens": draw(st.integers(1, 12)),
            "temperature": draw(st.sampled_from([0.0, 1.0])),
            "seed": draw(st.integers(0, 2**64 - 1)),
            "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
            "priority": draw(st.integers(-1, 1)),
            "eos": draw(st.sampled_from([(), (3,), (5, 6, 7)])),
        }
        extra = draw(st.sampled_from(["", "", "", "logprobs", "prompt", "edits", "words"]))
        if extra == "logprobs":
            asked.update(logprobs=draw(st.sampled_from([0, 2, -1])))
        elif extra == "prompt":
            asked.update(
                prompt_logprobs=draw(st.sampled_from([0, 2, -1])), prompt_logprobs_start=draw(st.integers(0, 20))
            )
            if len(prompt) > 1 and draw(st.booleans()):
                asked.update(max_tokens=0, n=1, prompt_logprobs_start=asked["prompt_logprobs_start"] % len(prompt))
        elif extra == "edits":
            asked.update(min_tokens=draw(st.integers(0, asked["max_tokens"])), repetition_penalty=1.5,
                         allowed_token_ids=[1, 3, 5, 9, 11])  # fmt: skip
        elif extra == "words":
            asked.update(bad_words=[[draw(st.integers(0, 15))], [draw(st.integers(0, 15)), draw(st.integers(0, 15))]])
        arrival = draw(st.integers(0, 12))
        requests.append((arrival, make_request(i, prompt, **asked)))
        requests[-1][1].watched = draw(st.booleans())
        longest = max(longest, len(prompt) + asked["max_tokens"] - 1)
    # The fewest pages that the largest request needs alone, and a few more.
    needed = [
        -(-longest // page_size)
        if window is None or window + budget >= longest
        else -(-(window + budget) // page_size) + 1
        for window in windows
    ]
    spare = draw(st.sampled_from([0, 0, 1, 3, 100]))
    fail = {}
    if faults:
        steps = draw(st.lists(st.integers(0, 30), max_size=3, unique=True))
        fail = {step: draw(st.sampled_from(["submit", "result"])) for step in steps}
    engine = make_engine(
        windows=windows, pages=[count + spare for count in needed], page_size=page_size, max_num_seqs=slots,
        max_num_batched_tokens=budget, flights=draw(st.sampled_from([0, 1, 2])), vocab=VOCAB,
        enable_prefix_caching=draw(st.booleans()), block_q=draw(st.sampled_from([1, 4])),
        priority_aging_steps=draw(st.sampled_from([1, 256])), steps_per_call=draw(st.sampled_from([1, 3])), fail=fail,
        shards=draw(st.sampled_from([1, 1, 2, 3])),
    )  # fmt: skip
    return engine, requests, draw(st.integers(0, 2**32))


def run(engine, arrivals, on_step=lambda step: None, limit=3000):
    """Steps until all is done; what each step returned, in order."""
    pending, news, step = sorted(arrivals, key=lambda item: item[0]), [], 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= step:
            engine.add(pending.pop(0)[1])
            engine.check_integrity()
        news += engine.step()
        engine.check_integrity()
        on_step(step)
        step += 1
        assert step < limit, "no progress"
    return news


def assert_as_alone(engine, request):
    windows = [group.window for group in engine.runner.groups]
    for i, sequence in enumerate(request.sequences):
        alone = expected(request, windows, VOCAB, i, sequence.weight_versions)
        assert sequence.output() == alone.tokens
        assert sequence.finish_reason == alone.reason
        assert sequence.text == "".join(
            chr(97 + t) for t in alone.tokens[: len(alone.tokens) - (alone.reason == "stop")]
        )
        if request.params.logprobs is not None:
            assert [row[0] for row in sequence.logprobs] == pytest.approx(alone.logprobs)
            wanted = request.params.logprobs
            assert all(len(row[2]) == (VOCAB if wanted == -1 else wanted) for row in sequence.logprobs)
    if request.params.prompt_logprobs is not None:
        rows = request.sequences[0].prompt_logprobs
        alone = expected(request, windows, VOCAB, 0, request.sequences[0].weight_versions)
        assert [row[0] for row in rows] == pytest.approx(alone.prompt_logprobs)
        wanted = request.params.prompt_logprobs
        for row in rows:
            assert len(row[2]) == (VOCAB if wanted == -1 else wanted)
            if wanted == -1:
                assert row[3][row[1] - 1] == row[0] and list(row[3]) == sorted(row[3], reverse=True)


def assert_nothing_is_held(engine):
    assert not (engine.has_work or engine._requests or engine.sink.texts)
    for shard in engine.scheduler.shards:
        assert not (shard.running or shard.draining or shard.num_waiting or shard._computing or shard._deferred)
        assert all(pool.num_free == pool.num_pages - 1 for pool in shard.pools)
        assert len(shard.slots.free) == shard.max_num_seqs


def check_alone(workload):
    engine, arrivals, _ = workload
    news = run(engine, arrivals)
    for _, request in arrivals:
        assert_as_alone(engine, request)
        assert request in news and request.queued_time <= request.scheduled_time
        assert not request.max_tokens or request.scheduled_time <= request.first_token_time
    assert_nothing_is_held(engine)
    assert engine.runner.max_flying <= engine.steps_in_flight + 1


def check_aborts(workload):
    engine, arrivals, seed = workload
    chance = random.Random(seed)
    ended = set()

    def on_step(step):
        for request in list(engine._requests.values()):
            if chance.random() < 0.1:
                ended.add(request)
                assert engine.abort(request.request_id) is request
            elif chance.random() < 0.05 and request.deadline is None:
                request.deadline = 0.0
                engine._deadlines.insert(0, (0.0, id(request), request))
            engine.check_integrity()

    run(engine, arrivals, on_step)
    for _, request in arrivals:
        reasons = {sequence.finish_reason for sequence in request.sequences}
        if reasons <= {"stop", "length"}:
            assert_as_alone(engine, request)
        else:
            assert ("abort" in reasons) == (request in ended) and "error" not in reasons
    assert_nothing_is_held(engine)


def check_faults(workload):
    engine, arrivals, _ = workload
    news = run(engine, arrivals)
    for _, request in arrivals:
        if request.error is None:
            assert_as_alone(engine, request)
        else:
            assert isinstance(request.error, EngineError) and repr(request.request_id) in str(request.error)
            assert request.finished and request in news and engine.runner.failures > 1
    assert_nothing_is_held(engine)
    assert (engine.runner.resets > 1) == (engine.runner.failures > 0)


@settings(max_examples=150)
@given(workloads())
def test_every_request_gets_what_it_gets_alone(workload):
    check_alone(workload)


@given(workloads())
def test_aborts_and_timeouts_free_everything(workload):
    check_aborts(workload)


@given(workloads(faults=True))
def test_device_errors_change_no_token(workload):
    check_faults(workload)


@pytest.mark.full
@pytest.mark.parametrize(
    ("check", "faults"), [(check_alone, False), (check_aborts, False), (check_faults, True)],
    ids=["alone", "aborts", "faults"],
)  # fmt: skip
def test_many_workloads(check, faults):
    FULL(given(workloads(faults))(check))()


@pytest.mark.parametrize("flights", [0, 1, 2])
@pytest.mark.parametrize("caching", [True, False])
def test_all_of_it_at_once_and_it_took_place(flights, caching):
    engine = make_engine(windows=(None, 6), pages=[14, 14], flights=flights, max_num_batched_tokens=8,
                         enable_prefix_caching=caching)  # fmt: skip
    shared = [t % VOCAB for t in range(13)]
    requests = [make_request(i, [*shared, i], max_tokens=12, n=1 + i % 2, priority=i % 3) for i in range(9)]
    run(engine, [(i, request) for i, request in enumerate(requests)])
    for request in requests:
        assert_as_alone(engine, request)
    assert_nothing_is_held(engine)
    assert engine.scheduler.num_preemptions > 0
    assert engine.runner.chunks > 0 and {kind for kind, _ in engine.runner.kinds} == {"decode", "mixed"}
    assert (engine.scheduler.prefix_hits > 0) == caching
    assert engine.runner.max_flying == flights + 1


@pytest.mark.parametrize("flights", [0, 1, 2])
@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_several_steps_a_call_end_where_single_steps_do(flights, windows):
    ends: list[dict] = [{"max_tokens": n} for n in (1, 7, 11)]
    ends += [{"eos": (e,), "max_tokens": 40} for e in (3, 8)] + [{"stop": ["c", "k"], "max_tokens": 40}]
    ends += [{"stop_token_ids": [5, 6], "max_tokens": 40}, {"max_tokens": 30, "temperature": 1.0}]

    def run_all(steps_per_call):
        engine = make_engine(windows=windows, flights=flights, steps_per_call=steps_per_call, page_size=2, pages=200)
        requests = [make_request(i, [i, 2, 3], **end) for i, end in enumerate(ends)]
        run(engine, [(i, request) for i, request in enumerate(requests)])
        assert_nothing_is_held(engine)
        assert engine.runner.most_steps == steps_per_call
        own = [request.sequences[0] for request in requests]
        return engine.generation_tokens, [(s.output(), s.text, s.finish_reason, s.stop_reason) for s in own]

    assert run_all(5)[1] == run_all(1)[1]
    assert {reason for *_, reason, _ in run_all(5)[1]} == {"stop", "length"}


@pytest.mark.parametrize("prompt", [[1, 2], [1, 2, 3], [1, 2, 3, 4]], ids=len)
@pytest.mark.parametrize("stop", range(3))
def test_what_a_call_draws_after_a_stop_token_is_in_no_published_page(prompt, stop):
    def output(**end):
        engine, request = make_engine(steps_per_call=8, page_size=2, pages=200), make_request(0, prompt, **end)
        run(engine, [(0, request)])
        assert_nothing_is_held(engine)
        [sequence], [pool] = request.sequences, engine.scheduler.pools
        computed = len(prompt) + sequence.num_output
        assert computed // 2 - 1 <= len(pool._page_of) <= computed // 2
        return sequence.output()

    drawn = output(max_tokens=20)
    found = output(max_tokens=20, stop_token_ids=[drawn[stop]])
    assert found == drawn[: drawn.index(drawn[stop]) + 1]


def test_timeout_by_the_clock():
    engine = make_engine()
    request = make_request(0, [1, 2], timeout=time.monotonic() + 0.02, max_tokens=10**6 // 10**4)
    engine.add(request)
    news = []
    while not request.finished:
        news += engine.step()
        time.sleep(0.005)
    assert request in news and request.sequences[0].finish_reason == "timeout"
    while engine.has_work:
        engine.step()
    assert_nothing_is_held(engine)
