"""Weights change and the engine sleeps at any moment: each request gets what it gets alone under the weights that its
spans name, and nothing is lost."""

import random
from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.engine.updates import PendingUpdate
from tests.engine.test_properties import VOCAB, assert_as_alone, assert_nothing_is_held, run, workloads
from tests.fakes import expected, make_engine, make_request


def check_updates(workload, seen):
    engine, arrivals, seed = workload
    chance, updates, installed, news = random.Random(seed), [], [], []

    def fail():
        raise MemoryError("no room")

    def install():
        installed.append(len(engine._steps))
        engine.runner.weights = len(installed)

    def on_step(step):
        if engine._update is None and engine.has_work and len(updates) < 6 and chance.random() < 0.3:
            mode, fails = chance.choice(["wait", "restart", "continue"]), chance.random() < 0.2
            updates.append(PendingUpdate(None, mode, fail if fails else install, destructive=False))
            engine.update_weights(updates[-1])
        elif engine._update is None and step < 100 and chance.random() < 0.05:
            running = engine.metrics()["num_requests_running"]
            engine.sleep(1)
            assert not engine.has_work
            news.extend(engine.step())  # what landed as it fell asleep
            assert not engine._steps
            engine.runner.reset()
            engine.wake_up(None)
            seen["slept while it ran"] += running > 0
        engine.check_integrity()

    news += run(engine, arrivals, on_step)
    assert set(installed) <= {0}, "weights changed under a step in flight"
    for update in updates:
        assert update.done.done()
        if update.done.exception() is None:
            report = update.done.result()
            seen.update(restarted=len(report.restarted), continued=len(report.continued), waited=update.mode == "wait")
        else:
            seen["failed"] += 1
    assert engine.scheduler.weight_version == len(installed)
    for _, request in arrivals:
        assert request in news
        if request.error is not None:
            continue
        assert_as_alone(engine, request)
        for sequence in request.sequences:
            starts, versions = zip(*sequence.weight_versions, strict=True)
            assert starts[0] == 0 and list(starts) == sorted(set(starts)) and list(versions) == sorted(set(versions))
            assert starts[-1] < sequence.num_output or len(starts) == 1 or sequence.finish_reason == "stop"
            seen["several spans"] += len(starts) > 1
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("faults", [False, True])
def test_updates_lose_nothing(faults):
    seen = Counter()

    @settings(max_examples=40)
    @given(workloads(faults=faults))
    def check(workload):
        check_updates(workload, seen)

    check()
    for what in ("restarted", "continued", "waited", "failed", "several spans", "slept while it ran"):
        assert seen[what] > 3, seen


@pytest.mark.parametrize(("mode", "spans"), [("restart", [(0, 1)]), ("continue", [(0, 0), (4, 1)])])
def test_log_probabilities_are_those_of_the_version_that_drew(mode, spans):
    """Of a restarted request nothing stays, of the prompt and of the sum neither."""
    engine = make_engine()
    request = make_request(0, [1, 2, 3, 4], max_tokens=6, logprobs=1, prompt_logprobs=1)
    request.watched = False  # what was streamed would be kept
    engine.add(request)
    [sequence] = request.sequences
    while sequence.num_output < 3:
        engine.step()  # and one more is in flight
    engine.update_weights(PendingUpdate(1, mode, partial(setattr, engine.runner, "weights", 1), destructive=False))
    while not request.finished:
        engine.step()
        assert len(sequence.logprobs) == sequence.num_output
    assert list(sequence.weight_versions) == spans
    assert_as_alone(engine, request)
    assert sequence.cumulative_logprob == pytest.approx(sum(row[0] for row in sequence.logprobs))
    windows = [group.window for group in engine.runner.groups]
    old = expected(request, windows, VOCAB)
    assert [row[0] for row in sequence.logprobs] != pytest.approx(old.logprobs), "the weights matter"


@given(st.sampled_from(["wait", "restart", "continue"]))
def test_a_device_failure_while_an_update_is_due(mode):
    """The flight that is to land first fails; the update comes all the same."""
    engine = make_engine(flights=2, fail={1: "result"})
    request = make_request(0, [1, 2, 3], max_tokens=6)
    engine.add(request)
    engine.step()
    update = PendingUpdate(5, mode, partial(setattr, engine.runner, "weights", 5), destructive=False)
    engine.update_weights(update)
    run(engine, [])
    assert update.done.result().version == engine.scheduler.weight_version == 5
    assert request.finished and engine.runner.failures == 1
    assert_as_alone(engine, request)
    assert_nothing_is_held(engine)


def test_a_destructive_failure_is_raised():
    engine = make_engine()
    engine.add(make_request(0, [1, 2, 3], max_tokens=6))

    def fail():
        raise OSError("gone")

    update = PendingUpdate(None, "continue", fail, destructive=True)
    engine.update_weights(update)
    with pytest.raises(OSError, match="gone"):
        engine.step()
    engine.drop_update(RuntimeError("ended"))
    assert str(update.done.exception()) == "ended"
