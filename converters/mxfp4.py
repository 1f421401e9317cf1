"""MXFP4 tensors of a safetensors checkpoint, decoded as they are read.

The OCP Microscaling format (MX v1.0): 32 values share a scale, a power of two in E8M0, and are 4 bits each, E2M1. A
tensor `x` [experts, in, out] is stored as `x_blocks` uint8 [experts, out, in / 32, 16], two values a byte, the first in
its low half, and `x_scales` uint8 [experts, out, in / 32].
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from converters import ConversionError
from converters.safetensors_reader import SafetensorsCheckpoint

BLOCK = 32  # values that share a scale
BLOCKS, SCALES = "_blocks", "_scales"
ROWS = 64  # decoded at a time: they stay in the processor's cache until they are transposed
_BYTES = np.arange(256, dtype=np.uint8)
_VALUES = _BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_PAIRS = np.stack([_VALUES[_BYTES & 15], _VALUES[_BYTES >> 4]], axis=1).view(np.uint64)[:, 0]  # of each byte
_SCALES = _BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether config.json says so."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


class Mxfp4Checkpoint:
    """`names()` and `read()` of a checkpoint as if its MXFP4 tensors were of bfloat16, which holds them exactly.

    ConversionError for blocks whose scales are missing or do not fit.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint):
        self.path, self._checkpoint = checkpoint.path, checkpoint

    def names(self) -> dict[str, tuple[tuple[int, ...], str]]:
        stored = self._checkpoint.names()
        found = dict(stored)
        for name, (shape, dtype) in stored.items():
            if not name.endswith(BLOCKS):
                continue
            whole = name.removesuffix(BLOCKS)
            scales = stored.get(whole + SCALES)
            if dtype != "U8" or len(shape) != 4 or shape[3] != BLOCK // 2 or scales != (shape[:3], "U8"):
                raise ConversionError(
                    f"{self.path}: {name} of {dtype} {list(shape)} with {whole + SCALES} of {scales}: not MXFP4"
                )
            del found[name], found[whole + SCALES]
            found[whole] = ((shape[0], BLOCK * shape[2], shape[1]), "bfloat16")
        return found

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        stored = self._checkpoint.names()
        if name + BLOCKS not in stored:
            return self._checkpoint.read(name, part)
        experts, size_out, groups, _ = stored[name + BLOCKS][0]
        shape = experts, BLOCK * groups, size_out
        wanted = [range(*each.indices(length)) for each, length in zip((*part, *[slice(None)] * 3), shape)]
        first, last = wanted[1].start // BLOCK, -(-wanted[1].stop // BLOCK)
        columns = slice(wanted[1].start - BLOCK * first, wanted[1].stop - BLOCK * first)
        found = np.empty([len(each) for each in wanted], ml_dtypes.bfloat16)
        for target, expert in zip(found, wanted[0]):
            where = slice(expert, expert + 1), slice(wanted[2].start, wanted[2].stop), slice(first, last)
            blocks, scales = (self._checkpoint.read(name + kind, where)[0] for kind in (BLOCKS, SCALES))
            for row in range(0, len(blocks), ROWS):
                some = slice(row, row + ROWS)
                target[:, some] = decode(blocks[some], scales[some])[:, columns].T
        return found


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [rows, groups, 16] and [rows, groups] -> bfloat16 [rows, groups * 32]."""
    values = _PAIRS[blocks].view(np.float32).reshape(*scales.shape, BLOCK)
    values *= _SCALES[scales][..., None]
    halves = values.reshape(len(values), -1).view(np.uint16)
    return halves[:, 1::2].view(ml_dtypes.bfloat16)  # the upper ones: the lower are zero
