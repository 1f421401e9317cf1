"""Who runs when: order, fairness, shared contexts, preemption, refusal."""

import time
from itertools import pairwise

import pytest

from jaxengine.errors import ConfigError, RequestError
from jaxengine.request import PoolingParams
from tests.fakes import make_engine, make_request


def run_steps(engine, requests):
    """Runs them all; of each step the tokens that it computes, by request."""
    steps, original = [], engine.scheduler.schedule

    def schedule():
        rows = original()
        names = [sequence.request.request_id for sequence in engine.scheduler.slots.sequence[rows.slots]]
        steps.append(dict(zip(names, rows.count.tolist())))
        return rows

    engine.scheduler.schedule = schedule
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return steps


def first_steps(engine, requests):
    """The step in which each request was first scheduled."""
    steps = run_steps(engine, requests)
    return [next(i for i, step in enumerate(steps) if request.request_id in step) for request in requests]


def test_first_come_first_served():
    steps = first_steps(make_engine(max_num_seqs=1), [make_request(i, [1, 2, i]) for i in range(5)])
    assert all(a < b for a, b in pairwise(steps))


def test_a_smaller_priority_goes_first():
    requests = [make_request(i, [1, 2, i], priority=-i) for i in range(5)]
    steps = first_steps(make_engine(max_num_seqs=1), requests)
    assert all(a > b for a, b in pairwise(steps))


def test_completions_of_one_request_stay_together():
    a, b = make_request("a", [1, 2], n=3), make_request("b", [1, 3], n=3)
    engine = make_engine()
    engine.add(a)
    engine.add(b)
    ranks = [sequence.rank for sequence in [*a.sequences, *b.sequences]]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize(("aging", "starves"), [(4, False), (10**6, True)])
def test_waiting_makes_up_for_priority(aging, starves):
    engine = make_engine(max_num_seqs=1, priority_aging_steps=aging)
    late = make_request("late", [1, 2, 3], priority=1, max_tokens=1)
    engine.add(make_request("first", [1], max_tokens=1))
    engine.add(late)
    for i in range(40):  # a new one of better priority for each that ends
        if not engine.scheduler.num_waiting > 2:
            engine.add(make_request(i, [i % 16, 5], max_tokens=1))
        engine.step()
    assert late.finished != starves


def test_a_long_prompt_does_not_stop_the_others():
    engine = make_engine(max_num_batched_tokens=8, flights=0)
    short = make_request("short", [1], max_tokens=10)
    engine.add(short)
    engine.step()
    engine.add(make_request("long", [i % 16 for i in range(100)], max_tokens=1))
    for done in range(2, 11):
        engine.step()
        assert short.sequences[0].num_output == done
    assert engine.runner.chunks > 5


