"""Orbax checkpoints of every layout against the HuggingFace checkpoint that they were made from."""

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jaxengine import LLM, CheckpointError, ConfigError, ParamRule, SamplingParams, UnsupportedModelError, cli
from jaxengine.models import build, nest
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint, orbax_format
from tests import trainer_checkpoints as trainers
from tests.references import tiny
from tests.tiny_llm import CONFIGS, OPTIONS, count_ties, model_folder, shared_llm, tensors
from tests.weight_helpers import assert_same

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
PROMPT = list(range(40, 52))


@pytest.fixture(scope="module")
def mesh():
    return create_mesh()


def params_of(folder, mesh, dtype="float32", **said):
    opened = open_checkpoint(folder, **said)
    assert opened.format == "orbax"
    return load_params(opened, dtype, mesh)


def wanted(variant, folder, mesh):
    return load_params(open_checkpoint(tiny.write_checkpoint(variant, folder)), "float32", mesh)


def check_close(found, want):
    """Bit for bit where a layout is a permutation; a scaled query may lose its last bit."""
    assert set(found) == set(want)
    for path, x in want.items():
        if "q_proj" in path:
            np.testing.assert_allclose(found[path], x, rtol=1e-6, atol=0, err_msg=path)
        else:
            np.testing.assert_array_equal(found[path], x, path)
        assert found[path].sharding == x.sharding and found[path].dtype == x.dtype, path


# -- MaxText


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "llama_llama3",  # interleaved
        "qwen3",
        pytest.param("llama_mqa_head_dim", marks=pytest.mark.full),  # the square root is no power of two
        pytest.param("llama_tied_mha", marks=pytest.mark.full),
        pytest.param("mistral", marks=pytest.mark.full),
        pytest.param("qwen2", marks=pytest.mark.full),
        pytest.param("qwen3_tied_linear", marks=pytest.mark.full),
    ],
)
def test_maxtext(variant, scanned, tmp_path, mesh):
    config = tiny.config(variant)
    params = trainers.maxtext_params(tiny.tensors(variant), config, scanned)
    state = {"params": {"params": params}, "step": 7, "opt_state": trainers.moments(params) if scanned else {}}
    run = trainers.save_steps(tmp_path / "run", [0], items=state)
    want = wanted(variant, tmp_path / "hf", mesh)
    for place in (run, run / "0", run / "0" / "items"):
        found = params_of(place, mesh, config=config)
        check_close(found, want)
    if config.get("head_dim") != 32 or config["model_type"] == "qwen3":
        assert_same(found, want)


def test_maxtexts_saves_for_decoding_have_no_collection(tmp_path, mesh):
    """`_save_decode_checkpoint_nnx` of its utils/generate_param_only_checkpoint.py."""
    params = trainers.maxtext_params(tiny.tensors("llama"), tiny.config("llama"), scanned=False)
    run = trainers.save_steps(tmp_path / "run" / "checkpoints", [0, 40], items=trainers.valued(params))
    assert_same(params_of(run.parent, mesh, config=tiny.config("llama")), wanted("llama", tmp_path / "hf", mesh))


def test_maxtexts_rope_turns_neighbours_where_it_is_llama3s(tmp_path, mesh):
    """By its formula (LLaMARotaryEmbedding), the stored kernels give the scores that transformers' formula gives."""
    config = tiny.config("llama_llama3")
    stored = trainers.maxtext_params(tiny.tensors("llama_llama3"), config, scanned=False)["decoder"]["layers_0"]
    run = trainers.save_tree(tmp_path / "run", {"params": trainers.maxtext_params(
        tiny.tensors("llama_llama3"), config, scanned=False)})  # fmt: skip
    canonical = params_of(run, mesh, config=config)
    angles = np.array([3.0, 11.0])[:, None] * 50.0 ** -np.linspace(0, 1, 8)  # of two positions
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 64))

    def neighbours(y):  # [2, heads, 16]
        cos, sin = np.repeat(np.cos(angles), 2, -1)[:, None], np.repeat(np.sin(angles), 2, -1)[:, None]
        turned = np.stack([-y[..., 1::2], y[..., ::2]], -1).reshape(y.shape)
        return y * cos + turned * sin

    def halves(y):
        cos, sin = np.tile(np.cos(angles), 2)[:, None], np.tile(np.sin(angles), 2)[:, None]
        return y * cos + np.concatenate([-y[..., 8:], y[..., :8]], -1) * sin

    attention = stored["self_attention"]
    q, k = (neighbours(np.einsum("th,hnd->tnd", x, attention[n]["kernel"])) for n in ("query", "key"))
    q2, k2 = (
        halves((x @ np.asarray(canonical[f"layers.0.self_attn.{n}_proj.kernel"])).reshape(2, -1, 16)) for n in "qk"
    )
    theirs, ours = (np.einsum("nd,nd->n", a[0], np.repeat(b[1], 2, 0)) for a, b in ((q, k), (q2, k2)))
    np.testing.assert_allclose(theirs, ours * 16**-0.5, rtol=1e-5)


