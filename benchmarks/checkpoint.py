"""Writes a safetensors checkpoint of a real model's shape: bfloat16, sharded, random. For `jaxengine bench load`.

python -m benchmarks.checkpoint --model llama8b FOLDER
"""

import argparse
import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.workloads import SHAPES, Shape, write_checkpoint_config
from converters import families
from jaxengine.models import param_specs
from jaxengine.weights import open_checkpoint

BLOCK = 2**25  # values drawn; each tensor is cut from their endless repetition, as drawing 16 GB takes minutes


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint with this folder's config.json has, under HuggingFace's names."""
    config = open_checkpoint(folder, load_format="dummy").config
    found = {}
    for path, spec in param_specs(config).items():
        name = families.source(config.model_type, path)
        if not name.startswith("lm_head"):
            name = families.FAMILIES[config.model_type].PREFIX + name
        target = families.target(config.model_type, name)
        assert target is not None and target.paths == (path,)
        found[name] = spec.shape[::-1] if target.transposed else spec.shape
    return found


def shards(shapes: dict[str, tuple[int, ...]], most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in order, of at most `most` bytes together unless one alone is larger."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and 2 * (sum(map(prod, shard.values())) + prod(shape)) > most:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    """One file, tensor by tensor; norms' scales are ones."""
    offsets = pairwise(accumulate((2 * prod(shape) for shape in shapes.values()), initial=0))
    header = json.dumps({
        name: {"dtype": "BF16", "shape": shape, "data_offsets": where}
        for (name, shape), where in zip(shapes.items(), offsets)
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            values = np.ones_like(block) if name.endswith("norm.weight") else block
            left = prod(shape)
            while left:
                file.write(values[:left].view(np.uint8))
                left -= min(left, len(values))


def write(shape: Shape, folder: Path, shard_bytes: int = 5 * 10**9, block: int = BLOCK) -> Path:
    """config.json, the shards and their index; returns the folder. One shard at a time, `block` values in memory."""
    write_checkpoint_config(shape, folder)
    values = (0.02 * np.random.default_rng(0).standard_normal(block, np.float32)).astype(ml_dtypes.bfloat16)
    parts = list(shards(tensors(folder), shard_bytes))
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        write_shard(folder / file, part, values)
        weight_map |= dict.fromkeys(part, file)
    size = 2 * sum(prod(shape) for part in parts for shape in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument("--shard-gb", type=float, default=5.0, help="the most that a file holds")
    args = parser.parse_args()
    folder = write(SHAPES[args.model], args.folder, int(args.shard_gb * 1e9))
    files = sorted(folder.glob("*.safetensors"))
    print(f"{folder}: {sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {len(files)} files")


if __name__ == "__main__":
    main()
