"""A folder's safetensors files, one or several with an index, read tensor by tensor."""

import itertools
import json
import math
import os
import weakref
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from converters import ConversionError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
         "U8": np.dtype(np.uint8)}  # fmt: skip


class SafetensorsFile:
    """One file. Its own library checks it; reading is done here, as that copies twice and holds Python's lock.

    `shapes` and `dtypes` by tensor name. Raises ConversionError for a file that is corrupt or truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="np"):  # header, offsets, size of the file
                pass
            self._descriptor = os.open(path, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path}: corrupt or truncated ({error}); fetch the file again") from error
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        self._start, header = 8 + length, json.loads(os.pread(self._descriptor, length, 8))
        header.pop("__metadata__", None)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: DTYPES.get(entry["dtype"], entry["dtype"]) for name, entry in header.items()}
        self._begin = {name: entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or the part of it that these slices (with steps of 1) cut out. Several threads may read at once.

        Of a matrix, whole rows are one piece of the file, and parts of rows a piece each.
        """
        shape, start = self.shapes[name], self._start + self._begin[name]
        ranges = [range(*(part[i] if i < len(part) else slice(None)).indices(length)) for i, length in enumerate(shape)]
        array = np.empty([len(each) for each in ranges], NUMPY[self.dtypes[name]])
        if array.size == 0:
            return array
        strides = np.cumprod([1, *shape[:0:-1]])[::-1]  # in items
        split = max((i for i, each in enumerate(ranges) if len(each) < shape[i]), default=0)
        rows = array.reshape(-1, math.prod(array.shape[split:])).view(np.uint8)
        for row, place in zip(rows, itertools.product(*ranges[:split])):
            item = sum(i * int(stride) for i, stride in zip(place, strides))
            item += ranges[split].start * int(strides[split]) if shape else 0
            self._fill(memoryview(row), start + item * array.itemsize, name)
        return array

    def _fill(self, left: memoryview, offset: int, name: str) -> None:
        while left:  # a call gives 2 GiB at most
            count = os.preadv(self._descriptor, [left], offset)
            if count == 0:
                raise ConversionError(f"{self.path}: {name} cannot be read: the file has become shorter")
            left, offset = left[count:], offset + count


class SafetensorsCheckpoint:
    """`names()` and `read()` of all files together. Raises ConversionError, which names the file and the fault."""

    def __init__(self, folder: Path | str):
        self.path = Path(folder)

    @cached_property
    def _files(self) -> dict[str, SafetensorsFile]:
        """Open files by tensor name; nothing is read but their headers."""
        if (self.path / SINGLE).is_file():
            single = SafetensorsFile(self.path / SINGLE)
            return dict.fromkeys(single.shapes, single)
        weight_map = self._weight_map()
        lacking = sorted({file for file in weight_map.values() if not (self.path / file).is_file()})
        if lacking:
            raise ConversionError(f"{self.path / INDEX} names files that are not there: {', '.join(lacking)}")
        opened = {file: SafetensorsFile(self.path / file) for file in sorted(set(weight_map.values()))}
        found = {name: file for file, handle in opened.items() for name in handle.shapes}
        wrong = sorted(f"{name} (in {file})" for name, file in weight_map.items() if found.get(name) != file)
        if wrong:
            raise ConversionError(f"{self.path / INDEX} names tensors that are not there: {', '.join(wrong)}")
        return {name: opened[file] for name, file in found.items()}

    def _weight_map(self) -> dict[str, str]:
        path = self.path / INDEX
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except FileNotFoundError as error:
            others = sorted(file.name for file in self.path.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".h5"))
            hint = f"; {', '.join(others)} must be converted to safetensors first" if others else ""
            raise ConversionError(f"{self.path} has neither {SINGLE} nor {INDEX}{hint}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{path}: not an index with a weight_map: {error!r}") from error
        if not isinstance(weight_map, dict) or any(Path(str(f)).name != f for f in weight_map.values()):
            raise ConversionError(f"{path}: weight_map must map tensors to files of the same folder")
        return weight_map

    def names(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor, dtypes that are not served as the file spells them (`I64`)."""
        return {name: (file.shapes[name], file.dtypes[name]) for name, file in self._files.items()}

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor of a dtype that is served, or of U8, or a part; KeyError for a name that is not in `names()`. For
        several threads."""
        try:
            return self._files[name].read(name, part)
        except OSError as error:
            raise ConversionError(f"{self.path}: {name} cannot be read: {error}") from error
