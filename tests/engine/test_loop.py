"""The engine's thread on a tiny model: many callers, interrupts, failures, the end."""

import gc
import signal
import threading
import time
import weakref

import jax
import numpy as np
import pytest

from jaxengine import LLM, EngineClosedError, EngineError, SamplingParams
from jaxengine import frontend as frontend_module
from jaxengine.engine import loop as loop_module
from jaxengine.frontend import Reporter
from tests.tiny_llm import OPTIONS, VOCAB, check_integrity, fresh_llm, model_folder, shared_llm

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENDLESS = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
PROMPTS = [[i + 3] * (i + 2) for i in range(12)]


def tokens(llm, prompts=PROMPTS, params=GREEDY):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def want():
    return tokens(shared_llm())


def idle(llm):
    deadline = time.monotonic() + 10
    while llm._loop.num_requests and time.monotonic() < deadline:
        time.sleep(0.005)
    check_integrity(llm)


def slow_down(llm):
    engine = llm._loop._engine
    step = engine.step
    engine.step = lambda: time.sleep(0.005) or step()


def test_calls_from_several_threads(want):
    llm, found = shared_llm(), {}

    def run(i):
        found[i] = tokens(llm)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), want)
    check_integrity(llm)


def test_several_engines_in_a_process(want):
    with fresh_llm() as one, fresh_llm("windows") as two, fresh_llm(max_logprobs=20) as three:
        streams = [llm.generate(PROMPTS, GREEDY, stream=True) for llm in (one, two, three)]
        last = [{}, {}, {}]
        for updates in zip(*streams):
            for found, output in zip(last, updates):
                found[tuple(output.prompt_token_ids)] = output.outputs[0].token_ids
        assert tokens(one) == tokens(three) == want
        assert tokens(two) == tokens(shared_llm("windows"))
        assert tokens(two) != want
    for found, answers in zip(last, (want, tokens(shared_llm("windows")), want)):
        assert all(found[tuple(prompt)] == answer for prompt, answer in zip(PROMPTS, answers))


def device_bytes():
    gc.collect()
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else sum(array.nbytes for array in jax.live_arrays())


def test_close_gives_the_memory_back():
    shared_llm()
    before = device_bytes()
    with fresh_llm() as llm:
        cache = sum(pool.nbytes for pool in jax.tree.leaves(llm._runner._cache))
        weights = sum(leaf.nbytes for leaf in llm._runner.weights.leaves)
        tokens(llm)
        assert device_bytes() - before >= cache + weights
    assert llm is not None and device_bytes() - before < 4096
    llm.close()
    for call in (lambda: tokens(llm), llm.get_metrics, llm.reset_prefix_cache,
                 lambda: llm.generate("a", stream=True)):  # fmt: skip
        with pytest.raises(EngineClosedError, match="closed"):
            call()
    assert llm.encode("hello")


def test_an_engine_that_nobody_holds_ends():
    shared_llm()
    before = device_bytes()
    llm = fresh_llm()
    tokens(llm)
    thread, reference = llm._loop._thread, weakref.ref(llm)
    assert thread.is_alive()
    del llm
    gc.collect()
    assert reference() is None
    thread.join(5)
    assert not thread.is_alive() and device_bytes() - before < 4096


def test_close_while_requests_run_and_wait():
    llm, caught = fresh_llm(), []
    slow_down(llm)

    def run():
        try:
            tokens(llm, params=ENDLESS)
        except EngineError as error:
            caught.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    stream = llm.generate(PROMPTS, ENDLESS, stream=True, priority=-1)
    next(stream)
    llm.close()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in caught] == [EngineClosedError] * 3
    with pytest.raises(EngineClosedError):
        list(stream)


def test_close_before_the_thread_has_seen_a_request(monkeypatch):
    """The request is in the queue, not yet in the engine: its caller must hear of the end all the same."""
    llm = fresh_llm()
    entered, leave = threading.Event(), threading.Event()
    waiting = threading.Thread(target=lambda: llm._loop.call(lambda _: (entered.set(), leave.wait(5))))
    waiting.start()
    entered.wait(5)
    caught = []

    def run():
        try:
            tokens(llm)
        except EngineError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while llm._loop.num_requests < len(PROMPTS):
        time.sleep(0.001)
    closing = threading.Thread(target=llm.close)
    closing.start()
    while llm._loop._end is None:
        time.sleep(0.001)
    leave.set()
    for each in (waiting, thread, closing):
        each.join(10)
        assert not each.is_alive()
    assert [type(error) for error in caught] == [EngineClosedError]


