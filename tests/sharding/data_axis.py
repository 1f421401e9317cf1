"""The data axis on eight simulated devices, alone and with tensor parallelism; `test_sharding.py` starts it."""

import math
import re
from functools import cache, partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from jaxengine import LLM, ConfigError, SamplingParams, UnsupportedError
from jaxengine.evaluate.answering import Answering
from jaxengine.sharding import axis_size, create_mesh
from jaxengine.step import unpack
from tests.sharding.eight_devices import COLLECTIVE, CONFIGS, SMALL, VOCAB, check_collectives, params
from tests.tiny_llm import check_integrity, restrict

PAGES = 12  # of each shard: fewer than its requests need
full = pytest.mark.full
COMMON = {"max_tokens": 12, "ignore_eos": True, "detokenize": False}
ASKED = [
    SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, **COMMON),
    SamplingParams(temperature=0, **COMMON),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=5, **COMMON),
    SamplingParams(temperature=1.2, repetition_penalty=1.1, logit_bias={7: 2.0}, allowed_token_ids=list(range(3, 500)),
                   seed=6, **COMMON),
]  # fmt: skip


def make_llm(family, data=1, tensor=1, expert=1, **options):
    sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor, "expert_parallel_size": expert,
             "fuse_weights": True}  # fmt: skip
    llm = LLM(params(family), config=CONFIGS[family], **(SMALL | sizes | options))
    llm._runner.prompt_chunk = 12  # several a step
    return llm


def prompts(count):
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(3, VOCAB, 24).tolist() for _ in range(2)]
    return [prefixes[i % 2] + rng.integers(3, VOCAB, 3 + 7 * (i % 6)).tolist() for i in range(count)]


def answers(llm, count):
    """Tokens and log-probabilities of prompts with common prefixes, in chunks, with fewer pages than they need."""
    restrict(llm, pages=PAGES)
    seen, submit = [], llm._runner.submit
    llm._runner.submit = lambda inputs: seen.append(inputs) or submit(inputs)
    found = [llm.generate(prompts(count), params, use_tqdm=False) for params in ASKED]
    llm._runner.submit = submit
    check_integrity(llm)
    check_it_happened(llm, seen)
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in found]
    logprobs = [output.outputs[0].logprobs.logprobs for output in found[0]]
    logprobs += [output.prompt_logprobs.logprobs[1:] for output in found[0]]
    return tokens, np.concatenate(logprobs)


def check_it_happened(llm, steps):
    """Hits, preemptions and chunks on every shard, whose own pages were written, and steps in which all had rows."""
    runner, schedulers = llm._runner, llm._loop._engine.scheduler.shards
    assert len(schedulers) == runner.shards
    assert min(min(shard.num_preemptions, shard.prefix_hits) for shard in schedulers) > 0
    parts = [(step, np.split(step.packed, runner.shards)) for step in steps]
    rows = [[(unpack(s.kind, s.bucket, part)["lengths"] > 0).sum() for part in parts] for s, parts in parts]
    assert sum(min(counts) > 0 for counts in rows) > len(steps) / 4, rows
    mixed = [(s.bucket, own) for s, own in parts if s.kind == "mixed"]
    chunks = [[unpack("mixed", bucket, part)["q_len"].max() for part in own] for bucket, own in mixed]
    assert (np.max(chunks, axis=0) > 1).all()
    for shard in runner._cache.k[0].addressable_shards:
        assert (np.abs(np.asarray(shard.data)).sum(axis=(1, 2, 3)) > 0).sum() >= PAGES - 2
        assert not np.asarray(shard.data)[0].any(), "each shard has a null page"


@cache
def alone(family, count):
    with make_llm(family) as llm:
        return answers(llm, count)


