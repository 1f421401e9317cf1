"""The random checkpoint is one that the engine loads, and `bench load` measures."""

import json

import pytest
from safetensors import safe_open

from benchmarks.checkpoint import write
from benchmarks.workloads import SHAPES
from jaxengine.benchmark import load
from jaxengine.errors import UnsupportedError
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(SHAPES["tiny"], tmp_path_factory.mktemp("random"), shard_bytes=300_000, block=1000)


def test_it_is_a_whole_sharded_checkpoint(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 310_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name == "lm_head.weight" or name.startswith("model.")
        with safe_open(folder / file, framework="np") as opened:
            assert name in opened.keys()
    params = load_params(open_checkpoint(folder), "bfloat16", create_mesh())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in params.values())
    assert float(params["norm.scale"].min()) == 1.0
    kernel = params["layers.0.mlp.up_proj.kernel"].astype("float32")
    assert 0.015 < float(kernel.std()) < 0.025


def test_loading_is_measured(folder, shipped_model):
    steps = []
    result = load.run(folder, lambda *step: steps.append(step))
    assert steps == [(i, 4) for i in range(1, 5)]
    assert result["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert len(result["bytes_per_s"]) == 4 and min(result["bytes_per_s"].values()) > 0
    assert result["files"] > 1 and result["upload_bytes_per_s"] is None  # a CPU
    json.dumps(result)
    assert "load from disk" in load.table(result) and "host to device             -" in load.table(result)


def test_only_safetensors_is_measured(smollm2):
    with pytest.raises(UnsupportedError, match="is of format gguf"):
        load.run(smollm2)