@pytest.mark.parametrize("caching", [True, False])
def test_a_shared_context_is_computed_once(caching):
    """A group with one context: apart from it each computes its own last tokens and nothing else."""
    context, flights = [i % 16 for i in range(40)], 2
    engine = make_engine(pages=100, max_num_seqs=8, max_num_batched_tokens=16, flights=flights,
                         enable_prefix_caching=caching)  # fmt: skip
    if caching:
        requests = [make_request(i, [*context, i, 1], max_tokens=2) for i in range(8)]
    else:  # without the cache only the completions of one request share
        requests = [make_request(0, [*context, 0, 1], max_tokens=2, n=8)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert engine.runner.computed == 40 + 8 * 3  # two tokens of the prompt, one of the output
    assert engine.runner.max_flying == flights + 1


def test_without_the_cache_requests_share_nothing_with_each_other():
    engine = make_engine(pages=100, max_num_batched_tokens=16, enable_prefix_caching=False)
    for i in range(2):
        engine.add(make_request(i, [i % 16 for i in range(41)], max_tokens=1, n=2))
    while engine.has_work:
        engine.step()
    assert engine.runner.computed == 2 * (41 + 1)  # the second completion computes the last token only
    assert engine.scheduler.prefix_hits == 0


def test_scores_wait_for_their_context_too():
    context = [i % 16 for i in range(40)]
    engine = make_engine(pages=100, max_num_batched_tokens=16)
    requests = [
        make_request(i, [*context, i, 1], max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=41) for i in range(4)
    ]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert engine.runner.computed == 40 + 4  # the last token is never computed, and nothing is drawn
    assert not any(request.sequences[0].num_output for request in requests)
    assert all(len(request.sequences[0].prompt_logprobs) == 1 for request in requests)


def test_when_the_computing_one_ends_another_takes_over():
    context = [i % 16 for i in range(40)]
    engine = make_engine(pages=100, max_num_batched_tokens=8)
    requests = [make_request(i, [*context, i], max_tokens=2) for i in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    assert len(engine.scheduler.running) == 1 and engine.scheduler.num_waiting == 2
    engine.abort("0")
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert all(request.sequences[0].num_tokens == 43 for request in requests[1:])


def test_the_lowest_rank_is_preempted_and_comes_back():
    engine = make_engine(pages=6, page_size=2, max_num_seqs=2)
    a, b = (make_request(name, [1, 2, i], max_tokens=8) for i, name in enumerate("ab"))
    engine.add(a)
    engine.add(b)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert a.sequences[0].preemptions == 0 and b.sequences[0].preemptions > 0
    assert engine.metrics()["num_preemptions"] == b.sequences[0].preemptions


@pytest.mark.parametrize(("windows", "pages", "needed"), [((None,), 5, 6), ((None, 4), [9, 5], 6)])
def test_what_alone_outgrows_the_pool_is_refused_with_the_pages_it_needs(windows, pages, needed):
    engine = make_engine(windows=windows, pages=pages, max_num_batched_tokens=16)
    tokens = 21 if len(windows) == 1 else 24
    engine.add(make_request("fits", [1] * 10, max_tokens=8))
    with pytest.raises(RequestError, match=rf"needs {needed} pages of KV cache, there are 5; lower max_tokens"):
        engine.add(make_request("large", [1] * 10, max_tokens=tokens - 9))
    while engine.has_work:  # what was there goes on
        engine.step()
    assert engine.metrics()["request_success"] == {"length": 1}


def test_more_rows_than_tokens_are_refused():
    with pytest.raises(ConfigError, match="max_num_seqs=4 must be at most max_num_batched_tokens=2"):
        make_engine(max_num_seqs=4, max_num_batched_tokens=2)


def test_only_who_needs_its_last_token_waits_a_flight():
    engine = make_engine(flights=1, max_num_batched_tokens=16)
    waits = make_request("waits", [1, 2], max_tokens=8, bad_words=[[3, 4]])
    runs = make_request("runs", [1, 5], max_tokens=8)
    single = make_request("single", [1, 6], max_tokens=8, bad_words=[[3]])
    for request in (waits, runs, single):
        engine.add(request)
    while not (runs.finished and single.finished):
        engine.step()
    assert 0 < waits.sequences[0].num_output <= 5 and engine.runner.max_flying == 2
    while engine.has_work:
        engine.step()
    assert waits.sequences[0].num_output == 8


def test_ten_thousand_waiting_requests_do_not_slow_a_step():
    def seconds(waiting):
        engine = make_engine(max_num_seqs=2, pages=100)
        context = [i % 16 for i in range(30)]
        for i in range(waiting):
            engine.add(make_request(i, [*context, i % 16], max_tokens=10, timeout=time.monotonic() + 1000))
        times = []
        for _ in range(30):
            start = time.thread_time()
            engine.step()
            assert engine.has_work
            times.append(time.thread_time() - start)
        return sorted(times)[15]

    assert seconds(10_000) < 3 * seconds(20) + 1e-3


def test_new_weights_share_no_old_pages():
    engine = make_engine(max_num_seqs=1)
    prompt = [i % 16 for i in range(13)]
    for i in range(3):
        engine.add(make_request(i, prompt, max_tokens=2))
    while engine.scheduler.prefix_hits == 0:
        engine.step()
    engine.scheduler.weight_version = 1
    engine.reset_prefix_cache()
    while len(engine._requests) > 1:
        engine.step()
        engine.check_integrity()
    hits = engine.scheduler.prefix_hits
    while engine.has_work:
        engine.step()
    assert engine.scheduler.prefix_hits == hits == 12


def test_who_waits_for_pages_is_not_overtaken_by_a_newcomer():
    """The second request's last chunk needs a page more than there are; the third would fit into what is left."""
    engine = make_engine(pages=12, flights=0, enable_prefix_caching=False)
    requests = [
        make_request("old", [1, 2, 3, 4], max_tokens=8),
        make_request("long", [i % 16 for i in range(48)], max_tokens=1),
        make_request("new", [5], max_tokens=1),
    ]
    rows = run_steps(engine, requests)
    assert {"old": 1} in rows, "the long request had to wait"
    new = next(i for i, row in enumerate(rows) if "new" in row)
    assert sum(row.get("long", 0) for row in rows[:new]) == 48


def test_a_prompt_whose_state_is_pooled_computes_something_though_all_its_pages_are_cached():
    """As when it is admitted again behind a request with the same text: its last token is never computed."""
    engine, ids = make_engine(), list(range(1, 17))  # four pages
    run_steps(engine, [make_request("same", ids, max_tokens=1)])
    pooled = make_request("pooled", [*ids, 1], max_tokens=0, prompt_logprobs=0)
    pooled.params = PoolingParams(max_tokens=0, prompt_logprobs=0, detokenize=False, pooling="cls")
    engine.add(pooled)
    pooled.sequences[0].num_pooled = 1
    first, *_ = run_steps(engine, [])
    assert first == {"pooled": 4} and pooled.finished
