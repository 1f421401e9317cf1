"""Weights out and in again: Orbax, safetensors, the tokenizer that comes along."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from jaxengine.errors import CheckpointError
from jaxengine.sharding import create_mesh
from jaxengine.tokenizer import Tokenizer
from jaxengine.weights import load_params, open_checkpoint, save_checkpoint
from tests.references import gguf_files, tiny
from tests.weight_helpers import assert_same, edit_json


@pytest.fixture(scope="module")
def mesh():
    return create_mesh()


@pytest.mark.parametrize("variant", ["llama_yarn_betas", "gpt2_bare", "qwen2_legacy"])
def test_orbax_and_back(tmp_path, mesh, variant):
    source = tiny.write_checkpoint(variant, tmp_path / "source")
    edit_json(source / "generation_config.json", eos_token_id=9, top_k=3)
    checkpoint = open_checkpoint(source)
    params = load_params(checkpoint, checkpoint.config.dtype, mesh)
    save_checkpoint(checkpoint, params, tmp_path / "new" / "saved")
    saved = open_checkpoint(tmp_path / "new" / "saved")
    assert saved.format == "orbax"
    assert saved.config == checkpoint.config
    assert saved.sampling_defaults == {"top_k": 3}
    assert_same(params, load_params(saved, checkpoint.config.dtype, mesh))
    assert_same(load_params(checkpoint, "bfloat16", mesh), load_params(saved, "bfloat16", mesh))
    with pytest.raises(CheckpointError, match="is there already"):
        save_checkpoint(checkpoint, params, tmp_path / "new" / "saved")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("variant", "shard_bytes"),
    [pytest.param(variant, 10**9 if i % 2 else 60_000, marks=pytest.mark.full if i % 6 else ())
     for i, variant in enumerate(tiny.variants())],
)  # fmt: skip
def test_safetensors_to_orbax_to_safetensors_changes_no_bit(tmp_path, mesh, variant, shard_bytes):
    source = open_checkpoint(tiny.write_checkpoint(variant, tmp_path / "source"))
    dtype = source.config.dtype
    save_checkpoint(source, load_params(source, dtype, mesh), tmp_path / "orbax")
    orbax = open_checkpoint(tmp_path / "orbax")
    save_checkpoint(orbax, load_params(orbax, dtype, mesh), tmp_path / "back", "safetensors", shard_bytes)
    back = open_checkpoint(tmp_path / "back")
    assert (back.format, back.config) == ("safetensors", source.config)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 60_000)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = tiny.tensors(variant)
    if variant == "gpt2_bare":  # the oldest files have no prefix, and the masks among the tensors
        expected = {f"transformer.{name}": t for name, t in expected.items() if not name.endswith(".attn.bias")}
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
        assert stored[name].tobytes() == tensor.tobytes(), name


def test_orbax_faults(tmp_path, mesh):
    checkpoint = open_checkpoint(tiny.write_checkpoint("llama", tmp_path / "source"))
    params = load_params(checkpoint, "float32", mesh)
    wrong = {path: array for path, array in params.items() if path != "norm.scale"} | {"extra.scale": jnp.ones(3)}
    with pytest.raises(CheckpointError, match=r"unexpected: extra\.scale \[3\]\n  missing: norm\.scale"):
        save_checkpoint(checkpoint, wrong, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_checkpoint(checkpoint, params, tmp_path / "saved")
    other = open_checkpoint(tmp_path / "saved", hf_overrides={"intermediate_size": 48, "tie_word_embeddings": True})
    with pytest.raises(CheckpointError) as caught:
        load_params(other, "float32", mesh)
    assert "of shape [64, 96], where the config says [64, 48]: layers.0.mlp.up_proj.kernel" in str(caught.value)
    assert "unexpected: lm_head.kernel [64, 128]" in str(caught.value)
    (tmp_path / "saved" / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="not a complete Orbax checkpoint"):
        load_params(open_checkpoint(tmp_path / "saved"), "float32", mesh)


def test_damaged_orbax(tmp_path, mesh):
    """In a process of its own: reads that are under way when Orbax gives up complain when they find its loop closed."""
    checkpoint = open_checkpoint(tiny.write_checkpoint("llama", tmp_path / "source"))
    save_checkpoint(checkpoint, load_params(checkpoint, "float32", mesh), tmp_path / "saved")
    data = max((tmp_path / "saved").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    script = (
        "from jaxengine.sharding import create_mesh; from jaxengine.weights import load_params, open_checkpoint; "
        f"load_params(open_checkpoint({str(tmp_path / 'saved')!r}), 'float32', create_mesh())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr
    assert "cannot be read, it may be damaged" in done.stderr


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "sentencepiece"])
def test_a_gguf_files_tokenizer_comes_along(tmp_path, mesh, kind):
    gguf_files.write_gguf(tmp_path / "model.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    save_checkpoint(checkpoint, load_params(checkpoint, "float32", mesh), tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    assert saved.config == checkpoint.config
    before, after = Tokenizer.load(checkpoint.tokenizer_source), Tokenizer.load(saved.tokenizer_source)
    for text in gguf_files.texts():
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == before.decode(ids)
    assert after.special_tokens == before.special_tokens
    assert after.chat_templates == before.chat_templates
