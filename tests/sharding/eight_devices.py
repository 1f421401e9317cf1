"""Tensor and expert parallelism on eight simulated devices; `test_sharding.py` starts it."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from converters.gguf_reader import GgufFile
from jaxengine import LLM, ConfigError, SamplingParams, UnsupportedError
from jaxengine.errors import WeightsDeletedError
from jaxengine.handoff.rollout import Rollout
from jaxengine.kv_cache import AXES
from jaxengine.layers.linear import Linear
from jaxengine.layers.peers import create_peers, linked, own, peer_rows, peers_sharding
from jaxengine.models import param_specs
from jaxengine.models.llama import Residual, run_layer
from jaxengine.sharding import LAYER, STAGE, TENSOR, ParamSpec, create_mesh, gather, named_sharding, on_each_device
from jaxengine.weights import dummy, load_params, open_checkpoint
from jaxengine.weights.checkpoint import read_config
from tests.models import test_gpt_oss
from tests.models import test_whole_layers as whole_layers
from tests.references import gguf_files, tiny
from tests.tiny_llm import OPTIONS, check_integrity, model_folder, restrict

VOCAB, HEADS = 601, 8  # no number of devices divides the vocabulary
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "num_key_value_heads": 1},
    "mistral": SIZES | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 40},
    "qwen2": SIZES | {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": SIZES | {"model_type": "qwen3", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": SIZES | {"model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 8,
                        "sliding_window": 40},
    "qwen3_moe": SIZES | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts": 8, "norm_topk_prob": True,
                          "num_experts_per_tok": 3, "moe_intermediate_size": 48, "mlp_only_layers": [0],
                          "tie_word_embeddings": True},
    "gpt_oss": SIZES | {"model_type": "gpt_oss", "num_key_value_heads": 4, "num_local_experts": 8,
                        "num_experts_per_tok": 3, "swiglu_limit": 1.0, "sliding_window": 40},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_head": HEADS, "n_layer": 2, "n_positions": 128,
             "vocab_size": VOCAB, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 1,
             "eos_token_id": 2},
}  # fmt: skip
SMALL = OPTIONS | {"max_num_seqs": 4}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
full = pytest.mark.full


def random_params(config):
    return {
        path: tiny.STD * tiny.uniform(path, np.prod(spec.shape)).reshape(spec.shape) + path.endswith(".scale")
        for path, spec in param_specs(read_config(config, "float32", ())).items()
    }


@cache
def params(family):
    return random_params(CONFIGS[family])


def make_llm(family, devices, experts=1, **options):
    config = {"tensor_parallel_size": devices, "expert_parallel_size": experts, "fuse_weights": True} | options
    return LLM(params(family), config=CONFIGS[family], **(SMALL | config))


def answers(llm):
    """Tokens and log-probabilities of prompts with a common prefix, in chunks, with fewer pages than they need."""
    rng, rows = np.random.default_rng(0), []
    prefix = rng.integers(3, VOCAB, 24).tolist()
    prompts = [prefix + rng.integers(3, VOCAB, length).tolist() for length in (6, 17, 9, 38)]
    restrict(llm, pages=20 if llm.model_config.windows[0] is None else 16)  # a window frees what is behind it
    schedule = llm._loop._engine.scheduler.schedule
    llm._loop._engine.scheduler.schedule = lambda: rows.append(schedule()) or rows[-1]
    common = {"max_tokens": 16, "ignore_eos": True, "detokenize": False}
    found = []
    for params in (
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, **common),
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=5, **common),
        SamplingParams(temperature=1.2, repetition_penalty=1.1, logit_bias={7: 2.0}, seed=6, **common),
    ):
        found.append(llm.generate(prompts, params, use_tqdm=False))
    metrics = llm.get_metrics()
    assert min(metrics["num_preemptions"], metrics["prefix_cache_hits"]) > 0, metrics
    assert any((~step.samples[step.count > 1]).any() for step in rows), "prompts came in chunks"
    check_integrity(llm)
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in found]
    logprobs = [output.outputs[0].logprobs.logprobs for output in found[0]]
    logprobs += [output.prompt_logprobs.logprobs[1:] for output in found[0]]
    return tokens, np.concatenate(logprobs)


@cache
def alone(family):
    with make_llm(family, 1) as llm:
        assert len(llm._runner.weights.leaves[0].sharding.device_set) == 1
        return answers(llm)


def check_answers(family, llm):
    (want, want_logprobs), (tokens, logprobs) = alone(family), answers(llm)
    assert tokens == want
    np.testing.assert_allclose(logprobs, want_logprobs, atol=1e-4)


def check_places(llm, mesh):
    """Weights and cache lie where programs want them, after steps too."""
    runner, devices = llm._runner, mesh.size
    pools = jax.tree.leaves(runner._cache)
    assert {pool.sharding for pool in pools} == {named_sharding(mesh, AXES)}
    kv_heads = runner.model.num_kv_heads
    assert pools[0].addressable_shards[0].data.shape[1] == max(1, kv_heads // devices)
    for leaf, spec in zip(runner.weights.leaves, runner.weights.specs, strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    matrices = [leaf for leaf in runner.weights.leaves if leaf.ndim > 1]
    shares = [leaf.addressable_shards[0].data.nbytes * devices == leaf.nbytes for leaf in matrices]
    experts = runner.model.experts
    whole = len(experts.layers) if experts else int(runner.model.model_type == "gpt2")  # routers; learned positions
    whole += len(experts.layers) if experts and experts.bias and mesh.shape[TENSOR] > 1 else 0  # biases of down_proj
    assert sum(shares) == len(shares) - whole


def test_random_weights_are_the_same_on_every_mesh_and_made_where_they_stay():
    shapes = {"mlp": ParamSpec((96, 128), ("hidden", "mlp")), "down": ParamSpec((128, 96), ("mlp", "hidden")),
              "embed": ParamSpec((64, 96), ("vocab", "hidden"))}  # fmt: skip
    alone = dummy.random_params(shapes, "bfloat16", create_mesh(), seed=3)
    for mesh in (create_mesh(4), create_mesh(2, data=2), create_mesh(2, stage=2)):
        found = dummy.random_params(shapes, "bfloat16", mesh, seed=3)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, alone)
        for spec in shapes.values():
            program = dummy._program(spec.shape, "bfloat16", 0.0, spec.sharding(mesh))
            text = program.lower(np.uint32(0), np.uint32(0)).compile().as_text()
            sizes = [np.prod([*map(int, dims.split(","))]) for dims in re.findall(r"\w+\[([\d,]+)\]", text)]
            assert max(sizes) == np.prod(spec.shape) / mesh.shape["tensor"]
            assert not COLLECTIVE.search(text)


@pytest.mark.parametrize(
    ("family", "experts", "devices", "fuse"),
    [
        ("gpt_oss", 2, 2, True),  # experts, and with biases and sinks
        pytest.param("qwen3_moe", 2, 2, True, marks=full),
        *(pytest.param(family, 1, devices, devices != 4, marks=full) for family in CONFIGS for devices in (2, 4, 8)),
        pytest.param("qwen3", 1, 4, True, marks=full),
        *(
            pytest.param(family, *sizes, fuse, marks=full)
            for family, fuse in (("mixtral", True), ("qwen3_moe", False), ("gpt_oss", True))
            for sizes in ((2, 1), (4, 1), (8, 1), (2, 4), (4, 2))
        ),
    ],
)
def test_the_same_answers_as_one_device(family, experts, devices, fuse):
    mesh = create_mesh(devices, expert=experts)
    with make_llm(family, devices, experts, fuse_weights=fuse) as llm:
        check_answers(family, llm)
        check_places(llm, mesh)
        check_collectives(llm)
        check_padding(llm, mesh)


def check_collectives(llm):
    """Two sums a layer, with experts too, one of the embedding, numbers of rows where tokens are drawn; nothing else.

    No weight and no page moves.
    """
    runner, layers = llm._runner, llm._runner.model.num_layers
    found = {}
    for (name, *key), program in runner._programs.items():
        counts = {}
        for kind in COLLECTIVE.findall(program.as_text()):
            counts[kind] = counts.get(kind, 0) + 1
        found.setdefault((name, key[1] if name in ("decode", "head") else None), counts)
    model, drawn = 2 * layers + 1, {"greedy": 2, "sampled": 6}
    wanted = {("mixed", None): {"all-reduce": model}, ("head", "everything"): {"all-gather": 1}}
    wanted |= {("prompt", None): {"all-gather": 1}}
    wanted |= {(name, None): {} for name in ("prompt_rows", "write_slots", "write_rules")}
    wanted |= {("decode", mode): {"all-reduce": model + count} for mode, count in drawn.items()}
    wanted |= {("head", mode): {"all-reduce": count} for mode, count in drawn.items()}
    assert found == wanted


@pytest.mark.parametrize(
    ("family", "experts", "devices", "attention"),
    [
        ("qwen3_moe", 2, 4, "reference"),
        pytest.param("gpt_oss", 2, 4, "auto", marks=full),
        *(pytest.param(family, 1, 2, "auto", marks=full) for family in ("llama", "qwen2", "mistral")),
    ],
)
def test_the_same_answers_with_peers(family, experts, devices, attention, monkeypatch):
    """What normalizes also sums, in decode steps: here XLA does it, as CPUs have no peers."""
    seen = []
    run_layer.clear_cache()  # or steps like those of earlier tests are not traced, and so not seen
    monkeypatch.setattr("jaxengine.engine.runner.sums_over_peers", lambda model, attention: True)
    monkeypatch.setattr("jaxengine.engine.runner.linked", lambda mesh: mesh.size > 1)
    monkeypatch.setattr("jaxengine.engine.runner.peer_rows", lambda mesh, row_bytes: 2)  # steps of four have none
    monkeypatch.setattr(Residual, "normed", lambda *a, f=Residual.normed: seen.append(a[2].peers) or f(*a))
    with make_llm(family, devices // experts, experts, attention=attention) as llm:
        check_answers(family, llm)
        check_collectives(llm)
        assert {None if peers is None else peers.addresses.shape for peers in seen} == {None, (devices + 1, 2)}
        llm.sleep(1)
        llm.wake_up()
        check_answers(family, llm)


def test_no_memory_of_peers_where_no_kernel_uses_it(monkeypatch):
    monkeypatch.setattr("jaxengine.engine.runner.linked", lambda mesh: True)
    monkeypatch.setattr("jaxengine.engine.runner.peer_rows", lambda mesh, row_bytes: 2)
    with make_llm("llama", 2) as llm:
        assert llm._runner.attention == "xla" and llm._runner._peers == ()


@pytest.mark.parametrize(
    ("axis", "whole"), [("tensor_parallel_size", False), ("data_parallel_size", True), ("pipeline_parallel_size", True)]
)
def test_a_layer_is_one_kernel_where_devices_do_not_split_it(axis, whole, monkeypatch):
    prompts = whole_layers.PROMPTS[:3]
    found, seen = whole_layers.answers(monkeypatch, "llama", True, prompts, **{axis: 2})
    assert bool(seen) is whole
    assert found == whole_layers.answers(monkeypatch, "llama", False, prompts)[0]


@pytest.mark.parametrize("sizes", [{"tensor": 4, "data": 2}, {"tensor": 2, "expert": 2, "data": 2}])
def test_each_device_is_told_the_memory_of_those_that_split_its_layers(sizes):
    mesh, rows = create_mesh(**sizes), 5
    peers = create_peers(mesh, rows, row_bytes=512)
    begin = {shard.device: shard.data.unsafe_buffer_pointer() for shard in peers.workspace.addressable_shards}
    groups = [list(mesh.devices.flat[:4]), list(mesh.devices.flat[4:])]
    for shard in peers.addresses.addressable_shards:
        [group] = (group for group in groups if shard.device in group)
        rank = group.index(shard.device)
        *found, place = np.asarray(shard.data)[0].view("<u8")[:, 0].tolist()
        assert found == [begin[device] for device in group[rank:] + group[:rank]]
        assert (place & 0xFFFFFFFF, place >> 32) == (rank, rows)
    ranks = on_each_device(
        lambda peers: jax.lax.axis_index(LAYER)[None] - own(peers).addresses[-1:, 0], (peers,),
        (peers_sharding(mesh).spec,), peers_sharding(mesh), mesh,
    )[0](peers)  # fmt: skip
    assert (np.asarray(ranks) == 0).all()
    assert not linked(mesh)
    assert peer_rows(mesh, 512) == 2**22 // (3 * 512) and peer_rows(mesh, 520) == peer_rows(mesh, 256) == 0


def test_a_bias_is_added_once():
    def product(x, kernel, bias):
        linear = Linear({"kernel": kernel, "bias": bias}, LAYER)
        return jax.lax.psum(linear(x, partial=True), LAYER), linear(x)

    x, kernel, bias = (tiny.uniform(name, size).reshape(-1, 8) for name, size in (("x", 16), ("w", 64), ("b", 8)))
    place = named_sharding(create_mesh(4))
    sharded = jax.shard_map(
        product, mesh=place.mesh, check_vma=False, out_specs=PartitionSpec(),
        in_specs=(PartitionSpec(None, LAYER), PartitionSpec(LAYER), PartitionSpec()),
    )  # fmt: skip
    for found in sharded(x, kernel, bias[0]):
        np.testing.assert_allclose(found, x @ kernel + bias, atol=1e-6)


def check_padding(llm, mesh):
    """No token that is not in the vocabulary can be drawn, however small the others' logits are."""
    weights = llm._runner.weights
    arguments = weights.leaves, jnp.ones((2, llm.model_config.hidden_size))
    split, _ = on_each_device(
        lambda leaves, x: gather(weights.module(leaves).head(x, share=True), LAYER),
        arguments, (weights.specs, PartitionSpec()), named_sharding(mesh), mesh,
    )  # fmt: skip
    logits = np.asarray(jax.jit(split)(*arguments))
    assert logits.shape[1] == VOCAB + -VOCAB % mesh.size
    assert np.isfinite(logits[:, :VOCAB]).all() and (logits[:, VOCAB:] == -np.inf).all()


