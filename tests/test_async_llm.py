"""AsyncLLM: many callers in one event loop, or in one after another."""

import asyncio
import threading

import pytest

from jaxengine import AsyncLLM, EngineClosedError, RequestError, SamplingParams
from tests.tiny_llm import OPTIONS, check_integrity, model_folder, shared_llm

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENDLESS = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    llm = new_engine()
    yield llm
    asyncio.run(llm.close())


def new_engine():
    llm = AsyncLLM(model_folder(), **OPTIONS)
    llm._llm._runner._programs = shared_llm()._runner._programs
    return llm


async def last(outputs):
    found = None
    async for output in outputs:
        found = output
    return found


async def idle(llm):
    for _ in range(500):
        metrics = await llm.get_metrics()
        if not metrics["num_requests_running"] + metrics["num_requests_waiting"]:
            return
        await asyncio.sleep(0.01)


def want(prompts):
    return [o.outputs[0].token_ids for o in shared_llm().generate(prompts, GREEDY, use_tqdm=False)]


def test_many_at_once(engine):
    prompts = [[i + 3] * (i + 1) for i in range(30)]

    async def main():
        return await asyncio.gather(*(last(engine.generate(prompt, GREEDY)) for prompt in prompts))

    for _ in range(2):  # two event loops, one after another
        outputs = asyncio.run(main())
        assert [output.outputs[0].token_ids for output in outputs] == want(prompts)
        assert all(output.finished for output in outputs)
    check_integrity(engine._llm)


def test_kinds_of_output(engine):
    async def collect(kind):
        params = SamplingParams(temperature=0, max_tokens=8, output_kind=kind)
        return [output.outputs[0] async for output in engine.generate("hello", params)]

    for kind in ("cumulative", "delta", "final_only"):
        found = asyncio.run(collect(kind))
        ids = [token for c in found for token in c.token_ids] if kind == "delta" else found[-1].token_ids
        assert [ids] == want(["hello"])
        assert len(found) == (1 if kind == "final_only" else 8)


def test_cancelling_frees_everything(engine):
    async def main():
        tasks = [asyncio.create_task(last(engine.generate([i + 3, 9], ENDLESS))) for i in range(20)]
        await asyncio.sleep(0.05)
        assert (await engine.get_metrics())["num_requests_running"] > 0
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await idle(engine)
        assert (await engine.get_metrics())["request_success"]["abort"] >= 8

    asyncio.run(main())
    check_integrity(engine._llm)


def test_leaving_early_and_aborting(engine):
    async def aborted():
        return (await engine.get_metrics())["request_success"].get("abort", 0)

    async def main():
        before = await aborted()
        async for _ in engine.generate("hello", ENDLESS):
            break
        await idle(engine)
        assert await aborted() == before + 1
        outputs = engine.generate("hello", ENDLESS, request_id="mine")
        await anext(outputs)
        engine.abort("mine")
        output = await last(outputs)
        assert output.finished and output.outputs[0].finish_reason == "abort"
        engine.abort("unknown")

    asyncio.run(main())
    check_integrity(engine._llm)


def test_a_loop_that_is_closed_while_requests_run(engine):
    async def main():
        await anext(engine.generate("hello", ENDLESS))

    asyncio.run(main())  # its generator is left to the loop's end
    asyncio.run(idle(engine))
    check_integrity(engine._llm)


def test_request_ids(engine):
    async def main():
        first = engine.generate("hello", ENDLESS, request_id="one")
        assert (await anext(first)).request_id == "one"
        with pytest.raises(RequestError, match="request_id='one' is in use"):
            await anext(engine.generate("hello", GREEDY, request_id="one"))
        assert not (await anext(first)).finished, "the first one goes on"
        await first.aclose()
        await idle(engine)
        assert (await last(engine.generate("hello", GREEDY, request_id="one"))).request_id == "one"
        with pytest.raises(RequestError, match="no tokens"):
            await anext(engine.generate("", GREEDY))

    asyncio.run(main())


def test_chat_encode_and_the_cache(engine):
    chat = [{"role": "user", "content": "hi"}]

    async def main():
        answer = await last(engine.chat(chat, GREEDY))
        text = engine.get_tokenizer().apply_chat_template(chat)
        assert answer.prompt == text and [answer.outputs[0].token_ids] == want([text])
        assert engine.encode("a") == shared_llm().encode("a")
        assert engine.get_default_sampling_params() == SamplingParams()
        prompt = [5] * 20
        await last(engine.generate(prompt, GREEDY))
        assert (await last(engine.generate(prompt, GREEDY))).num_cached_tokens == 16
        await engine.reset_prefix_cache()
        assert (await last(engine.generate(prompt, GREEDY))).num_cached_tokens == 0

    asyncio.run(main())


def test_two_event_loops_in_two_threads(engine):
    found = {}

    def run(name, prompt):
        found[name] = asyncio.run(last(engine.generate(prompt, GREEDY))).outputs[0].token_ids

    threads = [threading.Thread(target=run, args=(i, [i + 3] * 9)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == want([[i + 3] * 9 for i in range(4)])


def test_close():
    async def main():
        async with new_engine() as llm:
            running = [asyncio.create_task(last(llm.generate([i + 3], ENDLESS))) for i in range(12)]
            await anext(llm.generate("hello", ENDLESS))
        results = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(result, EngineClosedError) for result in results)
        with pytest.raises(EngineClosedError):
            await anext(llm.generate("hello", GREEDY))
        with pytest.raises(EngineClosedError):
            await llm.get_metrics()
        await llm.close()

    asyncio.run(main())


def test_llm_within_a_running_loop():
    async def main():
        return shared_llm().generate(["hello"], GREEDY, use_tqdm=False)

    assert [output.outputs[0].token_ids for output in asyncio.run(main())] == want(["hello"])
