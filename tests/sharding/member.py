"""One of several processes that share a mesh; `test_lockstep.py` starts them. Process 0 says what it finds, as JSON."""

import json
import sys

import jax
import numpy as np

from jaxengine import LLM, JaxEngineError, SamplingParams, assembly
from tests.tiny_llm import OPTIONS, check_integrity

PREFIX = list(range(5, 45))  # with what follows, more than a step takes
PROMPTS = [[*PREFIX, 9, 10], [*PREFIX, 7], [7, 8, 9]]


def answers(llm):
    """Tokens of prompts in chunks, and from the prefix cache, greedy and seeded."""
    llm.reset_prefix_cache()
    engine, rows, hits = llm._loop._engine, [], llm.get_metrics()["prefix_cache_hits"]
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: rows.append(schedule()) or rows[-1]
    found = []
    for params in ({"temperature": 0}, {"temperature": 0.9, "seed": 3}):
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False, **params)
        for prompt in PROMPTS:
            found += llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids
    engine.scheduler.schedule = schedule
    assert any((~step.samples[step.count > 1]).any() for step in rows), "prompts came in chunks"
    assert llm.get_metrics()["prefix_cache_hits"] > hits
    check_integrity(llm)
    return found


def all_at_once(llm):
    """What every kind of request gives, with work for all shards: tokens, and log-probabilities to compare."""
    common = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "detokenize": False}
    asked = [{}, {"logprobs": 2, "prompt_logprobs": 1}, {"logprobs": -1, "prompt_logprobs": -1},
             {"temperature": 0.9, "seed": 3, "n": 2, "repetition_penalty": 1.2}]  # fmt: skip
    tokens, numbers = [], []
    prompts = [*PROMPTS, [11, 12], *([6, *prompt] for prompt in PROMPTS)]
    for params in asked:
        for output in llm.generate(prompts, SamplingParams(**common | params), use_tqdm=False):
            tokens += [list(completion.token_ids) for completion in output.outputs]
            if "logprobs" in params:
                rows = [output.outputs[0].logprobs.logprobs, output.prompt_logprobs.logprobs[1:]]
                numbers += np.concatenate(rows).ravel().tolist()
    numbers += llm.embed(prompts, use_tqdm=False).ravel().tolist()
    numbers += [score.logprob for score in llm.score([([5, 6], [7, 8]), ([9], [10])], use_tqdm=False)]
    check_integrity(llm)
    return tokens, numbers


def held(llm):
    """Bytes of weights and cache that this process has, of all."""
    arrays = jax.tree.leaves((llm._runner.weights.leaves, llm._runner._cache))
    mine = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return mine, sum(array.nbytes for array in arrays)


def say(value):
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def check_refused(message, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except JaxEngineError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{function} went through")


def lead(llm, task, model, other):
    say({"answers": answers(llm), "held": held(llm), "pages": llm._runner.num_pages})
    match task:
        case "forever":
            while True:
                llm.generate([[7, 8, 9]], SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False)
        case "weights":
            check_refused("give its path", llm.update_weights, {})
            check_refused("other than the first", llm.follow)
            check_refused("have an engine already", LLM, model, tensor_parallel_size=jax.device_count())
            for in_place in (False, True):
                llm.update_weights(other, in_place=in_place)
                say({"answers": answers(llm)})
            llm.sleep(2)
            llm.wake_up(other)
            say({"answers": answers(llm), "versions": llm.get_metrics()["weight_version"]})
        case "all at once":
            for path in (None, *json.loads(other)):
                if path is not None:
                    llm.update_weights(path)
                tokens, numbers = all_at_once(llm)
                hits = [shard.prefix_hits for shard in llm._loop._engine.scheduler.shards]
                say({"tokens": tokens, "numbers": numbers, "hits": hits})
        case "bug of the leader":
            raise KeyError("a bug of the leader")


def follow(llm, task):
    if task == "bug of a follower":
        submit, steps = llm._loop._commands["submit"], []

        def broken(inputs):
            steps.append(inputs)
            if len(steps) > 5:
                raise IndexError("a bug of a follower")
            return submit(inputs)

        llm._loop._commands["submit"] = broken
    for method, *arguments in ((llm.generate, [[7]]), (llm.get_metrics,), (llm.update_weights, "x"), (llm.sleep,)):
        check_refused("call follow() here", method, *arguments)
    llm.follow()


def main(rank, count, address, task, model, other, sizes):
    # A machine may pause its tests for longer than the heartbeat of `processes.initialize`.
    jax.distributed.initialize(address, int(count), int(rank), heartbeat_timeout_seconds=200)
    options = OPTIONS | json.loads(sizes)
    if int(rank) == 1 and task == "another config":
        options["page_size"] = 16
    if int(rank) == 1:  # it has less memory than process 0
        plan = assembly.plan_pages
        assembly.plan_pages = lambda *arguments: tuple(count - 7 for count in plan(*arguments))
    llm = LLM(model, **options)
    if task == "a follower leaves":  # without closing anything
        lead(llm, "forever", model, other) if int(rank) == 0 else divmod(1, 0)
    with llm:
        if jax.process_index():
            follow(llm, task)
        else:
            lead(llm, task, model, other)


if __name__ == "__main__":
    main(*sys.argv[1:])
