"""sleep and wake_up: what is given back, that it comes back without a compilation, and what becomes of requests."""

import asyncio
import threading
import time

import jax
import numpy as np
import pytest

from jaxengine import (
    LLM,
    AsyncLLM,
    CheckpointError,
    ConfigError,
    EngineError,
    MemoryPlanError,
)
from jaxengine.engine import runner
from tests.slow_steps import slowed
from tests.test_update_weights import CONFIGS, PROMPT, SMALL, check_spans, engine, live_bytes, sampling, weights
from tests.tiny_llm import OPTIONS, check_integrity, model_folder


def bytes_of(*trees):
    return sum(array.nbytes for array in jax.tree.leaves(trees))


@pytest.fixture(scope="module")
def programs():
    with engine() as llm:
        llm.generate([PROMPT], sampling(5), use_tqdm=False)
        yield llm._runner._programs


def fresh(programs, **options):
    llm = engine(**options)
    llm._runner._programs = programs
    llm.generate([PROMPT], sampling(5), use_tqdm=False)
    return llm


@pytest.mark.parametrize("fuse_weights", [False, pytest.param(True, marks=pytest.mark.full)])
def test_each_level_gives_back_what_it_says(fuse_weights):
    sets = {which: weights(which) for which in "ab"}
    nothing = live_bytes()
    with engine(fuse_weights=fuse_weights) as llm:
        before = llm.generate([PROMPT], sampling(5), use_tqdm=False)
        device = llm._runner
        cache, slots = bytes_of(device._cache), bytes_of(device._slots, device._rules)
        own = bytes_of(device.weights.leaves) if fuse_weights else 0
        assert live_bytes() == nothing + cache + slots + own
        device.compilations.mark_warm()
        for _ in range(2):
            llm.sleep()
            assert live_bytes() == nothing + own
            llm.wake_up()
            assert live_bytes() == nothing + cache + slots + own
            llm.sleep(2)
            assert live_bytes() == nothing
            llm.wake_up(sets["a"])
            assert live_bytes() == nothing + cache + slots + own
            after = llm.generate([PROMPT], sampling(5, seed=0), use_tqdm=False)
        assert llm.get_metrics()["compilations_after_warmup"] == 0
        check_spans(before[0], {0: "a"})
        check_spans(after[0], {2: "a"})
        assert after[0].num_cached_tokens == 0
        check_integrity(llm)
    assert not any(x.is_deleted() for x in sets["a"].values())


def test_requests_in_flight_sleep_too(programs):
    with fresh(programs) as llm, slowed(llm):
        for level, spans in ((1, 1), (2, 2)):
            outputs = []
            thread = threading.Thread(
                target=lambda into=outputs: into.extend(llm.generate([PROMPT] * 6, sampling(40), use_tqdm=False))
            )
            before = llm.get_metrics()
            thread.start()
            while llm.get_metrics()["generation_tokens"] < before["generation_tokens"] + 8:
                time.sleep(0.001)
            llm.sleep(level)
            asleep = llm.get_metrics()
            assert asleep["num_requests_running"] == 0 and asleep["num_requests_waiting"] == 6
            for refused in (
                lambda: llm.generate([PROMPT], sampling(5), use_tqdm=False),
                lambda: llm.update_weights(weights("b")),
                llm.sleep,
            ):
                with pytest.raises(EngineError, match=rf"sleeps \(level {level}\): call wake_up"):
                    refused()
            assert llm.get_metrics()["generation_tokens"] == asleep["generation_tokens"]
            llm.wake_up(*([weights("b"), 9] if level == 2 else []))
            thread.join()
            assert len(outputs) == 6 and all(len(o.outputs[0].token_ids) == 40 for o in outputs)
            assert max(check_spans(output, {0: "a", 9: "b"}) for output in outputs) == spans
            check_integrity(llm)


def test_abort_and_close_while_it_sleeps(programs):
    llm = fresh(programs)
    with slowed(llm):
        stream = llm.generate([PROMPT], sampling(200), stream=True)
        request_id = next(stream).request_id
        llm.sleep()
        llm.abort([request_id])
        assert [output.outputs[0].finish_reason for output in stream][-1] == "abort"
        llm.wake_up()
        stream = llm.generate([PROMPT], sampling(200), stream=True)
        next(stream)
        llm.sleep(2)
        llm.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)


def test_wake_up_says_what_is_wrong_and_sleeps_on(programs, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with fresh(programs) as llm:
        llm.wake_up()  # awake: nothing happens
        with pytest.raises(ConfigError, match="level=3"):
            llm.sleep(3)
        llm.sleep()
        with pytest.raises(ConfigError, match=r"wake_up\(\), then update_weights"):
            llm.wake_up(weights("b"))
        with monkeypatch.context() as patch:
            patch.setattr(runner, "create_cache", fail)
            with pytest.raises(MemoryPlanError, match="still sleeps"):
                llm.wake_up()
        llm.wake_up()
        llm.sleep(2)
        with pytest.raises(ConfigError, match=r"wake_up\(params_or_path\)"):
            llm.wake_up()
        with pytest.raises(CheckpointError, match=r"missing: norm\.scale"):
            llm.wake_up({path: x for path, x in weights("b").items() if path != "norm.scale"})
        llm.wake_up(model_folder(), 3)
        [output] = llm.generate([PROMPT], sampling(5), use_tqdm=False)
        check_spans(output, {3: "a"})


@pytest.mark.parametrize("kind", ["llama", "windows"])
def test_kv_cache_memory_bytes_is_respected(kind):
    """To the last page of each group of layers, before sleep and after."""
    budget = 300_001
    with LLM(model_folder(kind), **(OPTIONS | {"kv_cache_memory_bytes": budget})) as llm:
        device = llm._runner
        pages = sum(group.page_bytes(8, "float32") for group in device.groups)
        assert budget - pages < bytes_of(device._cache) <= budget
        llm.sleep()
        llm.wake_up()
        assert budget - pages < bytes_of(device._cache) <= budget


def test_from_asyncio(programs):
    async def run():
        async with AsyncLLM(weights("a"), config=CONFIGS["llama"], **SMALL) as llm:
            llm._llm._runner._programs = programs
            await llm.sleep(2)
            await llm.wake_up(weights("b"))
            return await llm.logprobs([PROMPT])

    from tests.test_update_weights import logprobs_of

    np.testing.assert_allclose(asyncio.run(run())[0], logprobs_of("b", PROMPT), atol=1e-4)