def test_without_the_permutation_it_would_show(tmp_path, mesh):
    config = tiny.config("llama_llama3")
    tree = {"params": trainers.maxtext_params(tiny.tensors("llama_llama3"), config, scanned=True)}
    folder = trainers.save_tree(tmp_path / "run", tree)
    want = wanted("llama_llama3", tmp_path / "hf", mesh)
    checkpoint = open_checkpoint(folder, config=config)
    for interleaved, same in ((True, True), (False, False)):
        mapping = {
            rf"params\.{pattern}": replace(rule, hook=rule.hook and replace(rule.hook, interleaved=interleaved))
            if "query" in pattern or "key" in pattern else rule
            for pattern, rule in checkpoint.reader.mapping.items()
        }  # fmt: skip
        found = params_of(folder, mesh, config=config, mapping=mapping)
        assert all(np.array_equal(found[path], want[path]) for path in want) == same


# -- Tunix


@pytest.mark.parametrize(
    "variant", ["llama", "qwen2", "qwen3", *(pytest.param(v, marks=pytest.mark.full) for v in
                ("llama_llama3", "llama_tied_mha", "qwen3_tied_linear"))]
)  # fmt: skip
def test_tunix(variant, tmp_path, mesh):
    config = tiny.config(variant)
    params = trainers.tunix_params(tiny.tensors(variant), config)
    run = trainers.save_steps(
        tmp_path / "run", [9, 10], model_params=trainers.valued(params), optimizer_state={"mu": trainers.valued(params)}
    )
    shutil.rmtree(run / "9")
    want = wanted(variant, tmp_path / "hf", mesh)
    for place in (run, run / "10", run / "10" / "model_params"):
        assert_same(params_of(place, mesh, config=config), want)


# -- canonical names


@pytest.fixture(scope="module")
def canonical(tmp_path_factory, mesh):
    return wanted("qwen3", tmp_path_factory.mktemp("hf") / "hf", mesh)


def saves(params, module):
    """Name -> how it is saved below a folder."""
    state, item = nnx.state(module), nest(params)
    return {
        "state": lambda folder: trainers.save_tree(folder / "x", state),
        "pure": lambda folder: trainers.save_tree(folder / "x", nnx.to_pure_dict(state)),
        "flat": lambda folder: trainers.save_tree(folder / "x", params),
        "listed": lambda folder: trainers.save_steps(
            folder / "x",
            [1],
            default={"params": item | {"layers": list(item["layers"].values())}, "step": 3, "why": "a note"},
        ),
        "manager": lambda folder: trainers.save_steps(folder / "x", [1, 2, 10], default=state),
        "items": lambda folder: trainers.save_steps(folder / "x", [4], params=item, opt={"mu": item}),
        "nested": lambda folder: trainers.save_steps(
            folder / "x", [4], default={"model": state, "opt_state": trainers.moments(item)}
        ),
        "transformers": lambda folder: trainers.save_tree(folder / "x", {"params": tiny.tensors("qwen3")}),
    }


def test_canonical_names_however_they_are_saved(tmp_path, mesh, canonical):
    config = tiny.config("qwen3")
    module = build(open_checkpoint(tiny.write_checkpoint("qwen3", tmp_path / "hf")).config, canonical, 64)
    for name, save in saves(canonical, module).items():
        folder = tmp_path / name
        folder.mkdir()
        assert_same(params_of(save(folder), mesh, config=config), canonical)


def test_the_newest_step_that_is_whole(tmp_path, mesh, canonical):
    run = trainers.save_steps(tmp_path / "run", [9], default=nest(canonical))
    twice = {path: 2 * x for path, x in canonical.items()}
    trainers.save_steps(tmp_path / "other", [10], default=nest(twice))
    (tmp_path / "other" / "10").rename(run / "step_10")
    (run / "11.orbax-checkpoint-tmp-12").mkdir()  # a save under way
    found = params_of(run, mesh, config=tiny.config("qwen3"))
    np.testing.assert_array_equal(found["norm.scale"], twice["norm.scale"])
    found = params_of(run / "9", mesh, config=tiny.config("qwen3"))
    np.testing.assert_array_equal(found["norm.scale"], canonical["norm.scale"])


# -- what is read, and where to