@pytest.mark.parametrize("streamed", [False, True])
def test_ctrl_c_ends_the_requests_and_leaves_the_engine_usable(want, streamed):
    llm = shared_llm()
    aborted = llm.get_metrics()["request_success"].get("abort", 0)
    slow_down(llm)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            if streamed:
                for _ in llm.generate(PROMPTS, ENDLESS, stream=True):
                    pass
            else:
                tokens(llm, params=ENDLESS)
    finally:
        timer.cancel()
        del llm._loop._engine.step
    idle(llm)
    assert llm.get_metrics()["request_success"]["abort"] > aborted
    assert tokens(llm) == want


def test_an_abandoned_stream_ends_its_requests(want):
    llm = shared_llm()
    aborted = llm.get_metrics()["request_success"].get("abort", 0)
    for _ in llm.generate(PROMPTS, ENDLESS, stream=True):
        break
    idle(llm)
    assert llm.get_metrics()["request_success"]["abort"] == aborted + len(PROMPTS)
    assert tokens(llm) == want


def test_a_progress_bar_that_fails_ends_the_requests(want):
    llm = shared_llm()

    def bar(**_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=bar)
    idle(llm)
    assert tokens(llm) == want


def test_a_bug_in_a_step_ends_the_engine_for_all(monkeypatch):
    monkeypatch.setattr(loop_module.logger, "exception", lambda *_: None)
    llm, caught = fresh_llm(), []
    slow_down(llm)

    def broken():
        raise ZeroDivisionError("a bug")

    def run():
        try:
            tokens(llm, params=ENDLESS)
        except EngineError as error:
            caught.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    while llm._loop.num_requests < 2 * len(PROMPTS):
        time.sleep(0.001)
    llm._loop._engine.step = broken
    for thread in threads:
        thread.join(10)
    assert [str(error) for error in caught] == ["the engine cannot go on: ZeroDivisionError: a bug"] * 2
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in caught)
    with pytest.raises(EngineError, match="a bug"):
        tokens(llm)
    llm.close()
    assert not llm._loop._thread.is_alive()


def test_an_output_that_cannot_be_made_fails_its_request_alone(want, monkeypatch):
    monkeypatch.setattr(frontend_module.logger, "exception", lambda *_: None)
    llm, output = shared_llm(), Reporter.output

    def broken(reporter):
        if reporter._request.prompt_token_ids == PROMPTS[3]:
            raise ZeroDivisionError("a bug")
        return output(reporter)

    monkeypatch.setattr(Reporter, "output", broken)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert isinstance(outputs[3].error, EngineError) and "ZeroDivisionError: a bug" in str(outputs[3].error)
    assert outputs[3].finished and outputs[3].prompt_token_ids == PROMPTS[3]
    assert [list(o.outputs[0].token_ids) for i, o in enumerate(outputs) if i != 3] == [*want[:3], *want[4:]]
    monkeypatch.undo()
    idle(llm)
    assert tokens(llm) == want


@pytest.mark.parametrize("when", ["submit", "result"])
@pytest.mark.parametrize("flights", [0, 1, 2])
def test_a_device_error_changes_nothing(want, when, flights):
    with fresh_llm(steps_in_flight=flights) as llm:
        runner, steps = llm._runner, []
        submit = runner.submit

        class Dead:
            def result(self):
                raise jax.errors.JaxRuntimeError("INTERNAL: the device fell over")

        def failing(inputs):
            steps.append(inputs)
            if len(steps) == 5:
                if when == "submit":
                    raise jax.errors.JaxRuntimeError("INTERNAL: the device fell over")
                submit(inputs)
                return Dead()
            return submit(inputs)

        runner.submit = failing
        assert tokens(llm) == want
        assert len(steps) > 5
        check_integrity(llm)


def test_a_request_that_the_device_fails_twice_fails_alone(want):
    with fresh_llm() as llm:
        runner = llm._runner
        submit = runner.submit
        poison = 599

        def failing(inputs):
            if poison in inputs.packed:
                raise jax.errors.JaxRuntimeError("INTERNAL: poison")
            return submit(inputs)

        runner.submit = failing
        first = llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
        [bad] = llm.generate([[poison, 5]], GREEDY, use_tqdm=False)
        assert bad.outputs[0].finish_reason == "error" and isinstance(bad.error, EngineError)
        assert "twice" in str(bad.error) and "poison" in str(bad.error)
        assert [output.outputs[0].token_ids for output in first] == want[:3]
        assert tokens(llm) == want
        check_integrity(llm)


