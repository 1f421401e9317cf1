"""A folder of safetensors files as transformers writes them: one, or shards with an index; written tensor by tensor.

The format: github.com/huggingface/safetensors. Its library writes a file whose tensors are all in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import numpy as np

from converters.safetensors_reader import DTYPES, INDEX, SINGLE

SPELLING = {name: spelled for spelled, name in DTYPES.items()}
SHARD_BYTES = 5 * 10**9
Shapes = Mapping[str, tuple[int, ...]]


def write(folder: Path, shapes: Shapes, dtype: np.dtype, read: Callable[[str], np.ndarray], shard_bytes: int) -> None:
    """Tensors of these names and shapes, all of `dtype` (float32, float16 or bfloat16); `read(name)` gives one.

    A file holds at most `shard_bytes`, unless one tensor alone is larger. In memory is one tensor at a time.
    """
    parts = list(_shards(shapes, shard_bytes // dtype.itemsize))
    if len(parts) == 1:
        _write_file(folder / SINGLE, parts[0], dtype, read)
        return
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        _write_file(folder / file, part, dtype, read)
        weight_map |= dict.fromkeys(part, file)
    size = dtype.itemsize * sum(map(prod, shapes.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _shards(shapes: Shapes, most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in order, of at most `most` values together unless one alone has more."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(map(prod, shard.values())) + prod(shape) > most:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_file(path: Path, shapes: Shapes, dtype: np.dtype, read: Callable[[str], np.ndarray]) -> None:
    offsets = pairwise(accumulate((dtype.itemsize * prod(shape) for shape in shapes.values()), initial=0))
    header = json.dumps({"__metadata__": {"format": "pt"}} | {
        name: {"dtype": SPELLING[dtype.name], "shape": shape, "data_offsets": where}
        for (name, shape), where in zip(shapes.items(), offsets)
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (shape, dtype), (name, tensor.shape, tensor.dtype)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
