"""XLA's options for the runner's programs."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxengine.engine.compilations import compiler_options

GRAPHS, NO_TRITON, NO_SHARDS = (
    "xla_gpu_enable_command_buffer", "xla_gpu_enable_triton_gemm", "xla_gpu_shard_autotuning"
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows", "platform", "size", "processes", "expected"),
    [
        ("decode", 64, "cpu", 1, 1, set()),
        ("decode", 63, "gpu", 1, 1, {GRAPHS}),
        ("decode", 64, "gpu", 1, 1, {GRAPHS, NO_TRITON}),
        ("head", 0, "gpu", 1, 1, {GRAPHS}),
        ("mixed", 0, "gpu", 1, 1, set()),
        ("decode", 64, "gpu", 2, 1, {NO_TRITON}),
        ("mixed", 0, "gpu", 2, 2, {NO_SHARDS}),
    ],
)
def test_options_by_program_and_mesh(name, rows, platform, size, processes, expected):
    devices = np.array([SimpleNamespace(platform=platform)] * size)
    options = compiler_options(name, rows, SimpleNamespace(devices=devices, size=size, is_multi_process=processes > 1))
    assert set(options) == expected
    assert {"CONDITIONAL", "WHILE"} <= set(options.get(GRAPHS, "CONDITIONAL,WHILE").split(","))