def test_logits_of_nan_draw_a_token_of_the_vocabulary():
    broken = params("llama") | {"embed_tokens.embedding": params("llama")["embed_tokens.embedding"].copy()}
    broken["embed_tokens.embedding"][7] = np.nan
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    with LLM(broken, config=CONFIGS["llama"], tensor_parallel_size=2, **SMALL) as llm:
        bad, good = (llm.generate([[prompt]], greedy, use_tqdm=False)[0].outputs[0] for prompt in (7, 8))
        assert len(bad.token_ids) == len(good.token_ids) == 3 and max(bad.token_ids) < VOCAB


def test_borrowed_parameters_that_only_a_later_device_shares_are_missed():
    theirs = {path: jax.device_put(array, jax.devices()[1]) for path, array in params("llama").items()}
    greedy = SamplingParams(temperature=0, max_tokens=2, detokenize=False)
    with LLM(theirs, config=CONFIGS["llama"], tensor_parallel_size=2, **SMALL) as llm:
        llm.generate([[5, 6]], greedy, use_tqdm=False)
        for array in theirs.values():
            array.delete()
        with pytest.raises(WeightsDeletedError):
            llm.generate([[5, 6]], greedy, use_tqdm=False)
        llm.update_weights(params("llama"))
        llm.generate([[5, 6]], greedy, use_tqdm=False)