@pytest.mark.parametrize(
    ("family", "data", "tensor", "expert"),
    [
        ("qwen3", 2, 2, 1),
        *(pytest.param(*case, marks=full) for case in [
            ("qwen3", 2, 1, 1), ("qwen3", 4, 2, 1), ("qwen3", 2, 4, 1), ("qwen3", 8, 1, 1), ("mistral", 2, 2, 1),
            ("gpt2", 4, 2, 1), ("qwen2", 2, 4, 1), ("llama", 4, 1, 1), ("qwen3_moe", 2, 1, 1), ("qwen3_moe", 2, 2, 2),
            ("gpt_oss", 2, 2, 2),
        ]),
    ],
)  # fmt: skip
def test_the_same_answers_as_one_device(family, data, tensor, expert):
    count = 6 * data
    want, want_logprobs = alone(family, count)
    with make_llm(family, data, tensor, expert) as llm:
        tokens, logprobs = answers(llm, count)
        assert tokens == want
        np.testing.assert_allclose(logprobs, want_logprobs, atol=1e-4)
        check_places(llm, create_mesh(tensor, data, expert=expert))
        check_groups(llm, data, tensor, expert)
        if tensor * expert > 1:
            check_collectives(llm)


def check_places(llm, mesh):
    """Pages, slots and hidden states lie on their shard, weights on all, after steps too."""
    runner, data = llm._runner, mesh.shape["data"]
    for array in jax.tree.leaves((runner._cache, runner._slots, runner._rules)):
        axis = 1 if array is runner._slots.tables else 0
        assert array.addressable_shards[0].data.shape[axis] * data == array.shape[axis]
    for leaf, spec in zip(runner.weights.leaves, runner.weights.specs, strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
        parts = math.prod(axis_size(mesh, axis) for axis in spec)  # biases of down_proj: as many as groups of experts
        assert parts == (mesh.size // data if any(spec) else 1) or tuple(spec) == ("expert", None)
        assert leaf.addressable_shards[0].data.nbytes * parts == leaf.nbytes


def check_groups(llm, data, tensor, expert=1):
    """No collective crosses the data axis, but where all shards compute what one was asked for."""
    programs = [program for key, program in llm._runner._programs.items() if key[0] != "prompt_vocab"]
    lines = [line for program in programs for line in program.as_text().splitlines()]
    found = [re.search(r"replica_groups=(mesh\S+ \{.*?\})", line) for line in lines if COLLECTIVE.search(line)]
    groups = {match and match[1] for match in found}
    assert groups == (
        {f"mesh['data'={data},'stage'=1,'expert'={expert},'tensor'={tensor}] {{'expert','tensor'}}"}
        if tensor * expert > 1
        else set()
    )


def outcomes(llm):
    """What the rarer kinds of requests give, and commands between them."""
    first, *others = prompts(5)
    whole = SamplingParams(temperature=0, logprobs=-1, prompt_logprobs=-1, max_tokens=2, detokenize=False)
    plain = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False)
    words = SamplingParams(temperature=0, max_tokens=9, min_tokens=4, stop_token_ids=list(range(3, VOCAB, 3)),
                           presence_penalty=0.5, frequency_penalty=0.5, n=2, detokenize=False)  # fmt: skip
    ask = partial(llm.generate, use_tqdm=False)
    found = {"embed": llm.embed([first, *others], pooling="mean"), "cls": llm.embed(others, pooling="cls")}
    for name, outputs in (("whole", ask([first, *others], whole)), ("words", ask([first, *others], words))):
        found[name] = [list(completion.token_ids) for output in outputs for completion in output.outputs]
        if name == "whole":
            rows = [row for output in outputs for row in output.prompt_logprobs.logprobs[1:]]
            found["logprobs"] = np.array(
                [*rows, *(x for output in outputs for x in output.outputs[0].logprobs.logprobs)]
            )
    found["score"] = np.array(
        [score.logprob for score in llm.score([(first, part) for part in others], use_tqdm=False)]
    )

    def tokens():
        return [output.outputs[0].token_ids for output in ask([first, *others], plain)]

    found["plain"] = tokens()
    stream = llm.generate([first], SamplingParams(temperature=0, max_tokens=60, detokenize=False), stream=True)
    next(stream)
    stream.close()
    llm.sleep()
    llm.wake_up()
    found["woken"] = tokens()
    submit, calls = llm._runner.submit, []

    def failing(inputs):
        calls.append(inputs)
        if len(calls) == 3:
            raise jax.errors.JaxRuntimeError("INTERNAL: a failure of the device")
        return submit(inputs)

    llm._runner.submit = failing
    found["recovered"] = tokens()
    llm._runner.submit = submit
    llm.update_weights({path: array[..., ::-1] for path, array in params("qwen3").items()})
    found["updated"] = tokens()
    check_integrity(llm)
    assert found["plain"] == found["woken"] == found["recovered"] != found["updated"] and len(calls) > 3
    return found


@full
def test_everything_else_gives_the_same_too():
    options = {"steps_per_call": 4, "max_num_batched_tokens": 32}
    with make_llm("qwen3", **options) as llm:
        want = outcomes(llm)
    with make_llm("qwen3", data=2, **options) as llm:
        found = outcomes(llm)
        check_groups(llm, 2, 1)
        assert all(len(shard.slots.free) == 4 and shard.prefix_queries for shard in llm._loop._engine.scheduler.shards)
        assert any(key[0] == "decode" and key[1].steps == 4 for key in llm._runner._programs)
    for name, values in want.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(found[name], values, atol=1e-4, err_msg=name)
        else:
            assert found[name] == values, name


def test_a_mesh_of_ones_own():
    devices = np.array(jax.devices()[4:8]).reshape(2, 1, 2)
    ask = [[5, 6, 7, 8]] * 4, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, detokenize=False)
    with LLM(
        params("llama"), config=CONFIGS["llama"], mesh=Mesh(devices, ("tensor", "replica", "data")), **SMALL
    ) as llm:
        llm._runner._gathers, submit, flights = True, llm._runner.submit, []  # as of several processes
        llm._runner.submit = lambda inputs: flights.append(submit(inputs)) or flights[-1]
        llm._runner.prompt_chunk = 1  # of a prompt's three that are asked for
        outputs = llm.generate(*ask, use_tqdm=False)
        assert len({output.outputs[0].token_ids[1] for output in outputs}) == 1
        asked = np.array([output.prompt_logprobs.logprobs for output in outputs])
        assert asked.shape == (4, 3) and (asked < 0).all() and np.ptp(asked, axis=0).max() < 1e-5
        assert (llm.config.data_parallel_size, llm.config.tensor_parallel_size) == (2, 2)
        told = [array for flight in flights for array in jax.tree.leaves(flight._arrays)]
        assert told and all(array.is_fully_replicated for array in told), "any process can read it"
        [pool, *_] = llm._runner._cache.k
        assert pool.sharding.mesh.devices[:, 0, 0].tolist() == devices[:, 0].T.tolist()


