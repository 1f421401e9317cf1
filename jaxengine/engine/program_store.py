"""Compiled programs on disk, found by what they are made from. jax's own compilation cache is asked with the lowered
program, and to trace and lower one is seconds of Python for a deep model.
"""

import hashlib
import logging
import os
import pickle
import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize

logger = logging.getLogger(__name__)
SOURCES = ("jaxengine", "pallas_kernels")


class ProgramStore:
    """Programs by a digest of all that they depend on: our sources, versions, settings, machine, and `made_from`."""

    def __init__(self, folder: Path, devices: np.ndarray, made_from: Any):
        """`made_from`: whatever the programs close over. Its repr must tell all, and the same in every process."""
        self._devices = list(devices.flat)
        client = self._devices[0].client
        versions = [version(name) for name in ("jax", "jaxlib", "flax", "numpy")]
        settings = {name: value for name, value in jax.config.values.items() if "_cache" not in name}
        machine = client.platform_version, [(device.id, device.device_kind) for device in self._devices], _processor()
        facts = _sources(), versions, sorted(settings.items()), os.environ.get("XLA_FLAGS"), machine, made_from
        self._folder = folder / _digest(facts)

    def place(self, name: str, key: tuple, arguments: tuple) -> Path:
        """Where the program for these arguments is, or will be."""
        leaves, tree = jax.tree.flatten(arguments)
        shapes = [(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves]
        return self._folder / f"{name}-{_digest((key, shapes, tree))}"

    def get(self, place: Path, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The program that lies there, else the one that `lower` gives, which is put there."""
        if place.exists():
            try:
                if self._devices[0].platform == "gpu":  # says where the runtime of Mosaic's kernels lies
                    import jax.experimental.mosaic.gpu  # noqa: F401
                program, takes, gives = pickle.loads(place.read_bytes())
                return deserialize_and_load(program, takes, gives, execution_devices=self._devices)
            except Exception as error:  # whatever a damaged file leads to
                logger.warning("compiled program %s cannot be read, and is compiled again: %r", place, error)
        program = lower().compile()
        try:
            self._put(place, pickle.dumps(serialize(program)))
        except Exception as error:  # a full disk, or a program that jax cannot write
            logger.warning("compiled program %s cannot be kept: %r", place, error)
        return program

    def _put(self, place: Path, data: bytes) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        written = place.with_suffix(f".{os.getpid()}")
        written.write_bytes(data)
        written.replace(place)  # whole, or not at all


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@cache
def _sources() -> str:
    """What tells one version of our code from another."""
    found = hashlib.sha256()
    for package in SOURCES:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            found.update(f"{package}/{path.relative_to(root)}".encode() + path.read_bytes())
    return found.hexdigest()


@cache
def _processor() -> str:
    """What code for this machine's processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