def test_a_mesh_of_ones_own():
    devices = jax.devices()[3:5]
    with LLM(model_folder(), mesh=Mesh(np.array(devices)[None], ("replica", "tensor")), **SMALL) as llm:
        [output] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 2
        with pytest.raises(UnsupportedError, match=r"tensor_parallel_size=2, .*: score with get_per_token_logps"):
            Rollout(llm).model()
        assert llm._runner._cache.k[0].sharding.device_set == set(devices)


@pytest.mark.parametrize("several_processes", [False, True])
def test_a_vocabulary_that_needs_padding_is_loaded_in_shares(several_processes, monkeypatch):
    """Of 600 rows seven devices have 86 each, the last one 84 and zeros."""
    mesh, whole = create_mesh(7), load_params(open_checkpoint(model_folder()), "float32", create_mesh())
    monkeypatch.setattr(Mesh, "is_multi_process", property(lambda mesh: several_processes))
    found = load_params(open_checkpoint(model_folder()), "float32", mesh)
    for path, axis in {"embed_tokens.embedding": 0, "lm_head.kernel": 1}.items():
        assert [shard.data.shape[axis] for shard in found[path].addressable_shards] == [86] * 7
        np.testing.assert_array_equal(np.take(found[path], range(600), axis), whole[path])
        assert not np.take(found[path], [600, 601], axis).any()


