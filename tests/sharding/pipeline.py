"""Stages of a pipeline on eight simulated devices, alone and with other axes; `test_sharding.py` starts it."""

import re
from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from jaxengine import LLM, ConfigError, SamplingParams
from jaxengine.errors import WeightsDeletedError
from jaxengine.step import unpack
from tests.programs import check_memory, pool_copies
from tests.sharding import data_axis, eight_devices
from tests.sharding.eight_devices import COLLECTIVE
from tests.tiny_llm import OPTIONS

full = pytest.mark.full
LAYERS = 4
CONFIGS = {
    family: config | {"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS}
    for family, config in eight_devices.CONFIGS.items()
}
CONFIGS["qwen3_moe"] |= {"mlp_only_layers": [0, 2]}  # so that two stages are alike
CONFIGS["mixtral"] |= {"sliding_window": None}  # with one there are pages enough, and no preemptions
SMALL = OPTIONS | {"max_num_seqs": 4, "fuse_weights": True, "steps_per_call": 2}
GREEDY = {"temperature": 0, "ignore_eos": True, "detokenize": False}


@cache
def params(family):
    return eight_devices.random_params(CONFIGS[family])


def make_llm(family, stages=1, data=1, tensor=1, expert=1, **options):
    sizes = {"pipeline": stages, "data": data, "tensor": tensor, "expert": expert}
    sizes = {f"{axis}_parallel_size": size for axis, size in sizes.items()}
    return LLM(params(family), config=CONFIGS[family], **(SMALL | sizes | options))


def answers(llm, count):
    """Those of `data_axis`, after some for which there are pages enough, so that calls draw several tokens."""
    ask = data_axis.prompts(count)[: count // 2]
    several = llm.generate(ask, SamplingParams(**GREEDY, max_tokens=8), use_tqdm=False)
    tokens, logprobs = data_axis.answers(llm, count)
    return [[output.outputs[0].token_ids for output in several], *tokens], logprobs


@cache
def alone(family, count):
    with make_llm(family) as llm:
        return answers(llm, count)


def ask(llm, *prompts):
    outputs = llm.generate(list(prompts), SamplingParams(**GREEDY, max_tokens=6), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_two_stages():
    with make_llm("llama", max_num_seqs=2) as llm:
        want = ask(llm, *data_axis.prompts(2))
    with make_llm("llama", 2, max_num_seqs=2) as llm:
        steps = watched(llm)
        assert ask(llm, *data_axis.prompts(2)) == want
        check_parts(llm, steps)
        check_places(llm, 2, 1, 1)
        check_collectives(llm, 2, 1)


@full
@pytest.mark.parametrize(
    ("family", "stages", "data", "tensor", "expert"),
    [
        ("qwen3", 2, 1, 1, 1), ("llama", 4, 1, 1, 1), ("qwen3", 2, 2, 2, 1), ("qwen3", 2, 1, 2, 1),
        ("qwen2", 4, 1, 2, 1), ("mistral", 2, 2, 1, 1), ("gpt2", 4, 2, 1, 1), ("mixtral", 2, 1, 2, 2),
        ("qwen3_moe", 2, 1, 1, 2), ("gpt_oss", 2, 1, 2, 2),
    ],
)  # fmt: skip
def test_the_same_answers_as_one_device(family, stages, data, tensor, expert):
    count = 6 * data
    want, want_logprobs = alone(family, count)
    with make_llm(family, stages, data, tensor, expert) as llm:
        steps = watched(llm)
        tokens, logprobs = answers(llm, count)
        assert tokens == want
        np.testing.assert_allclose(logprobs, want_logprobs, atol=1e-4)
        check_parts(llm, steps)
        check_places(llm, stages, data, tensor * expert)
        check_collectives(llm, stages, tensor * expert)
        check_no_copies(llm)


def watched(llm):
    """The inputs of its steps, as they come."""
    steps, submit = [], llm._runner.submit
    llm._runner.submit = lambda inputs: steps.append(inputs) or submit(inputs)
    return steps


def check_parts(llm, steps):
    """Chunks of prompts began in one part of a step and ended in the next; calls drew two tokens of several rows."""
    size, shards = llm._runner.buckets.microbatch, llm._runner.shards
    mixed = [(step.bucket, np.split(step.packed, shards)) for step in steps if step.kind == "mixed"]
    fields = [unpack("mixed", bucket, part) for bucket, parts in mixed for part in parts]
    if llm.model_config.experts is None:  # with experts a part is as large as these steps
        assert any(((f["q_start"] < size) & (f["q_start"] + f["q_len"] > size)).any() for f in fields)
    assert any(step.kind == "decode" and step.bucket.steps == 2 <= step.bucket.rows for step in steps)


def check_places(llm, stages, data, devices):
    """A device has the weights and the pages of its stage's layers and of no others, after steps too."""
    runner, mesh = llm._runner, llm._runner.mesh
    assert len(runner._cache.k) == LAYERS // stages
    for pool, group in zip(jax.tree.leaves(runner._cache), 2 * runner.layer_group, strict=True):  # all of K, then of V
        kv_heads = max(runner.model.num_kv_heads // devices, 1) * devices
        pages = runner.num_pages[group]
        assert pool.nbytes == data * stages * pages * kv_heads * SMALL["page_size"] * runner.model.head_dim * 4
        assert all(shard.data.nbytes * mesh.size == pool.nbytes for shard in pool.addressable_shards)
    held = 0
    for leaf, spec in zip(runner.weights.leaves, runner.weights.specs, strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
        if spec and spec[0] and "stage" in spec[0]:
            held += leaf.addressable_shards[0].data.nbytes
    all_ = sum(x.nbytes for path, x in params(runner.model.model_type).items() if path.startswith("layers."))
    share = held * stages * devices / all_
    assert share == 1 if devices == 1 else 1 < share < 1.4, "norms and routers are whole, KV heads may be repeated"


def check_collectives(llm, stages, devices):
    """In each tick hidden states are handed on once; then the last stage's, or the tokens drawn, are given to all.

    No weight and no page moves, and no tick has code of its own.
    """
    found, groups = {}, set()
    for (name, *key), program in llm._runner._programs.items():
        text = program.as_text()
        counts = found.setdefault(
            (name, key[1] if name in ("decode", "head") else None), Counter(COLLECTIVE.findall(text))
        )
        assert counts == Counter(COLLECTIVE.findall(text))
        groups |= set(re.findall(r"'stage'=\d,'expert'=\d,'tensor'=\d\] (\{.*?\})", text))
    split = devices > 1
    model = split * (2 * LAYERS // stages + 1)
    drawn = {"greedy": split * 2, "sampled": split * 6}
    wanted = {("mixed", None): {"all-reduce": model + 1, "collective-permute": 1}}
    wanted |= {("decode", mode): {"all-reduce": model + n + 1, "collective-permute": 1} for mode, n in drawn.items()}
    wanted |= {("head", mode): {"all-reduce": n} for mode, n in drawn.items()}
    wanted |= {("head", "everything"): {"all-gather": split}, ("prompt", None): {"all-gather": split}}
    wanted |= {(name, None): {} for name in ("prompt_rows", "write_slots", "write_rules")}
    assert found == {name: Counter(wanted[name]) for name in found}
    assert {name for name, _ in found} >= {"mixed", "decode", "head"}
    assert groups == ({"{'stage'}", "{'expert','tensor'}"} if split else {"{'stage'}"})


def check_no_copies(llm):
    """Ticks write to the cache where it is."""
    own = [pool.addressable_shards[0].data for pool in jax.tree.leaves(llm._runner._cache)]
    programs = {key: program for key, program in llm._runner._programs.items() if key[0] in ("decode", "mixed")}
    assert {key[0] for key in programs} == {"decode", "mixed"}
    assert not {key: lines for key, program in programs.items() if (lines := pool_copies(program, own))}


@full
def test_new_weights_and_sleep():
    other = {path: array[..., ::-1] for path, array in params("qwen3").items()}
    found = []
    for stages in (1, 2):
        with make_llm("qwen3", stages) as llm:
            tokens = [ask(llm, [5, 6, 7])]
            for in_place in (False, True):
                llm.update_weights(other, in_place=in_place)
                tokens.append(ask(llm, [5, 6, 7]))
            llm.sleep(2)
            llm.wake_up(params("qwen3"))
            found.append([*tokens, ask(llm, [5, 6, 7])])
    before, *after, again = found[0]
    assert found[0] == found[1] and before == again and after == [after[0]] * 2 != [before] * 2


@full
def test_embeddings_and_the_whole_vocabulary():
    """What reads hidden states of many tokens, in a step of several parts."""
    prompts, found = data_axis.prompts(3), []
    whole = SamplingParams(**GREEDY, logprobs=-1, prompt_logprobs=-1, max_tokens=2)
    for stages in (1, 4):
        with make_llm("llama", stages) as llm:
            outputs = llm.generate(prompts, whole, use_tqdm=False)
            rows = [row for output in outputs for row in output.prompt_logprobs.logprobs[1:]]
            rows += [row for output in outputs for row in output.outputs[0].logprobs.logprobs]
            found.append((np.array(rows), llm.embed(prompts, pooling="mean")))
    for one, several in zip(*found, strict=True):
        np.testing.assert_allclose(several, one, atol=1e-4)


@full
def test_parameters_that_lie_on_their_stage_are_borrowed():
    devices = jax.devices()[:2]
    theirs = {
        path: jax.device_put(array, devices[int(path.split(".")[1]) // 2 if path.startswith("layers.") else 0])
        for path, array in params("llama").items()
    }
    with make_llm("llama", fuse_weights=True) as llm:
        want = ask(llm, [5, 6])
    with LLM(theirs, config=CONFIGS["llama"], **SMALL | {"pipeline_parallel_size": 2, "fuse_weights": None}) as llm:
        assert ask(llm, [5, 6]) == want
        kernel = theirs["layers.3.mlp.up_proj.kernel"]
        pointers = {
            s.data.unsafe_buffer_pointer() for leaf in llm._runner.weights.leaves for s in leaf.addressable_shards
        }
        assert kernel.unsafe_buffer_pointer() in pointers, "not copied"
        kernel.delete()
        with pytest.raises(WeightsDeletedError):
            ask(llm, [5, 6])


@full
def test_a_mesh_of_ones_own():
    devices = np.array(jax.devices()[4:8]).reshape(2, 2)
    with make_llm("llama") as llm:
        want = ask(llm, [5, 6])
    with make_llm("llama", mesh=Mesh(devices, ("tensor", "stage"))) as llm:
        assert ask(llm, [5, 6]) == want
        assert llm._runner.mesh.devices[0, :, 0].tolist() == devices.T.tolist()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {"stages": 3}, r"=3 does not divide num_layers=4 into stages that are alike; use one of \[1, 2, 4\]"),
        ("qwen3_moe", {"stages": 4}, r"num_layers=4 .* \(layers differ in experts\); use one of \[1, 2\]"),
        ("qwen2", {"stages": 4, "tensor": 4}, "needs 16 devices, there are 8"),
        ("qwen2", {"stages": 0}, "pipeline_parallel_size=0 must be a positive integer"),
    ],
)
def test_what_is_refused(family, options, message):
    with pytest.raises(ConfigError, match=message):
        make_llm(family, **options)


@full
def test_each_program_stays_within_the_planned_memory():
    with make_llm("qwen2", 2, max_num_seqs=2, warmup=True) as llm:
        check_memory(llm._runner)
        ask(llm, *data_axis.prompts(2))
        assert llm.get_metrics()["compilations_after_warmup"] == 0
