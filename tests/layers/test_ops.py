"""What each implementation runs on and takes, and what of it is through Triton."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from jaxengine import LLM
from jaxengine.errors import ConfigError
from jaxengine.layers import ops
from jaxengine.weights import open_checkpoint
from tests.pallas_kernels.lowering import lower_for_cuda

TRITON_CALL, MOSAIC_CALL = "__gpu$xla.gpu.triton", "@mosaic_gpu_v2"
H200 = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")
L40 = SimpleNamespace(platform="gpu", compute_capability="8.9", device_kind="NVIDIA L40")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100")
B200 = SimpleNamespace(platform="gpu", compute_capability="10.0", device_kind="NVIDIA B200")
SIZES = {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "page_size": 16, "tokens": 64}


@pytest.mark.parametrize(
    "attention, cache", [("mosaic", "auto"), ("triton", "auto"), ("mosaic", "fp8"), ("mosaic", "fp8_e5m2")]
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_mosaic_lowers_for_cuda_without_triton(attention, cache, shipped_model):
    """The whole steps of decoding and of prompts, of the shipped model."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**24}
    with LLM(shipped_model, dtype="bfloat16", kv_cache_dtype=cache, **sizes) as llm:
        runner = llm._runner
        runner.attention, keys = attention, dict(runner._all_keys())
        for name, calls in {"decode": 1, "mixed": 2}.items():
            step = partial(getattr(runner._device_steps(), name), *keys[name])
            text = lower_for_cuda(step, *runner._arguments(name, keys[name]))
            assert (text.count(MOSAIC_CALL) == calls) == (attention == "mosaic")
            assert (TRITON_CALL in text) == (attention == "triton")


@pytest.mark.parametrize(
    ("attention", "device", "of_model", "sizes", "message"),
    [
        ("triton", H200, {"head_dim": 96}, {"dtype": "float32"}, None),
        ("triton", B200, {}, {}, None),
        ("triton", H200, {}, {"page_size": 4}, "page_size=4 is below the 8"),
        ("mosaic", H200, {}, {}, None),
        ("mosaic", H200, {"head_dim": 256}, {"dtype": "float16", "kv_cache_dtype": "float16", "page_size": 8}, None),
        ("mosaic", B200, {}, {}, "needs a Hopper GPU .*, this is a NVIDIA B200; use 'triton'"),
        ("mosaic", H200, {}, {"page_size": 4}, "page_size=4 is below the 8"),
        ("mosaic", H200, {"head_dim": 96}, {}, "model.head_dim=96 .*; use 'triton'"),
        ("mosaic", H200, {"num_heads": 130}, {}, "model.num_heads=130 .*; use 'triton'"),
        ("mosaic", H200, {"attention_scales": (0.1, -0.1)}, {}, "scale=-0.1; use 'triton'"),
        ("mosaic", H200, {}, {"dtype": "float32"}, "not dtype='float32' .*; use 'triton'"),
        ("mosaic", H200, {}, {"kv_cache_dtype": "float16"}, "kv_cache_dtype='float16' .*; use 'triton'"),
        ("mosaic", H200, {}, {"kv_cache_dtype": "float8_e4m3fn"}, None),
        ("triton", H200, {}, {"kv_cache_dtype": "float8_e5m2"}, None),
        ("triton", L40, {}, {"kv_cache_dtype": "float8_e4m3fn"}, None),
        ("triton", A100, {}, {}, None),
        (
            "triton",
            A100,
            {},
            {"kv_cache_dtype": "float8_e5m2"},
            "needs a GPU of .* 8.9 .* A100 has 8.0; .* attention='xla'",
        ),
        ("xla", A100, {}, {"kv_cache_dtype": "float8_e4m3fn"}, None),
        ("mosaic", H200, {}, {"tokens": 63}, "max_num_batched_tokens=63 .*; use 'triton'"),
    ],
)
def test_what_a_device_or_model_does_not_allow_is_refused(attention, device, of_model, sizes, message, shipped_model):
    config = open_checkpoint(shipped_model).config
    if "attention_scales" in of_model:
        of_model = of_model | {"num_layers": 2, "windows": (None, None)}
    check = partial(ops.check, attention, replace(config, **of_model), device, **(SIZES | sizes))
    if message is None:
        return check()
    with pytest.raises(ConfigError, match=message):
        check()
