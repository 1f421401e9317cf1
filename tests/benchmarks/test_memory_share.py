"""jax's GPU client takes its share of the memory when it starts: by then the share must have been said."""

import os
import subprocess
import sys

import pytest

CHILD = """
import os, sys
import jax, jaxengine.llm

def first_use(**options):
    jax.config.update("jax_num_cpu_devices", 2)  # refused once a client has started
    print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    sys.exit()

from {module} import main
jax.devices = jaxengine.llm.LLM = first_use
sys.argv = sys.argv[1:]
main()
"""


@pytest.mark.parametrize(
    ("module", "arguments", "share"),
    [
        ("jaxengine.cli", ("bench", "throughput", "--gpu-memory-utilization", "0.92"), "0.92"),
        ("benchmarks.offline", ("--model", "tiny"), "0.92"),
    ],
)
def test_the_share_is_said_before_jax_starts(module, arguments, share):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    command = [sys.executable, "-c", CHILD.format(module=module), module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, [share]), done.stderr
