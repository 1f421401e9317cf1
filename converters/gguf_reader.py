"""The GGUF container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata, and tensors as float32.

The header is parsed here: the reader of the `gguf` package takes two seconds over a vocabulary of 49,000 tokens. Its
dequantization is used, the same that transformers uses.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters import ConversionError

QUANTIZATIONS = {
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"
}  # fmt: skip
# Value types by number: 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]  # in NumPy's order: the last dimension is the one that is quantized in blocks
    kind: int  # ggml_type
    offset: int  # behind the header


class GgufFile:
    """An open file: `metadata` by key, `tensors` by name. Raises ConversionError naming the file and the fault."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ConversionError(f"{self.path}: cannot be read: {error}") from error
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, _Tensor] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, ConversionError):
                raise
            end = self._at >= len(self._bytes) or isinstance(error, struct.error)
            what = "it ends within its header (truncated?)" if end else f"corrupt header at byte {self._at}: {error}"
            raise ConversionError(f"{self.path}: {what}") from error

    def _fault(self, what: str) -> ConversionError:
        return ConversionError(f"{self.path}: {what}")

    # -- header

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._bytes, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        size = self._scalar("<Q")
        raw = self._bytes[self._at : self._at + size]
        if len(raw) != size:
            raise struct.error("string beyond the end")
        self._at += size
        return raw.decode()

    def _strings(self, count: int) -> list[str]:
        """A vocabulary: the one place where it pays to write a tight loop."""
        unpack, raw, at, found = struct.Struct("<Q").unpack_from, self._bytes, self._at, []
        for _ in range(count):
            (size,) = unpack(raw, at)
            found.append(raw[at + 8 : at + 8 + size])
            at += 8 + size
        if at > len(raw):
            raise struct.error("string beyond the end")
        self._at = at
        return [text.decode() for text in found]

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"value type {kind} is unknown")
        item, count = self._scalar("<I"), self._scalar("<Q")
        if item == _STRING:
            return self._strings(count)
        if item not in _SCALARS:
            raise ValueError(f"arrays of type {item} are not supported")
        dtype = np.dtype(_SCALARS[item])
        if count > len(self._bytes) - self._at:
            raise struct.error("array beyond the end")
        values = np.frombuffer(self._bytes, dtype, count, self._at).tolist()
        self._at += count * dtype.itemsize
        return values

    def _parse(self) -> None:
        magic = self._bytes[:4]
        if magic != b"GGUF":
            raise self._fault(f"not a GGUF file: it begins with {magic!r}")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            order = "big-endian files are not supported" if version & 0xFFFF == 0 else "2 and 3 are supported"
            raise self._fault(f"GGUF version {version}: {order}")
        tensors, pairs = self._scalar("<Q"), self._scalar("<Q")
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        for _ in range(tensors):
            name, dims = self._string(), self._scalar("<I")
            if dims > _MAX_DIMS:
                raise ValueError(f"tensor {name!r} has {dims} dimensions")
            shape = tuple(self._scalar("<Q") for _ in range(dims))[::-1]
            if name in self.tensors:
                raise self._fault(f"two tensors are called {name!r}")
            self.tensors[name] = _Tensor(shape, self._scalar("<I"), self._scalar("<Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._fault(f"general.alignment={alignment!r} must be a positive integer")
        self._data = -(-self._at // alignment) * alignment

    # -- tensors

    def check_tensors(self) -> None:
        """Every tensor of a kind that can be read, and all of it there; the faults are told together."""
        unread = {name: _kind_name(t.kind) for name, t in self.tensors.items()}
        unread = {name: kind for name, kind in unread.items() if kind not in QUANTIZATIONS}
        if unread:
            kinds = ", ".join(sorted(set(unread.values())))
            raise self._fault(
                f"quantized as {kinds} ({len(unread)} tensors, the first is {next(iter(unread))!r}); "
                f"supported: {', '.join(sorted(QUANTIZATIONS))}"
            )
        faults = []
        for name, tensor in self.tensors.items():
            try:
                end = self._data + tensor.offset + _byte_size(tensor)
            except ValueError as error:
                faults.append(f"{name}: {error}")
                continue
            if end > len(self._bytes):
                faults.append(f"{name}: ends at byte {end}")
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise self._fault(f"truncated or corrupt, {len(self._bytes)} bytes long: {'; '.join(faults[:5])}{more}")

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantized: float32 of its shape."""
        from gguf import quants
        from gguf.constants import GGMLQuantizationType

        tensor = self.tensors[name]
        rows = np.frombuffer(self._bytes, np.uint8, _byte_size(tensor), self._data + tensor.offset)
        width = tensor.shape[-1] if tensor.shape else 1
        rows = rows.reshape(*tensor.shape[:-1], -1) if width and rows.size else rows
        kind = GGMLQuantizationType(tensor.kind)
        if kind == GGMLQuantizationType.F16:  # gguf takes these two in their own dtype, the others as bytes
            rows = rows.view(np.float16)
        elif kind == GGMLQuantizationType.F32:
            rows = rows.view(np.float32)
        return np.asarray(quants.dequantize(rows, kind), np.float32).reshape(tensor.shape)


def _kind_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind}"


def _byte_size(tensor: _Tensor) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    if tensor.shape and tensor.shape[-1] % block:
        raise ValueError(f"rows of {tensor.shape[-1]} are no multiple of {block}")
    count = 1
    for length in tensor.shape:
        count *= length
    return count // block * size


def require(file: GgufFile, key: str, valid: Callable[[Any], bool], want: str, default: Any = None) -> Any:
    """The value of a metadata key if it is valid; ConversionError if not, or if there is neither value nor default."""
    value = file.metadata.get(key, default)
    if value is None:
        raise ConversionError(f"{file.path}: metadata lack {key}")
    if not valid(value):
        shown = f"{value!r:.60}..." if len(repr(value)) > 60 else repr(value)
        raise ConversionError(f"{file.path}: {key}={shown} must be {want}")
    return value


def is_list(kind: type | tuple[type, ...], length: int | None = None) -> Callable[[Any], bool]:
    """A check for `require`: a list of `length` (any but 0) items of a kind."""
    return lambda v: isinstance(v, list) and all(isinstance(x, kind) for x in v) and len(v) == (length or len(v) or 1)
