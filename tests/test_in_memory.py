"""Parameters in memory: every form of a trainer's tree, borrowed or copied, and what is said of a wrong one."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine import (
    LLM,
    CheckpointError,
    ConfigError,
    ParamRule,
    SamplingParams,
    UnsupportedModelError,
    WeightsDeletedError,
)
from jaxengine.models import build, nest, param_specs
from jaxengine.sharding import create_mesh
from jaxengine.weights import checkpoint_in_memory, load_params, open_checkpoint
from tests.references import tiny
from tests.tiny_llm import CONFIGS, OPTIONS, check_integrity, count_ties, model_folder, shared_llm, tensors

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
PROMPT = list(range(40, 52))


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(model_folder())


@pytest.fixture
def params(checkpoint):
    """Canonical parameters as a trainer has them: on the default device, on no mesh."""
    return {path: jnp.array(x) for path, x in load_params(checkpoint, "float32", create_mesh()).items()}


def engine(params, config=CONFIGS["llama"], **options):
    return LLM(params, config=config, **(OPTIONS | options))


def leaves_of(llm):
    return llm._runner.weights.leaves


def pointers(arrays):
    return {x.unsafe_buffer_pointer() for x in arrays}


def check_greedy(llm):
    [output] = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    assert count_ties("llama", PROMPT, output.outputs[0].token_ids) == 0


# -- forms of a tree, all without an engine


def transformers_config():
    import transformers

    return transformers.LlamaConfig(**{k: v for k, v in CONFIGS["llama"].items() if k != "model_type"})


def forms(checkpoint, params):
    module = build(checkpoint.config, params, 256)
    state = nnx.state(module)
    as_hf = {name: jnp.asarray(x) for name, x in tensors().items()}
    return {
        "flat": params,
        "nested": nest(params),
        "listed": nest(params) | {"layers": list(nest(params)["layers"].values())},
        "module": module,
        "state": state,
        "pure dict": nnx.to_pure_dict(state),
        "variables": {path: nnx.Param(x) for path, x in params.items()},
        "numpy": {path: np.asarray(x) for path, x in params.items()},
        "hf": as_hf,
        "hf nested": nest({name.removeprefix("model."): x for name, x in as_hf.items()}),
    }


def test_every_form_gives_the_same_parameters(checkpoint, params):
    for form, tree in forms(checkpoint, params).items():
        opened = checkpoint_in_memory(tree, CONFIGS["llama"])
        found = load_params(opened, "float32", create_mesh(), borrow=True)
        assert list(found) == list(param_specs(checkpoint.config)), form
        for path, want in params.items():
            np.testing.assert_array_equal(found[path], want, f"{form}: {path}")


def test_what_fits_is_borrowed_and_nothing_else(checkpoint, params):
    borrowed = dict.fromkeys(forms(checkpoint, params), 0)
    for form, tree in forms(checkpoint, params).items():
        sources = {id(leaf.source) for leaf in checkpoint_in_memory(tree, CONFIGS["llama"]).arrays.values()}
        for borrow in (True, False):
            found = load_params(checkpoint_in_memory(tree, CONFIGS["llama"]), "float32", create_mesh(), borrow=borrow)
            same = sum(id(x) in sources for x in found.values())
            borrowed[form] = same if borrow else borrowed[form]
            owned = {id(x) for x in found.values()} - sources
            if not borrow:
                assert len(owned) == len(params), form
                assert not pointers(found.values()) & pointers(params.values()), form
    norms_and_embedding = 2 * 2 + 1 + 1  # the kernels of a HuggingFace checkpoint are transposed
    expected = dict.fromkeys(borrowed, len(params)) | {"numpy": 0, "hf": norms_and_embedding,
                                                       "hf nested": norms_and_embedding}  # fmt: skip
    assert borrowed == expected


def test_numpy_memory_is_never_shared(params):
    held = {}
    for path, x in params.items():  # aligned, as jax wants memory that it could take over
        room = np.zeros(x.nbytes + 64, np.uint8)
        start = -room.ctypes.data % 64
        held[path] = room[start : start + x.nbytes].view(np.float32).reshape(x.shape)
        held[path][...] = x
    found = load_params(checkpoint_in_memory(held, CONFIGS["llama"]), "float32", create_mesh(), borrow=True)
    for array in held.values():
        array[...] = 7
    assert all(np.array_equal(found[path], x) for path, x in params.items())


def test_another_dtype_is_converted_leaf_by_leaf(params):
    mixed = params | {"norm.scale": params["norm.scale"].astype(jnp.bfloat16)}
    opened = checkpoint_in_memory(mixed, CONFIGS["llama"])
    assert opened.config.dtype == "float32"  # of most
    found = load_params(opened, "float32", create_mesh(), borrow=True)
    assert {str(x.dtype) for x in found.values()} == {"float32"}
    assert [path for path in found if found[path] is not mixed[path]] == ["norm.scale"]


def test_config_of_every_kind(checkpoint, params):
    for config in (CONFIGS["llama"], transformers_config(), checkpoint.config):
        assert checkpoint_in_memory(params, config).config == checkpoint.config
    for config, error, match in (
        (5, CheckpointError, "config=5 must be"),
        ({"model_type": "llama"}, CheckpointError, "config: lacks"),
        (CONFIGS["llama"] | {"model_type": "rwkv"}, UnsupportedModelError, "model_type='rwkv'"),
        (CONFIGS["llama"] | {"attention_sinks": 4}, UnsupportedModelError, "attention_sinks=4"),
    ):
        with pytest.raises(error, match=match):
            checkpoint_in_memory(params, config)


def test_experts_come_stacked(tmp_path):
    want = load_params(open_checkpoint(tiny.write_checkpoint("mixtral", tmp_path)), "float32", create_mesh())
    opened = checkpoint_in_memory(want, tiny.config("mixtral"))
    assert load_params(opened, "float32", create_mesh(), borrow=True) == want
    path = r"layers\.\d\.mlp\.experts\.\w+_proj\.kernel \[experts, in, out\]"
    with pytest.raises(CheckpointError, match=rf"w\d\.weight is one of the experts: .* as {path}"):
        checkpoint_in_memory(tiny.tensors("mixtral"), tiny.config("mixtral"))


@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen3"])
def test_names_of_transformers(variant, tmp_path):
    want = load_params(open_checkpoint(tiny.write_checkpoint(variant, tmp_path / variant)), "float32", create_mesh())
    opened = checkpoint_in_memory(tiny.tensors(variant), tiny.config(variant))
    found = load_params(opened, "float32", create_mesh(), borrow=True)
    assert found.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(found[path], array, path)


def foreign(params):
    """As another trainer may have them: heads apart, layers stacked, [out, in], a buffer of its own."""
    stacked = [params[f"layers.{i}.self_attn.q_proj.kernel"].reshape(64, 4, 16) for i in range(2)]
    tree = {"decoder/q": jnp.stack(stacked), "step": jnp.zeros(3)}
    for path, x in params.items():
        if "q_proj" in path:
            continue
        if "mlp.gate_proj" in path:
            up = params[path.replace("gate_proj", "up_proj")]
            tree[path.replace("mlp.gate_proj.kernel", "wi")] = jnp.concatenate([x, up], axis=1)
        elif "up_proj" not in path:
            tree[path.replace("o_proj.kernel", "out")] = x.T if "o_proj" in path else x
    return tree


RULES = {
    "decoder/q": ParamRule(
        tuple(f"layers.{i}.self_attn.q_proj.kernel" for i in range(2)),
        reshape=(2, 64, 64),
        hook=list,
    ),
    "step": ParamRule(()),
    r"layers\.(\d+)\.wi": ParamRule((r"layers.\1.mlp.gate_proj.kernel", r"layers.\1.mlp.up_proj.kernel")),
    r"layers\.(\d+)\.self_attn\.out": ParamRule(r"layers.\1.self_attn.o_proj.kernel", transpose=(1, 0)),
    r"(.*)": ParamRule(r"\1"),
}


def test_a_foreign_trainer_by_a_table(params):
    tree = foreign(params)
    found = load_params(checkpoint_in_memory(tree, CONFIGS["llama"], RULES), "float32", create_mesh(), borrow=True)
    for path, want in params.items():
        np.testing.assert_array_equal(found[path], want, path)
    assert found["norm.scale"] is tree["norm.scale"]  # a new name alone costs nothing


def test_a_table_that_makes_no_sense(params):
    tree = foreign(params)
    q, all_others = "decoder/q", "(.*)"
    without = {pattern: rule for pattern, rule in RULES.items() if pattern != all_others}
    unusable = r"of shape \[2, 64, 4, 16\], no norm\.scale \(.*\): decoder/q"
    for rules, match in (
        (without, r"unexpected: norm\.scale \[64\]"),
        (RULES | {all_others: ParamRule(r"model.\1")}, r"unexpected: norm\.scale \[64\] \(would be model\.norm\.scale"),
        (RULES | {q: ParamRule("x", reshape=(5,))}, "unexpected: decoder/q"),
        (RULES | {q: ParamRule("norm.scale", hook=lambda x: x.q)}, unusable),
        (RULES | {q: ParamRule("norm.scale", reshape=(5,))}, unusable),
        (RULES | {q: ParamRule(("norm.scale",), hook=list)}, "gives 2 arrays for 1 names"),
        (RULES | {"step": ParamRule("norm.scale")}, r"twice: norm\.scale from (step|norm)"),
    ):
        with pytest.raises(CheckpointError, match=match):
            checkpoint_in_memory(tree, CONFIGS["llama"], rules)
    with pytest.raises(ConfigError, match="must be a ParamRule"):
        checkpoint_in_memory(tree, CONFIGS["llama"], {all_others: "x"})
    with pytest.raises(ConfigError, match="transpose"):
        ParamRule("x", transpose=[1, 0])


def test_every_fault_is_named_at_once(params):
    deleted = jnp.ones(64)
    wrong = {path: x for path, x in params.items() if "v_proj" not in path} | {
        "norm.scale": deleted,
        "lm_head.kernel": params["lm_head.kernel"].T,
        "layers.0.mlp.up_proj.kernel": jnp.zeros((64, 96), jnp.int32),
        "adam.mu": jnp.zeros(3),
    }
    deleted.delete()
    with pytest.raises(CheckpointError) as caught:
        checkpoint_in_memory(wrong, CONFIGS["llama"])
    for fault in (
        "parameters in memory", "missing: layers.0.self_attn.v_proj.kernel", "missing: layers.1.self_attn.v_proj.ker",
        "deleted, its buffer was given to a program that donates it: norm.scale", "unexpected: adam.mu [3]",
        "of shape [600, 64], where the config says [64, 600]: lm_head.kernel",
        "of dtype int32, not one of float32, bfloat16, float16: layers.0.mlp.up_proj.kernel",
    ):  # fmt: skip
        assert fault in str(caught.value)


def test_a_huggingface_tree_is_told_by_its_own_names():
    held = tensors()
    wrong = {name: x for name, x in held.items() if "layers.1.mlp.down" not in name} | {
        "model.norm.weight": np.zeros(3, np.float32)
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoint_in_memory(wrong, CONFIGS["llama"])
    assert "missing: layers.1.mlp.down_proj.weight" in str(caught.value)
    assert "of shape [3], where the config says [64]: norm.scale from model.norm.weight" in str(caught.value)


def test_a_tensor_that_cannot_be_cut_is_named():
    tree = tiny.tensors("gpt2")
    name = next(name for name in tree if name.endswith("c_attn.weight"))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_in_memory(tree | {name: tree[name][:, :-1]}, tiny.config("gpt2"))
    [_, fault] = str(caught.value).splitlines()
    assert fault.endswith(f"([64, 191] is not 3 equal parts): {name}")


def test_a_tied_head_may_be_there_if_it_is_the_embedding(params):
    tied = CONFIGS["llama"] | {"tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match=r"lm_head\.kernel differs from embed_tokens\.embedding"):
        checkpoint_in_memory(params, tied)
    same = params | {"lm_head.kernel": params["embed_tokens.embedding"].T}
    assert "lm_head.kernel" not in checkpoint_in_memory(same, tied).arrays


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda p: 5, ConfigError, "model of type int"),
        (lambda p: {}, CheckpointError, "there are none"),
        (lambda p: p | {"norm.scale": 1.0}, CheckpointError, r"norm\.scale is a float, not an array"),
        (lambda p: p | {"norm": {"scale": p["norm.scale"]}}, CheckpointError, r"twice: norm\.scale"),
        (
            lambda p: p | {"model.norm.weight": p["norm.scale"]},
            CheckpointError,
            r"twice: norm\.scale from norm\.scale ",
        ),
    ],
)
def test_what_is_no_tree_of_arrays(change, error, match, params):
    with pytest.raises(error, match=match):
        checkpoint_in_memory(change(params), CONFIGS["llama"])


def test_what_is_asked_for_must_fit(params):
    for options, match in (
        ({}, "need config="),
        ({"config": CONFIGS["llama"], "load_format": "orbax"}, "the model is in memory"),
        ({"config": CONFIGS["llama"], "hf_overrides": {"vocab_size": 5}}, "the model is in memory"),
    ):
        with pytest.raises(ConfigError, match=match):
            LLM(params, **options)
    for options in ({"config": CONFIGS["llama"]}, {"param_mapping": RULES}):
        with pytest.raises(ConfigError, match="is for parameters in memory"):
            LLM(model_folder(), **options)


@pytest.mark.parametrize("pattern, to", [("layers.(", "x"), ("(.*)", r"\2")])
def test_a_pattern_that_is_none_is_named(params, pattern, to):
    with pytest.raises(ConfigError, match=r"param_mapping\[.*(unterminated|invalid group)"):
        checkpoint_in_memory(params, CONFIGS["llama"], {pattern: ParamRule(to)})


# -- engines


def test_the_step_runs_on_the_trainers_own_arrays(params):
    with engine(params) as llm:
        assert llm.config.fuse_weights is False and llm.config.dtype == "float32"
        assert {id(x) for x in leaves_of(llm)} == {id(x) for x in params.values()}
        check_greedy(llm)
        assert {id(x) for x in leaves_of(llm)} == {id(x) for x in params.values()}  # nothing made copies on the way
        check_integrity(llm)
    assert not any(x.is_deleted() for x in params.values())  # close() leaves the trainer's arrays alone


def test_an_engine_that_owns_its_weights_copies_them(params):
    with engine(params, fuse_weights=True, tokenizer=model_folder()) as llm:
        assert not pointers(leaves_of(llm)) & pointers(params.values())
        assert len(leaves_of(llm)) < len(params), "q, k, v and gate, up are one each"
        llm._runner._programs = shared_llm()._runner._programs  # the same model from a folder: the same programs
        for x in params.values():
            x.delete()
        check_greedy(llm)
        assert llm.generate("def", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)[0].outputs[0].text


def test_borrowed_arrays_that_die_are_an_error_with_the_remedy(params):
    with engine(params) as llm:
        check_greedy(llm)
        donate = jax.jit(lambda x: x + 1, donate_argnums=0)
        donate(params["layers.0.mlp.up_proj.kernel"])
        for _ in range(2):
            with pytest.raises(WeightsDeletedError, match=r"update_weights .* fuse_weights=True"):
                llm.generate([PROMPT, PROMPT], GREEDY, use_tqdm=False)
        check_integrity(llm)  # nobody waits for an answer, and the engine lives


def test_bfloat16_stays_bfloat16(params):
    narrow = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
    opened = checkpoint_in_memory(narrow, CONFIGS["llama"])
    assert opened.config.dtype == "bfloat16"
    with engine(narrow) as llm:
        assert llm.config.dtype == llm.config.kv_cache_dtype == "bfloat16"
        assert all(x is y for x, y in zip(sorted(leaves_of(llm), key=id), sorted(narrow.values(), key=id), strict=True))


def test_parameters_on_another_mesh_are_resharded():
    code = f"""
        import os
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from jaxengine.weights import checkpoint_in_memory, in_memory, load_params, open_checkpoint
        from jaxengine.sharding import create_mesh
        in_memory.CHUNK_BYTES = 10_000  # several chunks
        checkpoint = open_checkpoint({str(model_folder())!r})
        want = load_params(checkpoint, "float32", create_mesh())
        trainer = jax.make_mesh((2,), ("fsdp",))
        spread = {{
            path: jax.device_put(np.asarray(x), NamedSharding(trainer, PartitionSpec("fsdp")))
            for path, x in want.items()
        }}
        opened = checkpoint_in_memory(spread, checkpoint.config)
        found = load_params(opened, "float32", create_mesh(), borrow=True)
        for path, x in want.items():
            assert found[path].sharding == x.sharding and found[path].devices() == {{jax.devices()[0]}}, path
            np.testing.assert_array_equal(found[path], x)
        print("resharded")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "resharded", done.stderr