def test_experts_in_mxfp4_are_loaded_in_shares(tmp_path, monkeypatch):
    """Of what is interleaved each device has its columns, and of its experts only."""
    quantized, _ = test_gpt_oss.write_mxfp4(tmp_path)
    checkpoint = open_checkpoint(quantized)
    whole = load_params(checkpoint, "float32", create_mesh())
    for several_processes in (False, True):
        monkeypatch.setattr(Mesh, "is_multi_process", property(lambda mesh, several=several_processes: several))
        found = load_params(checkpoint, "float32", create_mesh(2, expert=2))
        kernel = found["layers.0.mlp.experts.up_proj.kernel"]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 64, 48)}
        for path, array in whole.items():
            np.testing.assert_array_equal(found[path], array)


def test_of_several_processes_each_decodes_a_gguf_tensor_once(tmp_path, monkeypatch):
    gguf_files.write_gguf(tmp_path / "model.gguf", "qwen2")
    checkpoint, read = open_checkpoint(tmp_path / "model.gguf"), []
    whole = load_params(checkpoint, "float32", create_mesh())
    monkeypatch.setattr(Mesh, "is_multi_process", True)
    monkeypatch.setattr(GgufFile, "read", lambda *file, read_one=GgufFile.read: read.append(file) or read_one(*file))
    found = load_params(checkpoint, "float32", create_mesh(2))
    assert len(found["layers.0.self_attn.q_proj.kernel"].addressable_shards) == 2
    assert len(read) == len(set(read)) > 0
    for path, array in whole.items():
        np.testing.assert_array_equal(found[path], array)


