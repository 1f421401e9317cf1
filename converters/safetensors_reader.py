"""A folder's safetensors files, one or several with an index, read tensor by tensor."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from converters import ConversionError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsCheckpoint:
    """`names()` and `read()` of all files together. Raises ConversionError, which names the file and the fault."""

    def __init__(self, folder: Path | str):
        self.path = Path(folder)

    @cached_property
    def _files(self) -> dict[str, Any]:
        """Open files by tensor name; nothing is read but their headers."""
        if (self.path / SINGLE).is_file():
            file = _open(self.path / SINGLE)
            return dict.fromkeys(file.keys(), file)
        weight_map = self._weight_map()
        lacking = sorted({file for file in weight_map.values() if not (self.path / file).is_file()})
        if lacking:
            raise ConversionError(f"{self.path / INDEX} names files that are not there: {', '.join(lacking)}")
        opened = {file: _open(self.path / file) for file in sorted(set(weight_map.values()))}
        found = {name: file for file, handle in opened.items() for name in handle.keys()}
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
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        return {n: (tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype())) for n, s in slices.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor; KeyError for a name that is not in `names()`."""
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise ConversionError(f"{self.path}: {name} cannot be read: {error}") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: corrupt or truncated ({error}); fetch the file again") from error
