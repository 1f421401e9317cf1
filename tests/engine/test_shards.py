"""Shards of a data axis: who is given what, and that each request gets what it gets alone."""

import numpy as np
import pytest

from jaxengine.step import unpack
from tests.engine.test_properties import assert_as_alone, assert_nothing_is_held, run
from tests.fakes import make_engine, make_request

PREFIX = [t % 16 for t in range(13)]


def shards_of(requests):
    return [request.shard for request in requests]


def record(engine):
    """The inputs of each step from now on."""
    seen, submit = [], engine.runner.submit
    engine.runner.submit = lambda inputs: seen.append(inputs) or submit(inputs)
    return seen


def computed(step):
    """Tokens of each shard, of two."""
    field = "counts" if step.kind == "decode" else "q_len"
    return [int(unpack(step.kind, step.bucket, part)[field].sum()) for part in step.packed.reshape(2, -1)]


@pytest.mark.parametrize("flights", [0, 1, 2])
def test_all_of_it_at_once_on_every_shard(flights):
    engine = make_engine(windows=(None, 6), pages=[14, 14], flights=flights, max_num_batched_tokens=8, shards=3)
    extra = [{}, {"temperature": 1.0, "seed": 7}, {"logprobs": -1, "prompt_logprobs": -1}, {"repetition_penalty": 1.5},
             {"prompt_logprobs": 1}]  # fmt: skip
    requests = [
        make_request(i, [*PREFIX[i % 3 :], i % 16], max_tokens=12, n=1 + i % 2, priority=i % 3, **extra[i % 5])
        for i in range(27)
    ]
    run(engine, [(i, request) for i, request in enumerate(requests)])
    for request in requests:
        assert_as_alone(engine, request)
    assert_nothing_is_held(engine)
    for shard, device in zip(engine.scheduler.shards, engine.runner.devices, strict=True):
        assert shard.num_preemptions > 0 and shard.prefix_hits > 0 and device.computed > 100
    assert engine.runner.chunks > 0 and engine.runner.max_flying == flights + 1


def test_a_shard_with_a_prompt_makes_all_run_the_mixed_program_and_an_idle_one_gets_padding():
    engine = make_engine(shards=3, flights=0)
    steps = record(engine)
    first, second = make_request(0, [1], max_tokens=8), make_request(1, [2, 3, 4], max_tokens=6)
    run(engine, [(0, first), (2, second)])
    assert shards_of([first, second]) == [0, 1]
    # A token of prompt, two of output, one beside the other prompt, and then both draw.
    assert [step.kind for step in steps] == ["decode", "decode", "mixed", *["decode"] * 5]
    sizes = [len(step.packed) for step in steps]
    assert {size % 3 for size in sizes} == {0} and steps[2].bucket.tokens == 4, "the largest of what shards need"
    assert all((step.packed.reshape(3, -1)[2] == steps[0].packed.reshape(3, -1)[2]).all() for step in steps[:2])
    assert [step.order.tolist() for step in steps[1:4]] == [[0], [0, 1], [0, 1]]
    for request in (first, second):
        assert_as_alone(engine, request)


def test_several_steps_a_call_want_every_shard_to_do_no_more_than_draw():
    engine = make_engine(shards=2, flights=0, steps_per_call=3, page_size=2, pages=60)
    steps = record(engine)
    requests = [make_request(0, [1], max_tokens=16), make_request(1, [2], max_tokens=5)]
    requests.append(make_request(2, [3, 4, 5], max_tokens=5))
    run(engine, [(0, requests[0]), (0, requests[1]), (3, requests[2])])
    for request in requests:
        assert_as_alone(engine, request)
    assert shards_of(requests) == [0, 1, 1]
    drawn = [(step.bucket.steps, computed(step)) for step in steps]
    assert drawn == [
        (1, [1, 1]), (3, [3, 3]), (3, [3, 1]),
        (1, [1, 3]),  # a prompt
        (3, [3, 3]), (3, [3, 1]), (1, [1, 0]), (1, [1, 0]),
    ]  # fmt: skip


def test_a_request_goes_to_the_shard_that_has_its_prefix():
    engine = make_engine(shards=2, max_num_batched_tokens=64)
    requests = [make_request(i, prompt, max_tokens=2) for i, prompt in enumerate([
        PREFIX, [9] * 13, [*PREFIX, 1], [*[9] * 12, 4], [*PREFIX[:8], 3],  # two pages of the first
    ])]  # fmt: skip
    for request in requests:
        engine.add(request)
    assert shards_of(requests) == [0, 1, 0, 1, 0]
    run(engine, [])
    again = make_request("again", [*[9] * 12, 7])
    engine.add(again)
    assert again.shard == 1, "what has ended is remembered"
    engine.reset_prefix_cache()
    other = make_request("other", [*[9] * 12, 8])
    engine.add(other)
    assert other.shard == 0, "the cache is empty, and the other shard has work"


def test_a_shared_prefix_does_not_pile_up_on_one_shard():
    engine = make_engine(shards=2, max_num_batched_tokens=16)
    requests = [make_request(i, [*PREFIX, i], max_tokens=2) for i in range(12)]
    for request in requests:
        engine.add(request)
    counts = np.bincount(shards_of(requests), minlength=2)
    assert counts.sum() == 12 and abs(counts[0] - counts[1]) <= 2
    run(engine, [])
    assert all(shard.prefix_hits > 0 for shard in engine.scheduler.shards)


def test_without_a_prefix_cache_the_least_loaded_shard_gets_it():
    engine = make_engine(shards=3, enable_prefix_caching=False)
    long, *short = [make_request(i, PREFIX, max_tokens=30 if i == 0 else 2, n=1 + i % 2) for i in range(5)]
    for request in (long, *short):
        engine.add(request)
    assert shards_of([long, *short]) == [0, 1, 2, 2, 1]
    engine.abort(long.request_id)
    last = make_request("last", [5])
    engine.add(last)
    assert last.shard == 0, "what has ended is no load"
    run(engine, [])
    assert_nothing_is_held(engine)
    assert all(len({sequence.request.shard for sequence in request.sequences}) == 1 for request in short)


def test_the_first_error_of_a_device_costs_no_request_of_any_shard():
    engine = make_engine(shards=2, fail={3: "result"})
    requests = [make_request(i, [i, 2, 3], max_tokens=6) for i in range(6)]
    run(engine, [(0, request) for request in requests])
    for request in requests:
        assert_as_alone(engine, request)
    assert engine.runner.resets == 2 and set(shards_of(requests)) == {0, 1}
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("where", ["grant", "land"])
def test_an_interruption_between_two_shards_loses_nothing(where, monkeypatch):
    engine = make_engine(shards=2)
    requests = [make_request(i, [1, 2, 3, 4, 5, i], max_tokens=6, n=2) for i in range(4)]
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.shards[1], where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    run(engine, [])
    for request in requests:
        if request.error is None:
            assert_as_alone(engine, request)
        else:
            assert where == "land" and "interrupted in its commit" in str(request.error)
    assert engine.runner.resets == 2 and any(request.error for request in requests) == (where == "land")
    assert_nothing_is_held(engine)