def test_only_what_is_needed_is_read(tmp_path, mesh, monkeypatch):
    handler = ocp.type_handlers.ArrayHandler
    read, deserialize = [], handler.deserialize

    async def recording(self, infos, *args):
        read.extend(info.name for info in infos)
        return await deserialize(self, infos, *args)

    config = tiny.config("llama")
    params = trainers.maxtext_params(tiny.tensors("llama"), config, scanned=True)
    state = {"params": {"params": params}, "opt_state": trainers.moments(params), "step": jnp.ones(())}
    run = trainers.save_steps(tmp_path / "run", [3], items=state)
    monkeypatch.setattr(handler, "deserialize", recording)
    monkeypatch.setattr(orbax_format, "CHUNK_BYTES", 60_000)  # several at a time, but not all
    opened = open_checkpoint(run, config=config)
    assert read == []
    seen = []
    load_params(opened, "float32", mesh, on_tensor=lambda done, total: seen.append((done, total)))
    assert len(read) == len(set(read)) == 12
    assert all(name.startswith("params.params.") for name in read)
    assert len(seen) > 3 and seen[-1] == (30, 30)


def test_sharded(tmp_path):
    """Four devices: what is canonical lands on its sharding at once, the rest comes in shares."""
    config = tiny.config("llama_llama3")
    hf = tiny.write_checkpoint("llama_llama3", tmp_path / "hf")
    for name, tree in (
        ("scanned", {"params": trainers.maxtext_params(tiny.tensors("llama_llama3"), config, scanned=True)}),
        ("tunix", trainers.tunix_params(tiny.tensors("llama_llama3"), config)),
    ):
        trainers.save_tree(tmp_path / name, tree)
        shutil.copy(hf / "config.json", tmp_path / name)
    code = f"""
        import os
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        import numpy as np
        from pathlib import Path
        from jaxengine.sharding import create_mesh
        from jaxengine.weights import load_params, open_checkpoint, orbax_format
        asked, read = [], orbax_format._read
        def recording(tree, want):
            found = read(tree, want)
            for place, x in found.items():
                assert x.sharding == want[place].sharding and x.dtype == want[place].dtype
                asked.append(max(shard.data.size / x.size for shard in x.addressable_shards))
            return found
        orbax_format._read = recording
        mesh, folder = create_mesh(tensor=2, data=2), Path({str(tmp_path)!r})
        want = load_params(open_checkpoint(folder / "hf"), "float32", mesh)
        for name in ("scanned", "tunix"):
            found = load_params(open_checkpoint(folder / name), "float32", mesh)
            for path, x in want.items():
                assert found[path].sharding == x.sharding, path
                np.testing.assert_array_equal(found[path], x, path)
        assert asked.count(1 / 4) >= 20 and asked.count(1 / 2) >= 4, asked
        print("sharded")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "sharded", done.stderr


# -- what is said of the rest


def test_an_unknown_layout_is_shown(tmp_path, mesh):
    tree = {"net": {f"block_{i}": {"w": jnp.ones((4, 8), jnp.bfloat16)} for i in range(12)}, "head": jnp.ones(3)}
    folder = trainers.save_tree(tmp_path / "x", tree)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, config=tiny.config("llama"))
    message = str(caught.value)
    assert "a layout that is not known" in message and "param_mapping={pattern: ParamRule}" in message
    assert message.endswith("The tree:\n  head [3] float32\n  net.block_*.w [4, 8] bfloat16 (12 times)")
    many = {f"{chr(97 + i % 26)}{chr(97 + i // 26)}": jnp.ones(i % 7 + 1) for i in range(60)}
    with pytest.raises(CheckpointError, match=r"and 20 more$"):
        open_checkpoint(trainers.save_tree(tmp_path / "many", many), config=tiny.config("llama"))


def test_a_table_for_a_layout_of_ones_own(tmp_path, mesh, canonical):
    tree = {"net": {path.replace(".", "/"): x for path, x in canonical.items()}, "mu": canonical["norm.scale"]}
    folder = trainers.save_tree(tmp_path / "x", tree)
    mapping = {"mu": ParamRule(())} | {f"net.{path.replace('.', '/')}": ParamRule(path) for path in canonical}
    assert_same(params_of(folder, mesh, config=tiny.config("qwen3"), mapping=mapping), canonical)
    del mapping["mu"]
    with pytest.raises(CheckpointError, match=r"unexpected: mu \[64\]"):
        params_of(folder, mesh, config=tiny.config("qwen3"), mapping=mapping)


def test_faults(tmp_path, mesh, canonical):
    config = tiny.config("llama")
    params = trainers.maxtext_params(tiny.tensors("llama"), config, scanned=True)
    folder = trainers.save_tree(tmp_path / "x", {"params": params})
    with pytest.raises(CheckpointError, match=r"\(MaxText\) does not say what model it is of: give config="):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:  # as many numbers, in other heads
        params_of(folder, mesh, config=config | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    assert (
        "of shape [64, 3, 4, 16], no layers.0.self_attn.q_proj.kernel and layers.1.self_attn.q_proj.kernel and "
        "layers.2.self_attn.q_proj.kernel (the config makes it [64, 3, 2, 32]): decoder.layers.self_attention.query"
    ) in str(caught.value)
    for model_type, name in (("gpt2", "MaxText"), ("mistral", "Tunix")):
        tree = params if name == "MaxText" else trainers.tunix_params(tiny.tensors("llama"), config)
        where = trainers.save_tree(tmp_path / name, tree)
        with pytest.raises(UnsupportedModelError, match=f"{name}'s names for model_type='{model_type}' are not known"):
            open_checkpoint(where, config=tiny.config(model_type))
    two = trainers.save_tree(tmp_path / "two", {"params": nest(canonical), "model": nest(canonical)})
    with pytest.raises(CheckpointError, match="holds 2 models"):
        open_checkpoint(two, config=tiny.config("qwen3"))
    items = trainers.save_steps(tmp_path / "items", [1], mine={"a": jnp.ones(2)}, other={"a": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="several trees, give the one of the parameters: mine, other"):
        open_checkpoint(items)
    only_moments = trainers.save_tree(tmp_path / "moments", {"opt_state": trainers.moments(params)})
    with pytest.raises(CheckpointError, match="not known"):
        open_checkpoint(only_moments, config=config)
    hf = tiny.write_checkpoint("llama", tmp_path / "hf")
    with pytest.raises(ConfigError, match="is for parameters in memory or in an Orbax checkpoint"):
        open_checkpoint(hf, config=config)
    with pytest.raises(ConfigError, match="is for parameters in memory or in an Orbax checkpoint"):
        open_checkpoint(folder, config=config, load_format="dummy")
    with pytest.raises(ConfigError, match="hf_overrides="):
        open_checkpoint(folder, config=config, hf_overrides={"vocab_size": 3})
    with pytest.raises(CheckpointError, match="is of format"):
        open_checkpoint(hf, load_format="orbax")


def test_where_the_config_is_found(tmp_path, mesh):
    config = tiny.config("llama")
    params = trainers.maxtext_params(tiny.tensors("llama"), config, scanned=True)
    run = trainers.save_steps(tmp_path / "run" / "checkpoints", [5], items={"params": {"params": params}})
    for place in (run.parent, run, run / "5", run / "5" / "items"):
        (place / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        for opened in (open_checkpoint(run.parent), open_checkpoint(run / "5" / "items")):
            assert opened.config.model_type == "llama"
            assert opened.config.dtype == "float32"  # what is stored
        (place / "config.json").rename(tmp_path / "kept.json")
    assert open_checkpoint(run, config=tmp_path / "kept.json").config.num_layers == 3


# -- engines


@pytest.mark.parametrize("layout", ["MaxText", "a table"])
def test_served(layout, tmp_path):
    """And updated: without config.json the engine's config holds, and its table where a layout is not known."""
    if layout == "MaxText":
        params, mapping = trainers.maxtext_params(tensors(), CONFIGS["llama"], scanned=True), None
        run = trainers.save_steps(tmp_path / "run", [0], items={"params": {"params": params}, "step": 0})
    else:
        mapping = {r"net\.(.*)": ParamRule(r"\1")}
        held = load_params(open_checkpoint(model_folder()), "float32", create_mesh())
        run = trainers.save_steps(tmp_path / "run", [0], default={"net": nest(held)})
    with LLM(str(run), config=CONFIGS["llama"], param_mapping=mapping, **OPTIONS) as llm:
        llm._runner._programs = shared_llm()._runner._programs
        want = shared_llm().generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        assert count_ties("llama", PROMPT, want) == 0
        for _ in range(2):
            assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == want
            llm.update_weights(run / "0")


def test_converted(tmp_path):
    """MaxText's to safetensors, bit for bit (the square root of 16 is exact), and to canonical Orbax."""
    params = trainers.maxtext_params(tensors(), CONFIGS["llama"], scanned=True)
    run = trainers.save_steps(tmp_path / "run", [0], items={"params": {"params": params}})
    for to in ("safetensors", "orbax"):
        options = ["--to", to, "--config", str(model_folder() / "config.json")]
        assert CliRunner().invoke(cli.app, ["convert", str(run), str(tmp_path / to), *options]).exit_code == 0
    assert load_file(tmp_path / "safetensors" / "model.safetensors").keys() == tensors().keys()
    want = load_params(open_checkpoint(model_folder()), "float32", create_mesh())
    for to in ("safetensors", "orbax"):
        assert_same(load_params(open_checkpoint(tmp_path / to), "float32", create_mesh()), want)
