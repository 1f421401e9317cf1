"""Weights in: names, shapes, layouts, dtypes; hub; random weights; and every fault by its name."""

import gc
import json
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import errors

from converters import ConversionError
from converters.tensors import Target
from jaxengine.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from jaxengine.models import param_specs
from jaxengine.sharding import ParamSpec, create_mesh, named_sharding
from jaxengine.tokenizer import Tokenizer
from jaxengine.weights import hub, load_params, loading, open_checkpoint
from tests.references import gguf_files, tiny
from tests.weight_helpers import assert_same, edit_json

EVERY_DTYPE = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def mesh():
    return create_mesh()


def rewritten(folder, variant="llama", remove=(), **added):
    """The variant with other tensors in its file."""
    tiny.write_checkpoint(variant, folder)
    arrays = {name: x for name, x in tiny.tensors(variant).items() if name not in remove}
    tiny.write_safetensors(arrays | added, folder)
    return open_checkpoint(folder)


# -- files


@pytest.mark.parametrize(
    "variant", ["llama_biases", "mistral", "qwen2_legacy", "qwen3", "gpt2_untied_eps", "gpt2_bare", "mixtral"]
)
def test_every_parameter_is_placed(tmp_path, mesh, variant):
    checkpoint = open_checkpoint(tiny.write_checkpoint(variant, tmp_path, shards=2))
    assert checkpoint.format == "safetensors"
    calls = []
    params = load_params(checkpoint, "float32", mesh, on_tensor=lambda *call: calls.append(call))
    specs = param_specs(checkpoint.config)
    assert set(params) == set(specs)
    for path, array in params.items():
        assert (array.shape, array.dtype) == (specs[path].shape, jnp.float32)
        assert array.committed
        assert array.sharding == named_sharding(mesh, specs[path].axes)
    assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)]


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_kernels_are_in_out(tmp_path, mesh, dtype):
    arrays = tiny.tensors("llama")
    params = load_params(open_checkpoint(tiny.write_checkpoint("llama", tmp_path)), dtype, mesh)
    for path, name in [("layers.1.self_attn.k_proj.kernel", "model.layers.1.self_attn.k_proj.weight"),
                       ("layers.2.mlp.down_proj.kernel", "model.layers.2.mlp.down_proj.weight"),
                       ("lm_head.kernel", "lm_head.weight")]:  # fmt: skip
        np.testing.assert_array_equal(params[path], arrays[name].T.astype(jnp.dtype(dtype)))
    np.testing.assert_array_equal(
        params["embed_tokens.embedding"], arrays["model.embed_tokens.weight"].astype(jnp.dtype(dtype))
    )


