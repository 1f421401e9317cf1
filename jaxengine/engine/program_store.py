"""Compiled programs on disk, found by what they are made from. jax's own compilation cache is asked with the lowered
program, and to trace and lower one is seconds of Python for a deep model.
"""

import hashlib
import logging
import os
import pickle
import platform
import secrets
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
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
# Settings that say where, and what, jax's own cache keeps.
UNRELATED = {
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
}  # fmt: skip


class ProgramStore:
    """Programs by a digest of all that they depend on: our sources, versions, settings, machine, and `made_from`."""

    def __init__(self, folder: Path, devices: np.ndarray, made_from: Any):
        """`made_from`: whatever the programs close over. Its repr must tell all, and the same in every process."""
        self._devices = list(devices.flat)
        kinds = [(device.id, device.device_kind, getattr(device, "core_count", None)) for device in self._devices]
        machine = self._devices[0].client.platform_version, kinds, _processor()
        self._folder = folder / _digest((SOURCES, [version(name) for name in PACKAGES], machine, made_from))

    def place(self, name: str, key: tuple, arguments: tuple) -> Path:
        """Where the program for these arguments is, or will be, under jax's present settings."""
        leaves, tree = jax.tree.flatten(arguments)
        shapes = [(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves]
        settings = sorted((name, value) for name, value in jax.config.values.items() if name not in UNRELATED)
        return self._folder / f"{name}-{_digest((key, shapes, tree, settings, os.environ.get('XLA_FLAGS')))}"

    def get(self, place: Path, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The program that lies there, else the one that `lower` gives, which is put there."""
        if place.exists():
            try:
                return self._read(place)
            except Exception as error:  # whatever a damaged file leads to
                logger.warning("compiled program %s cannot be read, and is compiled again: %r", place, error)
        program = lower().compile()
        try:
            _write(place, pickle.dumps(serialize(program)))
        except Exception as error:  # a full disk, or a program that jax cannot write
            logger.warning("compiled program %s cannot be kept: %r", place, error)
        return program

    def _read(self, place: Path) -> jax.stages.Compiled:
        found = place.read_bytes()
        checksum, data = found[:32], found[32:]
        if hashlib.sha256(data).digest() != checksum:
            raise ValueError("its checksum is another")
        client = self._devices[0].client
        if client.platform == "gpu":  # says where the runtime of Mosaic's kernels lies
            import jax.experimental.mosaic.gpu  # noqa: F401
        program, takes, gives = pickle.loads(data)
        return deserialize_and_load(program, takes, gives, backend=client, execution_devices=self._devices)


def _write(place: Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    written = place.with_suffix(f".{secrets.token_hex(8)}")  # others may write the same
    try:
        written.write_bytes(hashlib.sha256(data).digest() + data)
        written.replace(place)  # whole, or not at all
    finally:
        written.unlink(missing_ok=True)


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _sources() -> str:
    """What tells one version of our code from another."""
    found = hashlib.sha256()
    for package in ("jaxengine", "pallas_kernels"):
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            found.update(f"{package}/{path.relative_to(root)}".encode() + path.read_bytes())
    return found.hexdigest()


SOURCES = _sources()  # as they are imported, not as somebody edits them later


@cache
def _processor() -> str:
    """What code for this machine's processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
