"""Weights change and the engine sleeps at any moment: each request gets what it gets alone, and nothing is lost.

The fake device's answers do not depend on weights, so a token that is lost, repeated or read from a stale page shows.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.engine.updates import PendingUpdate
from tests.engine.test_properties import assert_as_alone, assert_nothing_is_held, run, workloads
from tests.fakes import make_engine, make_request


def check_updates(workload, seen):
    engine, arrivals, seed = workload
    chance, updates, installed = random.Random(seed), [], []

    def fail():
        raise MemoryError("no room")

    def on_step(step):
        if engine._update is None and engine.has_work and len(updates) < 6 and chance.random() < 0.3:
            mode, fails = chance.choice(["wait", "restart", "continue"]), chance.random() < 0.2
            install = fail if fails else (lambda: installed.append(len(engine._steps)))
            updates.append(PendingUpdate(None, mode, install, destructive=False))
            engine.update_weights(updates[-1])
        elif engine._update is None and step < 100 and chance.random() < 0.05:
            running = len(engine.scheduler.running)
            engine.sleep(1)
            assert not engine.has_work and engine.step() is not None and not engine._steps
            engine.runner.reset()
            engine.wake_up(None)
            seen["slept while it ran"] += running > 0
        engine.check_integrity()

    news = run(engine, arrivals, on_step)
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


@given(st.sampled_from(["wait", "restart", "continue"]))
def test_a_device_failure_while_an_update_is_due(mode):
    """The flight that is to land first fails; the update comes all the same."""
    engine = make_engine(flights=2, fail={1: "result"})
    request = make_request(0, [1, 2, 3], max_tokens=6)
    engine.add(request)
    engine.step()
    update = PendingUpdate(5, mode, lambda: None, destructive=False)
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