def test_prompts_of_an_iterable_and_lines_of_a_batch_are_enough_for_all_shards():
    ask = SamplingParams(temperature=0, max_tokens=3, detokenize=False)
    with make_llm("llama", data=4) as llm:
        submit, waiting = llm._runner.submit, []
        llm._runner.submit = lambda inputs: waiting.append(llm._loop.num_requests) or submit(inputs)
        llm.generate(([i + 5, 6] for i in range(50)), ask, use_tqdm=False)
        assert max(waiting) == Answering(llm, {}, ["a model"]).ahead == 2 * 4 * SMALL["max_num_seqs"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data_parallel_size": 3, "tensor_parallel_size": 4}, ConfigError, "needs 12 devices, there are 8"),
        ({"data_parallel_size": 0}, ConfigError, "data_parallel_size=0 must be a positive integer"),
        (
            {"mesh": ("data", "replica")},
            UnsupportedError,
            "only the axes data, stage, expert, tensor may have several devices",
        ),
        ({"mesh": ("data", "tensor"), "data_parallel_size": 4}, ConfigError, "left out, or the 2 of the mesh"),
    ],
)
def test_what_is_refused(options, error, message):
    if "mesh" in options:
        options = options | {"mesh": jax.make_mesh((2, 2), options["mesh"])}
    with pytest.raises(error, match=message):
        LLM(params("qwen2"), config=CONFIGS["qwen2"], **SMALL, **options)
