"""Runs tests of a mesh in processes of their own, as a CPU is several devices only from its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec

from jaxengine.sharding import create_mesh, named_sharding

CASES = ["eight_devices.py", "data_axis.py", "pipeline.py"]
# Compiling is what these tests spend their time on; the least effort halves it.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.mark.parametrize(
    ("marks", "cases"), [("not full", CASES), *(pytest.param("full", [case], marks=pytest.mark.full) for case in CASES)]
)
def test_on_eight_simulated_devices(marks, cases):
    paths = [str(Path(__file__).with_name(case)) for case in cases]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *paths]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("axes", [("mlp", "heads"), ("expert_mlp", "vocab"), ("mlp", "expert")])
def test_axes_that_collide_are_refused(axes):
    with pytest.raises(ValueError, match="map two dimensions to one mesh axis"):
        named_sharding(create_mesh(), axes)
    assert named_sharding(create_mesh(), ("expert", "hidden", "expert_mlp")).spec == PartitionSpec(
        "expert", None, "tensor"
    )