@full
def test_the_axes_of_a_mesh_may_come_in_any_order():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    with make_llm("mixtral", 1, mesh=Mesh(devices, ("tensor", "expert"))) as llm:
        check_answers("mixtral", llm)
        kernel = next(leaf for leaf in llm._runner.weights.leaves if leaf.ndim == 3)
        for shard in kernel.addressable_shards:
            group = shard.index[0].start // 4
            assert shard.data.shape[0] == 4 and shard.device in devices[:, group]


@full
def test_new_weights_take_the_places_of_the_old():
    other = {path: array[..., ::-1] for path, array in params("qwen3").items()}
    ask = [[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    tokens = []
    for devices in (1, 4):
        with make_llm("qwen3", devices) as llm:
            before = llm.generate(*ask, use_tqdm=False)[0].outputs[0].token_ids
            for in_place in (False, True):
                llm.update_weights(other, in_place=in_place)
                tokens.append(llm.generate(*ask, use_tqdm=False)[0].outputs[0].token_ids)
                assert tokens[-1] == tokens[0] != before


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        ("qwen2", {"tensor_parallel_size": 3}, ConfigError,
         r"=3 does not divide num_heads=8, num_kv_heads=4 .* intermediate_size=96; use one of \[1, 2\]"),
        ("qwen2", {"tensor_parallel_size": 16}, ConfigError, "needs 16 devices, there are 8"),
        ("qwen2", {"experts": 2}, ConfigError, "expert_parallel_size=2 must divide the experts, this qwen2 has no exp"),
        ("mixtral", {"experts": 3}, ConfigError, "expert_parallel_size=3 must divide .* this mixtral has 8 experts"),
        ("mixtral", {"experts": 4, "devices": 3}, ConfigError, "needs 12 devices, there are 8"),
        ("qwen3_moe", {"experts": 2, "devices": 3}, ConfigError,
         r"=3 x expert_parallel_size=2 does not .*_size=96 and the experts' intermediate_size=48; use one of \[1, 2\]"),
        ("qwen2", {"mesh": (1, 2), "tensor_parallel_size": 4}, ConfigError, "left out, or the 2 of the mesh"),
    ],
)  # fmt: skip
def test_what_is_refused(family, options, error, message):
    if "mesh" in options:
        options = options | {"mesh": jax.make_mesh(options["mesh"], ("data", "tensor"))}
    with pytest.raises(error, match=message):
        make_llm(family, **({"devices": 1} | options))


