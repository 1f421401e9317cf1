"""MXFP4 against a decoder of its own, value by value; the parts that are read; what does not fit together."""

import ml_dtypes
import numpy as np
import pytest

from converters import ConversionError
from converters.mxfp4 import Mxfp4Checkpoint
from converters.safetensors_reader import SafetensorsCheckpoint
from tests.references import tiny

EXPERTS, SIZE_IN, SIZE_OUT = 2, 96, 6
NAME = "model.layers.0.mlp.experts.down_proj"


def decoded(blocks, scales):
    """[experts, in, out] by the format's definition: sign, two bits of exponent (bias 1), one of mantissa."""
    experts, size_out, groups, half = blocks.shape
    out = np.zeros((experts, groups * 2 * half, size_out))
    for expert, column, group, byte in np.ndindex(*blocks.shape):
        for place in range(2):
            bits = int(blocks[expert, column, group, byte]) >> (4 * place) & 15
            exponent, mantissa = bits >> 1 & 3, bits & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
            value = (-1) ** (bits >> 3) * size * 2.0 ** (int(scales[expert, column, group]) - 127)
            out[expert, 32 * group + 2 * byte + place, column] = value
    return out


def stored(seed=0, name=NAME):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (EXPERTS, SIZE_OUT, SIZE_IN // 32, 16), np.uint8)
    scales = rng.integers(0, 250, blocks.shape[:3], np.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def written(folder, tensors):
    tiny.write_safetensors(tensors, folder)
    return Mxfp4Checkpoint(SafetensorsCheckpoint(folder))


def test_every_value_is_exact(tmp_path):
    tensors = stored()
    checkpoint = written(tmp_path, tensors | {"norm.weight": np.ones(3, np.float32)})
    assert checkpoint.names() == {
        NAME: ((EXPERTS, SIZE_IN, SIZE_OUT), "bfloat16"), "norm.weight": ((3,), "float32")
    }  # fmt: skip
    found = checkpoint.read(NAME)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float64), decoded(*tensors.values()))
    np.testing.assert_array_equal(checkpoint.read("norm.weight", (slice(1, 3),)), np.ones(2))


@pytest.mark.parametrize(
    "part",
    [(slice(1, 2),), (slice(None), slice(40, 70), slice(2, 5)), (slice(0, 1), slice(31, 33)),
     (slice(None), slice(32, 64), slice(None))],
)  # fmt: skip
def test_parts(tmp_path, part):
    checkpoint = written(tmp_path, stored())
    found = checkpoint.read(NAME, part)
    np.testing.assert_array_equal(found, checkpoint.read(NAME)[part])


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_what_does_not_fit_together_is_named(tmp_path, fault):
    tensors = stored()
    scales = tensors.pop(f"{NAME}_scales")
    if fault == "shape":
        tensors[f"{NAME}_scales"] = scales[:, :, :2]
    if fault == "dtype":
        tensors |= {f"{NAME}_scales": scales, f"{NAME}_blocks": tensors[f"{NAME}_blocks"].astype(np.float32)}
    with pytest.raises(ConversionError, match=f"{NAME}_blocks of .*: not MXFP4"):
        written(tmp_path, tensors).names()
