"""The loop's edges: failures, interruptions, reports, stop strings, ids."""

import sys

import pytest

from jaxengine.errors import EngineError, RequestError
from tests.fakes import FakeSink, expected, letter, make_engine, make_request


def finish(engine, limit=500):
    news = []
    while engine.has_work:
        news += engine.step()
        engine.check_integrity()
        limit -= 1
        assert limit, "no progress"
    return news


def outputs(request):
    return [sequence.output() for sequence in request.sequences]


def test_the_culprit_is_named_after_one_retry_and_the_others_go_on():
    engine = make_engine(poison=15, flights=1)
    good = [make_request(i, [1, 2, i], max_tokens=3) for i in range(3)]
    engine.add(good[0])
    finish(engine)
    bad = make_request("bad", [1, 2, 15], max_tokens=3)
    engine.add(bad)
    news = finish(engine)
    assert bad in news and isinstance(bad.error, EngineError) and "'bad'" in str(bad.error)
    assert bad.sequences[0].finish_reason == "error" and engine.runner.failures == 2
    engine.add(good[1])
    finish(engine)
    assert outputs(good[1]) == [expected(good[1], (None,), 16).tokens]


def test_a_device_that_cannot_be_reset_ends_every_request_by_name():
    engine = make_engine(fail={1: "result"})
    requests = [make_request(i, [1, 2, i], max_tokens=5) for i in range(6)]
    for request in requests:
        engine.add(request)
    engine.runner.fail_resets = 1
    news = finish(engine)
    for request in requests:
        assert request in news and repr(request.request_id) in str(request.error)
    with pytest.raises(EngineError, match="the device is lost: no reset"):
        engine.add(make_request("new", [1]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["schedule", "submit", "result", "land", "update"])
@pytest.mark.parametrize("flights", [0, 1])
def test_whatever_interrupts_a_step_is_raised_and_the_engine_goes_on(where, error, flights, monkeypatch):
    engine = make_engine(flights=flights)
    requests = [make_request(i, [1, 2, 3, 4, 5, i], max_tokens=6, n=2) for i in range(4)]
    for request in requests:
        engine.add(request)
    for _ in range(4):
        engine.step()
    if where == "result":
        import tests.fakes

        owner = tests.fakes.FakeFlight
    else:
        owner = {"submit": engine.runner, "update": engine.sink}.get(where, engine.scheduler)
    original, calls = getattr(owner, where), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2 and where in ("land", "schedule"):
            raise error
        result = original(*arguments) if where != "result" else None
        if len(calls) == 1 and where not in ("land", "schedule"):
            raise error
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(error):
            for _ in range(3):
                engine.step()
    news = finish(engine)
    ended = 0
    for request in requests:
        if request.error is None:
            assert outputs(request) == [expected(request, (None,), 16, i).tokens for i in range(2)]
        else:
            ended += 1
            assert where in ("land", "update") and "interrupted" in str(request.error) and request in news
    assert (ended > 0) == (where in ("land", "update"))
    assert engine.runner.resets == (1 if where == "result" else 2)
    assert not engine.sink.texts and all(p.num_free == p.num_pages - 1 for p in engine.scheduler.pools)


def test_a_prompt_that_samples_in_its_last_step_only_is_reported():
    engine = make_engine(flights=2, max_num_batched_tokens=4)
    request = make_request(0, [i % 16 for i in range(17)], max_tokens=1, prompt_logprobs=2, n=2)
    engine.add(request)
    news = finish(engine)
    assert news.count(request) == 2 and request.finished  # once for each completion, the second one shares pages
    found = [row[0] for row in request.sequences[0].prompt_logprobs]
    assert found == pytest.approx(expected(request, (None,), 16).prompt_logprobs)
    assert request.sequences[1].prompt_logprobs == []


def test_whole_distributions_stay_with_their_rows_when_another_ends_in_flight():
    engine = make_engine(flights=2, max_num_batched_tokens=12, pages=100)
    requests = [
        make_request(i, [(i * j) % 16 for j in range(1, 12)], max_tokens=1, prompt_logprobs=-1) for i in range(3)
    ]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.step()
    engine.abort("0")
    finish(engine)
    for request in requests[1:]:
        alone = expected(request, (None,), 16).prompt_logprobs
        rows = request.sequences[0].prompt_logprobs
        assert [row[0] for row in rows] == pytest.approx(alone)
        for row in rows:
            assert row[3][row[1] - 1] == pytest.approx(row[0])


def test_a_stop_string_ends_a_request_while_flights_are_out():
    request = make_request(0, [1, 2, 3], max_tokens=12)
    alone = expected(request, (None,), 16).tokens
    stop = letter(alone[3]) + letter(alone[4])
    engine = make_engine(flights=2)
    request = make_request(0, [1, 2, 3], max_tokens=12, stop=[stop])
    engine.add(request)
    news = finish(engine)
    assert outputs(request) == [alone[:5]]
    assert (request.sequences[0].finish_reason, request.sequences[0].stop_reason) == ("stop", stop)
    assert news.count(request) == 5 and engine.runner.max_flying == 3


@pytest.mark.parametrize("included", [False, True])
def test_who_is_not_watched_gets_the_same_text_and_times_at_the_end(included):
    def ended(watched, abort_after=None, **fields):
        engine = make_engine(flights=1)
        request = make_request(0, [1, 2, 3], max_tokens=12, include_stop_str_in_output=included, **fields)
        request.watched = watched
        engine.add(request)
        news = []
        while engine.has_work:
            news += engine.step()
            if request.sequences[0].num_output == abort_after:
                engine.abort("0")
        sequence = request.sequences[0]
        assert request.first_token_time < request.last_token_time
        assert len(news) == ((sequence.num_output if watched else 1) if abort_after is None else watched * 7)
        return sequence.output(), sequence.text, sequence.finish_reason, sequence.stop_reason

    alone = expected(make_request(0, [1, 2, 3], max_tokens=12), (None,), 16).tokens
    for fields in ({}, {"stop_token_ids": [alone[5]]}, {"stop": [letter(alone[3]) + letter(alone[4])]}):
        assert ended(True, **fields) == ended(False, **fields)
    assert ended(True, abort_after=7) == ended(False, abort_after=7)
    assert ended(False)[1] == "".join(map(letter, alone))


def test_a_decode_step_calls_nothing_for_each_row():
    """Calls within jaxengine, of Python and of C, in steps where no row needs a page, ends or is watched."""

    def calls(rows):
        engine = make_engine(page_size=64, pages=2 * rows, max_num_seqs=rows, max_num_batched_tokens=256, columns=2)
        for i in range(rows):
            request = make_request(
                i, [1, 2, i % 16], max_tokens=40, temperature=float(i % 2), eos=(3,), ignore_eos=True
            )
            request.watched = False
            engine.add(request)
        for _ in range(4):
            engine.step()
        counts = []

        def count(frame, event, _):
            counts[-1] += "call" in event and "jaxengine/engine/" in frame.f_code.co_filename

        for _ in range(10):
            counts.append(0)
            sys.setprofile(count)
            engine.step()
            sys.setprofile(None)
            assert len(engine._steps[-1].rows) == rows
        return counts

    few, many = calls(8), calls(64)
    assert few == many and max(few) < 250


def test_stop_tokens_say_which_one_unless_it_is_the_models_own():
    alone = expected(make_request(0, [1, 2, 3], max_tokens=9), (None,), 16).tokens
    for fields, reason in (({"stop_token_ids": [alone[0]]}, alone[0]), ({"eos": (alone[0],)}, None)):
        engine, request = make_engine(), make_request(0, [1, 2, 3], max_tokens=9, **fields)
        engine.add(request)
        finish(engine)
        sequence = request.sequences[0]
        assert (outputs(request), sequence.finish_reason, sequence.stop_reason) == ([alone[:1]], "stop", reason)
        assert sequence.text == ""


def test_an_id_may_be_used_again_when_its_request_has_ended():
    engine = make_engine(flights=2)
    first, second = (make_request("same", [1, 2, 3], max_tokens=9, n=2) for _ in range(2))
    engine.add(first)
    with pytest.raises(RequestError, match="'same' is in use"):
        engine.add(second)
    for _ in range(3):
        engine.step()
    assert engine.abort("same") is first and engine.abort("same") is None
    assert engine.scheduler.draining, "flights still name it"
    engine.add(second)
    finish(engine)
    assert outputs(second) == [expected(second, (None,), 16, i).tokens for i in range(2)]


def test_a_request_that_the_sink_refuses_leaves_nothing_behind(monkeypatch):
    def refuse(self, key, prompt_ids, params):
        raise RequestError("no stop strings here")

    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(FakeSink, "open", refuse)
        with pytest.raises(RequestError, match="no stop strings"):
            engine.add(make_request(0, [1]))
    assert not engine.has_work
    engine.add(make_request(0, [1]))
    finish(engine)


def test_while_programs_are_compiled_no_result_waits_for_the_next_step():
    engine = make_engine(flights=1)
    request = make_request("a", [1, 2, 3], max_tokens=4)
    request.watched = True
    engine.add(request)
    engine.runner.compiling = True
    assert not engine.step() and len(engine.runner.flying) == 1
    assert engine.step() == [request] and request.sequences[0].num_output == 1 and engine.runner.steps == 1
    engine.runner.compiling = False
    while engine.has_work:
        engine.step()
    assert request.finished and engine.runner.max_flying == 2