def test_gpt2s_fused_tensor_is_taken_apart(tmp_path, mesh):
    arrays = tiny.tensors("gpt2")
    params = load_params(open_checkpoint(tiny.write_checkpoint("gpt2", tmp_path)), "float32", mesh)
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        parts = [params[f"layers.2.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(parts, -1), arrays[f"transformer.h.2.attn.c_attn.{name}"])


def test_few_tensors_are_on_the_host(tmp_path, mesh, monkeypatch):
    monkeypatch.setitem(loading.READERS, "cpu", 2)
    checkpoint = open_checkpoint(tiny.write_checkpoint("llama", tmp_path))
    alive = weakref.WeakSet()
    most = 0

    class Referable(np.ndarray):
        __hash__ = object.__hash__

        def __array_finalize__(self, _):  # called for views and casts too
            alive.add(self)

    def read(name):
        nonlocal most
        gc.collect(1)  # jax lets go of some at that occasion only; they are young
        most = max(most, len(alive))
        return checkpoint.reader.read(name).copy().view(Referable)

    reader = SimpleNamespace(names=checkpoint.reader.names, read=read)
    params = load_params(replace(checkpoint, reader=reader), "bfloat16", mesh)
    assert len(params) > 20
    assert 1 <= most <= 16  # two tensors as read, cast, transposed, and what jax is about to let go; kept, it is 30


def test_tensors_are_read_by_several_threads_up_to_a_fault(tmp_path, mesh, monkeypatch):
    checkpoint, asked, done = open_checkpoint(tiny.write_checkpoint("llama", tmp_path)), [], []
    monkeypatch.setitem(loading.READERS, "cpu", 2)
    both = threading.Barrier(2, timeout=10)

    def read(name):
        asked.append(name)
        if len(asked) <= 2:
            both.wait()
        elif len(asked) > 4:
            raise ConversionError(f"{name} cannot be read")
        return checkpoint.reader.read(name)

    reader = SimpleNamespace(names=checkpoint.reader.names, read=read)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_params(replace(checkpoint, reader=reader), "float32", mesh, on_tensor=lambda n, _: done.append(n))
    assert done == list(range(1, len(done) + 1)) and len(done) <= 4


def test_a_device_transposes_as_the_host_does(mesh):
    specs = {"a.kernel": ParamSpec((3, 5), ("hidden", "mlp"))}
    array = np.arange(15, dtype=np.float32).reshape(5, 3)
    for platform in ("cpu", "gpu"):
        [placed] = loading._place(array, Target(("a.kernel",), transposed=True), specs, mesh, platform)
        np.testing.assert_array_equal(placed, array.T)
        assert placed.sharding == named_sharding(mesh, ("hidden", "mlp"))


def test_loading_is_quick(tmp_path, mesh):
    tiny.write_checkpoint("llama", tmp_path)
    load_params(open_checkpoint(tmp_path), "bfloat16", mesh)
    start = time.perf_counter()
    load_params(open_checkpoint(tmp_path), "bfloat16", mesh)
    assert time.perf_counter() - start < 0.5  # it takes 0.01 s


def test_the_usual_dtype_stands_for_one_not_said(tmp_path):
    tiny.write_checkpoint("llama_bf16", tmp_path)
    edit_json(tmp_path / "config.json", dtype=...)
    assert open_checkpoint(tmp_path).config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("variant", "names"),
    [("mixtral", "block_sparse_moe.experts.{}.w{}"), ("qwen3_moe_dense_layer", "mlp.experts.{}.{}_proj")],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_experts_are_stacked(tmp_path, mesh, variant, names, platform, monkeypatch):
    place = loading._place
    monkeypatch.setattr(loading, "_place", lambda *args: place(*args[:-1], platform))
    checkpoint = open_checkpoint(tiny.write_checkpoint(variant, tmp_path))
    arrays, params = tiny.tensors(variant), load_params(checkpoint, "float32", mesh)
    for part, theirs in {"gate": 1, "up": 3, "down": 2}.items():
        found = params[f"layers.2.mlp.experts.{part}_proj.kernel"]
        assert len(found) == checkpoint.config.experts.count
        for expert, kernel in enumerate(found):
            name = f"model.layers.2.{names.format(expert, theirs if variant == 'mixtral' else part)}.weight"
            np.testing.assert_array_equal(kernel, arrays[name].T)


# -- faults of tensors


def test_faults_of_experts_name_each(tmp_path, mesh):
    expert = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    checkpoint = rewritten(
        tmp_path,
        "qwen3_moe_dense_layer",
        remove=(expert.format(2, 7, "up"), "model.layers.0.mlp.gate.weight"),
        **{
            expert.format(0, 8, "up"): np.zeros((48, 64), np.float32),
            expert.format(1, 0, "up"): np.zeros((48, 64), np.float32),
            expert.format(0, 3, "down"): np.zeros((48, 64), np.float32),
            expert.format(2, 1, "gate")[6:]: np.zeros((48, 64), np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_params(checkpoint, "float32", mesh)
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    [twice] = {line for line in lines if line.startswith("twice: ")}
    assert twice.count("layers.2.mlp.experts.1.gate_proj.weight") == 2
    assert lines - {twice} == {
        "missing: layers.2.mlp.experts.7.up_proj.weight",
        "missing: layers.0.mlp.gate.weight",
        "unexpected: model.layers.0.mlp.experts.8.up_proj.weight [48, 64]",
        "unexpected: model.layers.1.mlp.experts.0.up_proj.weight [48, 64]",
        "of shape [48, 64], where the config says [64, 48]: model.layers.0.mlp.experts.3.down_proj.weight",
    }


def test_every_fault_of_the_tensors_at_once(tmp_path, mesh):
    checkpoint = rewritten(
        tmp_path,
        remove=("model.norm.weight", "model.layers.1.self_attn.o_proj.weight"),
        **{
            "model.layers.0.mlp.up_proj.bias": np.zeros(96, np.float32),
            "model.layers.7.mlp.up_proj.weight": np.zeros((96, 64), np.float32),
            "score.weight": np.zeros((2, 64), np.float32),
            "model.layers.2.mlp.up_proj.weight": np.zeros((64, 96), np.float32),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((64, 64), np.int8),
            "layers.0.input_layernorm.weight": np.zeros(64, np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_params(checkpoint, "float32", mesh)
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    twice = lines & {
        "twice: model.layers.0.input_layernorm.weight and layers.0.input_layernorm.weight",
        "twice: layers.0.input_layernorm.weight and model.layers.0.input_layernorm.weight",
    }
    assert len(twice) == 1
    assert lines - twice == {
        "missing: norm.weight",
        "missing: layers.1.self_attn.o_proj.weight",
        "unexpected: model.layers.0.mlp.up_proj.bias [96]",
        "unexpected: model.layers.7.mlp.up_proj.weight [96, 64]",
        "unexpected: score.weight [2, 64]",
        "of shape [64, 96], where the config says [96, 64]: model.layers.2.mlp.up_proj.weight",
        "of dtype I8, not one of float32, bfloat16, float16: model.layers.0.self_attn.q_proj.weight",
    }


def test_a_config_that_disagrees_with_the_weights(tmp_path, mesh):
    tiny.write_checkpoint("gpt2", tmp_path)
    with pytest.raises(CheckpointError, match=r"of shape \[64, 192\], where the config says \[32, 96\]"):
        load_params(open_checkpoint(tmp_path, hf_overrides={"n_embd": 32}), "float32", mesh)


def test_a_tied_head_may_be_stored_all_the_same(tmp_path, mesh):
    embedding = tiny.tensors("llama_tied_mha")["model.embed_tokens.weight"]
    checkpoint = rewritten(tmp_path, "llama_tied_mha", **{"lm_head.weight": embedding})
    assert "lm_head.kernel" not in load_params(checkpoint, "float32", mesh)
    checkpoint = rewritten(tmp_path, "llama_tied_mha", **{"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight; hf_"):
        load_params(checkpoint, "float32", mesh)
    untied = open_checkpoint(tmp_path, hf_overrides={"tie_word_embeddings": False})
    np.testing.assert_array_equal(load_params(untied, "float32", mesh)["lm_head.kernel"], embedding.T + 1)


# -- what a checkpoint says


def test_sampling_defaults_and_every_end(tmp_path):
    tiny.write_checkpoint("llama", tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=[2, 5])
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 2, 100_000], temperature=0.6, top_p=0.9, top_k=20,
              min_p=None, max_new_tokens=64, repetition_penalty=1.1, do_sample=True, max_length=99)  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (2, 5, 7)  # 100000 is no token
    assert checkpoint.sampling_defaults == {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_tokens": 64, "repetition_penalty": 1.1
    }  # fmt: skip
    plain = open_checkpoint(tmp_path, use_generation_config=False)
    assert (plain.sampling_defaults, plain.config.eos_token_ids) == ({}, (2, 5))
    edit_json(tmp_path / "generation_config.json", do_sample=False)
    assert open_checkpoint(tmp_path).sampling_defaults["temperature"] == 0.0


def test_what_is_not_applied_is_said(tmp_path, caplog):
    tiny.write_checkpoint("llama", tmp_path)
    edit_json(tmp_path / "generation_config.json", num_beams=4, typical_p=1.0)
    open_checkpoint(tmp_path)
    assert "not applied: num_beams=4" in caplog.text
    assert "typical_p" not in caplog.text


def test_overrides_replace_whole_attributes(tmp_path):
    tiny.write_checkpoint("llama_yarn", tmp_path)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    config = open_checkpoint(tmp_path, hf_overrides={"rope_parameters": rope, "eos_token_id": (3, 4)}).config
    assert (config.rope.type, config.rope.theta, config.rope.options) == ("linear", 5.0, {"factor": 2.0})
    assert config.eos_token_ids == (3, 4)
    with pytest.raises(UnsupportedModelError, match="not supported: nonsense=1"):
        open_checkpoint(tmp_path, hf_overrides={"nonsense": 1})
    with pytest.raises(CheckpointError, match="must be what JSON can hold"):
        open_checkpoint(tmp_path, hf_overrides={"eos_token_id": {1}})


@pytest.mark.parametrize(
    ("changes", "complaint", "error"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not one of", UnsupportedModelError),
        ({"hidden_act": "mish"}, "'mish' is not one of", CheckpointError),
        ({"num_key_value_heads": 3}, "is not a multiple of", CheckpointError),
        ({"vocab_size": 0}, "vocab_size=0 must be a positive integer", CheckpointError),
        ({"vocab_size": ...}, "lacks vocab_size", CheckpointError),
    ],
)
def test_refused_configs(tmp_path, changes, complaint, error):
    tiny.write_checkpoint("llama", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(error, match=complaint) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_broken_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds a list where an object should be"):
        open_checkpoint(tmp_path)
    tiny.write_checkpoint("llama", tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names files that are not there: model-00002-of-00002"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is of format safetensors, not load_format='gguf'"):
        open_checkpoint(tmp_path, load_format="gguf")
    with pytest.raises(ConfigError, match="load_format='pt' is not one of"):
        open_checkpoint(tmp_path, load_format="pt")


# -- the hub


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "model.gguf", "a/b/c"])
def test_no_such_folder(name):
    with pytest.raises(ModelNotFoundError, match="there is no folder or file"):
        open_checkpoint(name)


def test_a_local_folder_has_no_revision(tmp_path):
    with pytest.raises(ModelNotFoundError, match="only the hub has revisions"):
        open_checkpoint(tiny.write_checkpoint("llama", tmp_path), revision="main")


def test_offline_says_what_to_do(tmp_path):
    with pytest.raises(ModelNotFoundError, match="go online, or fetch it elsewhere with `hf download some/model`"):
        open_checkpoint("some/model", download_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (errors.RepositoryNotFoundError, "check the spelling"),
        (errors.GatedRepoError, "accept its terms at https://huggingface.co/some/model"),
        (errors.RevisionNotFoundError, "has no revision='v2'"),
        (errors.HfHubHTTPError, "go online"),
    ],
)
def test_errors_of_the_hub(monkeypatch, kind, complaint):
    def fail(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=complaint):
        open_checkpoint("some/model", revision="v2")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch, load_format):
    asked = {}

    def fake(repository, **options):
        asked.update(options, repository=repository)
        return str(tiny.write_checkpoint("llama", tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    checkpoint = open_checkpoint("some/model", revision="v2", download_dir="there", load_format=load_format)
    assert checkpoint.path == tmp_path
    assert (asked["repository"], asked["revision"], asked["cache_dir"]) == ("some/model", "v2", "there")
    weights = {pattern for pattern in asked["allow_patterns"] if "safetensors" in pattern}
    assert bool(weights) == (load_format == "auto")
    assert {*hub.TOKENIZER_FILES, "config.json", "generation_config.json"} <= set(asked["allow_patterns"])


# -- random weights


def test_random_weights(tmp_path, mesh):
    """Without any file but the config."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("gpt2_untied_eps")))
    checkpoint = open_checkpoint(tmp_path, load_format="dummy")
    assert (checkpoint.format, checkpoint.tokenizer_source) == ("dummy", None)
    params = load_params(checkpoint, "float32", mesh)
    specs = param_specs(checkpoint.config)
    assert set(params) == set(specs)
    for path, array in params.items():
        assert array.sharding == named_sharding(mesh, specs[path].axes)
        values = np.asarray(array)
        assert np.std(values) == pytest.approx(0.02, rel=0.25)
        assert np.mean(values) == pytest.approx(1.0 if path.endswith(".scale") else 0.0, abs=0.01)
    drawn = {array.tobytes() for array in map(np.asarray, params.values())}
    assert len(drawn) == len(params)  # no two alike, in no two layers
    assert_same(params, load_params(checkpoint, "float32", mesh))
    other = load_params(checkpoint, "float32", mesh, seed=1)
    assert not any(np.array_equal(params[path], other[path]) for path in params)


# -- GGUF


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "qwen3", "sentencepiece"])
def test_gguf(tmp_path, mesh, kind):
    path = tmp_path / "model.gguf"
    tensors = gguf_files.write_gguf(path, kind)
    for model in (path, tmp_path):  # a folder with one such file will do
        checkpoint = open_checkpoint(model)
        assert checkpoint.format == "gguf"
        params = load_params(checkpoint, "float32", mesh)
        assert set(params) == set(param_specs(checkpoint.config))
        kernel = tensors["model.layers.1.self_attn.q_proj.weight"].T
        np.testing.assert_array_equal(params["layers.1.self_attn.q_proj.kernel"], kernel)
    Tokenizer.load(checkpoint.tokenizer_source)


def test_gguf_faults(tmp_path):
    gguf_files.write_gguf(tmp_path / "a.gguf", "qwen2")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"b\.gguf"):
        open_checkpoint(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files, give one: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_several_devices_share_a_parameter(tmp_path):
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    checkpoint = open_checkpoint(tiny.write_checkpoint("llama", tmp_path))
    params = load_params(checkpoint, "float32", create_mesh(tensor=2))
    assert params["layers.0.mlp.up_proj.kernel"].addressable_shards[0].data.shape == (64, 48)