@pytest.mark.parametrize(
    ("family", "devices", "stages"),
    [
        ("qwen3", 2, 1),
        pytest.param("qwen3", 8, 1, marks=full),
        pytest.param("qwen3_moe", 4, 1, marks=full),
        pytest.param("qwen3", 2, 2, marks=full),
    ],
)
def test_the_kernels_lower_for_cuda_within_each_device(family, devices, stages, monkeypatch):
    monkeypatch.setattr("jaxengine.engine.runner.sums_over_peers", lambda model, attention: True)
    monkeypatch.setattr("jaxengine.engine.runner.linked", lambda mesh: True)
    experts = 2 if family == "qwen3_moe" else 1
    shape = CONFIGS[family] | {"head_dim": 64, "hidden_size": 256, "max_position_embeddings": 4096}
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "dtype": "bfloat16", "kv_cache_memory_bytes": 2**24}
    specs = param_specs(read_config(shape, "bfloat16", ()))
    made = {path: np.zeros(spec.shape, np.float32) for path, spec in specs.items()}
    card = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = (stages, experts, devices // experts), (STAGE, *LAYER), (AxisType.Auto,) * 3
    mesh = AbstractMesh(*mesh, abstract_device=card)
    sizes |= {"expert_parallel_size": experts, "tensor_parallel_size": devices // experts}
    sizes |= {"pipeline_parallel_size": stages}
    with LLM(made, config=shape, fuse_weights=True, **sizes) as llm:
        runner, pool = llm._runner, PartitionSpec(STAGE, LAYER)
        runner.attention, runner.buckets = "triton", replace(runner.buckets, microbatch=128)
        for name, kernel in {"decode": "paged_decode", "mixed": "paged_extend_mosaic"}.items():
            key = next(key for other, key in runner._all_keys()[::-1] if other == name)
            split = {id(runner.weights.leaves): runner.weights.specs, id(runner._cache): pool}
            split |= {id(runner._peers): PartitionSpec((STAGE, *LAYER))}
            arguments = runner._arguments(name, key)
            step = partial(getattr(runner._device_steps(), name), *key)
            program = jax.shard_map(
                step, mesh=mesh, out_specs=(pool, *[PartitionSpec()] * 3),
                in_specs=tuple(split.get(id(argument), PartitionSpec()) for argument in arguments), check_vma=False,
            )  # fmt: skip
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
            with jax.sharding.use_abstract_mesh(mesh):
                text = jax.jit(program).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
            assert "rope_write" in text and kernel in text
            with_peers = name == "decode" and stages == 1
            norm, other = ("all_reduce_rms_norm", "add_rms_norm")[:: 1 if with_peers else -1]
            assert f'name = "{norm}"' in text and f'name = "{other}"' not in text
            assert ("grouped_gated_matmul" in text) == (family == "qwen3_moe")
            # With peers too, as layers/peers.py says; what is left there are sums of a number for each row.
            assert "stablehlo.all_reduce" in text and ("stablehlo.collective_permute" in text) == (stages > 1)
