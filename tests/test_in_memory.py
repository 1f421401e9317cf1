"""Parameters that a trainer has in memory: which trees are taken, what is copied, what is said of others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine import LLM, CheckpointError, ConfigError, EngineError, SamplingParams, UnsupportedModelError
from jaxengine.models import build, nest
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.references import tiny
from tests.tiny_llm import OPTIONS, model_folder

PROMPT = [11 * i % 590 + 3 for i in range(30)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def trainer():
    """The parameters in float32, the config as config.json has it, and what the engine answers from the files."""
    folder = model_folder()
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint, "float32", create_mesh())
    with LLM(folder, **OPTIONS) as llm:
        expected = answer(llm)
    return params, json.loads((folder / "config.json").read_text()), checkpoint.config, expected


def answer(llm):
    output = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0]
    return output.token_ids, output.logprobs.logprobs


def buffers(arrays):
    return {array.unsafe_buffer_pointer() for array in arrays}


TREES = {
    "dotted": lambda params, config: params,
    "nested": lambda params, config: nest(params),
    "module": lambda params, config: build(config, params, 256),
    "state": lambda params, config: nnx.state(build(config, params, 256)),
    "pure dict": lambda params, config: nnx.to_pure_dict(nnx.state(build(config, params, 256))),
}


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_serves_as_it_is(kind, trainer):
    params, hf_config, config, (tokens, logprobs) = trainer
    with LLM(TREES[kind](params, config), config=hf_config, tokenizer=model_folder(), **OPTIONS) as llm:
        assert buffers(llm._runner._leaves) == buffers(params.values()), "the very same arrays"
        found = answer(llm)
    assert found[0] == tokens
    np.testing.assert_allclose(found[1], logprobs, rtol=1e-4, atol=1e-4)
    assert not any(array.is_deleted() for array in params.values()), "they are the trainer's"


def test_fused_weights_are_copies(trainer):
    params, _, config, (tokens, _) = trainer
    with LLM(dict(params), config=config, tokenizer=model_folder(), fuse_weights=True, **OPTIONS) as llm:
        own = {name for name in params if not name.endswith(".kernel")}
        assert buffers(params[name] for name in own) <= buffers(llm._runner._leaves)
        assert not buffers(params[name] for name in params.keys() - own) & buffers(llm._runner._leaves)
        assert answer(llm)[0] == tokens


def test_another_dtype_is_a_copy(trainer):
    params, hf_config, _, _ = trainer
    with LLM(params, config=hf_config, dtype="bfloat16", **OPTIONS) as llm:
        assert not buffers(params.values()) & buffers(llm._runner._leaves)
    half = {name: array.astype(jnp.bfloat16) for name, array in params.items()}
    with LLM(half, config=hf_config, **OPTIONS) as llm:
        assert llm.config.dtype == "bfloat16", "auto is what the arrays are"


@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen3"])
def test_names_of_transformers(variant, tmp_path):
    folder = tiny.write_checkpoint(variant, tmp_path / variant)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    outputs = []
    for model, options in ((folder, {}), (tiny.tensors(variant), {"config": tiny.config(variant)})):
        with LLM(model, dtype="float32", max_model_len=64, **options) as llm:
            outputs.append(llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids)
    assert outputs[0] == outputs[1]


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    config = tiny.config("llama") | {"tie_word_embeddings": True}
    tree = tiny.tensors("llama") | {"lm_head.weight": tiny.tensors("llama")["model.embed_tokens.weight"]}
    with LLM(tree, config=config, dtype="float32", max_model_len=64) as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)[0].finished
    with pytest.raises(CheckpointError, match=r"lm_head\.kernel differs from embed_tokens\.embedding"):
        LLM(tiny.tensors("llama"), config=config, max_model_len=64)


def test_a_tensor_that_cannot_be_cut_is_named():
    tree = tiny.tensors("gpt2")
    name = next(name for name in tree if name.endswith("c_attn.weight"))
    with pytest.raises(CheckpointError, match=r"c_attn\.weight \[\d+, \d+\] is not 3 equal parts"):
        LLM(tree | {name: tree[name][:, :-1]}, config=tiny.config("gpt2"), max_model_len=64)


def test_deleted_parameters_are_seen_before_a_step(trainer):
    params, hf_config, _, _ = trainer
    mine = {name: jnp.copy(array) for name, array in params.items()}
    with LLM(mine, config=hf_config, tokenizer=model_folder(), **OPTIONS) as llm:
        answer(llm)
        train = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
        mine = train(mine)
        with pytest.raises(EngineError, match="a training step that donates them took them"):
            answer(llm)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: {k: v for k, v in p.items() if k != "norm.scale"}, r"missing: norm\.scale"),
        (lambda p: p | {"extra.kernel": p["norm.scale"]}, r"unexpected: extra\.kernel"),
        (lambda p: p | {"norm.scale": p["norm.scale"][:-1]}, r"of shape \[\d+\], where the config says \[\d+\]: norm"),
        (lambda p: p | {"norm.scale": "x"}, r"norm\.scale is a str, not an array"),
        (lambda p: {}, "there are none"),
        (
            lambda p: p | {"norm.scale": np.ones(64)},
            r"not among float32, bfloat16, float16: .*'norm\.scale': 'float64'",
        ),
        (lambda p: p | {"model.norm.weight": p["norm.scale"]}, r"norm\.scale is there twice"),
    ],
)
def test_another_tree_is_refused_by_name(change, complaint, trainer):
    params, hf_config, _, _ = trainer
    with pytest.raises(CheckpointError, match=complaint):
        LLM(change(dict(params)), config=hf_config, **OPTIONS)


def test_what_is_asked_for_must_fit(trainer):
    params, hf_config, _, _ = trainer
    for options, kind, complaint in (
        ({}, ConfigError, "need config="),
        ({"config": 5}, CheckpointError, "config=5 must be"),
        ({"config": hf_config, "load_format": "orbax"}, ConfigError, "the model is in memory"),
        ({"config": hf_config | {"attention_sinks": 4}}, UnsupportedModelError, "attention_sinks=4"),
    ):
        with pytest.raises(kind, match=complaint):
            LLM(params, **options)
    with pytest.raises(ConfigError, match="config= is for parameters in memory"):
        LLM(model_folder(), config=hf_config)
