"""Writes a safetensors checkpoint of a real model's shape: bfloat16, sharded, random. For `jaxengine bench load`.

python -m benchmarks.checkpoint --model llama8b FOLDER
"""

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.workloads import SHAPES, Shape, write_checkpoint_config
from converters import families, safetensors_writer
from converters.safetensors_writer import SHARD_BYTES
from jaxengine.models import param_specs
from jaxengine.weights import open_checkpoint

BLOCK = 2**25  # values drawn; each tensor is cut from their endless repetition, as drawing 16 GB takes minutes
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write(shape: Shape, folder: Path, shard_bytes: int = SHARD_BYTES, block: int = BLOCK) -> Path:
    """config.json, the shards and their index; returns the folder. Norms' scales are ones."""
    write_checkpoint_config(shape, folder)
    config = open_checkpoint(folder, load_format="dummy").config
    canonical = {path: spec.shape for path, spec in param_specs(config).items()}
    shapes = {name: t.stored_shape(canonical) for name, t in families.tensors(config.model_type, canonical).items()}
    values = (0.02 * np.random.default_rng(0).standard_normal(block, np.float32)).astype(BFLOAT16)

    def read(name: str) -> np.ndarray:
        return np.ones(shapes[name], BFLOAT16) if name.endswith("norm.weight") else np.resize(values, shapes[name])

    safetensors_writer.write(folder, shapes, BFLOAT16, read, shard_bytes)
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
