"""Safetensors: one file or several, read tensor by tensor; what is broken is named."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import ConversionError
from converters.safetensors_reader import SafetensorsCheckpoint
from tests.references import tiny


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["llama_bf16", "qwen2_legacy", "gpt2"])
def test_every_tensor_is_read(tmp_path, variant, shards):
    arrays = tiny.tensors(variant)
    checkpoint = SafetensorsCheckpoint(tiny.write_checkpoint(variant, tmp_path, shards))
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert checkpoint.names() == {name: (x.shape, str(x.dtype)) for name, x in arrays.items()}
    for name, array in arrays.items():
        read = checkpoint.read(name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_a_dtype_that_is_not_served_is_told(tmp_path):
    tiny.write_safetensors({"x": np.zeros(3, np.int64)}, tmp_path)
    assert SafetensorsCheckpoint(tmp_path).names() == {"x": ((3,), "I64")}


def test_no_weights(tmp_path):
    with pytest.raises(ConversionError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        SafetensorsCheckpoint(tmp_path).names()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin must be converted to safetensors"):
        SafetensorsCheckpoint(tmp_path).names()


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_truncated(tmp_path, keep):
    path = tiny.write_checkpoint("llama", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConversionError, match=r"model\.safetensors: corrupt or truncated"):
        SafetensorsCheckpoint(tmp_path).names()


def test_an_index_that_names_missing_files(tmp_path):
    tiny.write_checkpoint("llama", tmp_path, 3)
    for i in (1, 3):
        (tmp_path / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"not there: model-00001-of-\S+, model-00003-of-"):
        SafetensorsCheckpoint(tmp_path).names()


def edited_index(folder, **changes):
    path = tiny.write_checkpoint("llama", folder, 2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))
    return SafetensorsCheckpoint(folder)


def test_an_index_that_names_missing_tensors(tmp_path):
    other = edited_index(tmp_path, ghost="model-00001-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"tensors that are not there: ghost \(in model-00001-of-00002"):
        other.names()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3, None])
def test_an_index_stays_within_its_folder(tmp_path, file):
    other = edited_index(tmp_path, x=file)
    with pytest.raises(ConversionError, match="same folder"):
        other.names()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConversionError, match=r"index\.json"):
        SafetensorsCheckpoint(tmp_path).names()


@pytest.mark.parametrize("part", [(), (slice(2, 5),), (slice(None), slice(3, 7)), (slice(1, 6), slice(0, 1)),
                                  (slice(0, 0), slice(None)), (slice(5, 99), slice(2, 99))])  # fmt: skip
def test_a_part_of_a_tensor(tmp_path, part):
    """What lies beyond the tensor is left out, as NumPy does."""
    tensors = {"matrix": np.arange(56, dtype=np.float32).reshape(7, 8), "vector": np.arange(9, dtype=np.float32)}
    tensors["cube"] = np.arange(7 * 8 * 5, dtype=np.float32).reshape(7, 8, 5)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name in ("matrix", "cube"):
        np.testing.assert_array_equal(checkpoint.read(name, part), tensors[name][part])
    np.testing.assert_array_equal(checkpoint.read("vector", part[:1]), tensors["vector"][part[:1]])