def random_requests(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        choose = {
            "temperature": rng.choice([0.0, 0.7, 1.5]), "top_p": rng.choice([1.0, 0.9]),
            "min_p": rng.choice([0.0, 0.05]),
            "top_k": int(rng.choice([0, 9])), "presence_penalty": rng.choice([0.0, 0.5]),
            "repetition_penalty": rng.choice([1.0, 1.2]), "logprobs": rng.choice([None, None, 0, 3, -1]),
            "prompt_logprobs": rng.choice([None, None, None, 2, -1]), "n": int(rng.choice([1, 1, 1, 3])),
            "logit_bias": None if i % 5 else {7: 2.0}, "allowed_token_ids": None if i % 7 else list(range(3, 500)),
            "bad_words": () if i % 6 else ("the", "self x"), "min_tokens": int(rng.choice([0, 0, 3])),
            "stop": () if i % 4 else ("zz",), "seed": int(rng.choice([1, 2])) if i % 3 else None,
            "max_tokens": int(rng.integers(3, 12)),
        }  # fmt: skip
        length = int(rng.choice([1, 5, 20, 60, 100]))
        yield rng.integers(3, VOCAB, length).tolist(), SamplingParams(**choose)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.full)])
def test_nothing_is_compiled_after_warmup(count, capsys):
    with LLM(model_folder(), warmup=True, **OPTIONS) as llm:
        shared_llm()._runner._programs.update(llm._runner._programs)  # for the tests that come later
        assert "Compiling" in capsys.readouterr().err
        programs, used = llm._runner._programs, set()
        run = llm._runner._run
        llm._runner._run = lambda name, key, *rest: used.add((name, *key)) or run(name, key, *rest)
        prompts, params = zip(*random_requests(count))
        for start in (0, count // 3):  # with company and without
            llm.generate(list(prompts[start:]), list(params[start:]), use_tqdm=False)
        for prompt, param in list(zip(prompts, params))[:5]:
            llm.generate([prompt], param, use_tqdm=False)
        for rows in range(1, 9):  # steps that decode only
            tokens(llm, PROMPTS[:rows], [GREEDY, SamplingParams(max_tokens=9, top_k=5)][rows % 2])
        assert llm.get_metrics()["compilations_after_warmup"] == 0
        buckets = {key[1] for key in used if key[0] in ("decode", "mixed")}
        assert len(buckets) >= 6 and used <= set(programs)
        jax.jit(lambda x: x * count + 1.5)(np.ones(3)).block_until_ready()
        assert llm.get_metrics()["compilations_after_warmup"] >= 1, "the count counts"


def test_a_waiting_request_is_few_objects_for_the_collector():
    with fresh_llm() as llm:
        held, release = threading.Event(), threading.Event()
        holder = threading.Thread(target=lambda: llm._loop.call(lambda engine: held.set() or release.wait(10)))
        holder.start()
        assert held.wait(10)
        count, ended = 200, threading.Semaphore(0)

        def tell(output):
            ended.release()

        gc.collect()
        before = len(gc.get_objects())
        for request in llm.requests([[3, 4]] * count, [GREEDY] * count):
            llm.start(request, tell, every_step=False)
        grown = (len(gc.get_objects()) - before) / count
        release.set()
        holder.join()
        assert all(ended.acquire(timeout=10) for _ in range(count))
    assert grown < 4.5, "23 were enough for passes that stopped a GPU for half a second each"


def test_a_command_that_waits_while_the_engine_is_closed_is_answered():
    llm = fresh_llm()
    entered, release, submit, answers = threading.Event(), threading.Event(), llm._runner.submit, []
    llm._runner.submit = lambda inputs: entered.set() or (release.wait(10) and submit(inputs))

    def generate():
        with pytest.raises(EngineClosedError):
            llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)

    def wait_for(condition):
        deadline = time.monotonic() + 10
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert condition()

    threads = [threading.Thread(target=generate, daemon=True)]
    threads[0].start()
    assert entered.wait(10)
    loop = llm._loop
    threads += [threading.Thread(target=lambda: answers.append(loop.call(lambda engine: 7)), daemon=True)]
    threads[1].start()
    wait_for(lambda: loop._commands)
    threads += [threading.Thread(target=llm.close, daemon=True)]
    threads[2].start()
    wait_for(lambda: loop._end)
    release.set()
    for thread in threads:
        thread.join(10)
    assert answers == [7]
