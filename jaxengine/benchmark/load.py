"""How fast a safetensors checkpoint comes onto the device, beside the disk and the way from host to device."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxengine.benchmark.device import upload_rate
from jaxengine.errors import UnsupportedError
from jaxengine.sharding import create_mesh
from jaxengine.weights import Checkpoint, load_params, open_checkpoint

BLOCK = 2**24


def run(model: str | os.PathLike, on_step: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Bytes per second of reading the files and of loading them in their own dtype, from the disk and from memory.

    From the disk as far as the system lets go of its copies when asked; a rate like that from memory says it did not.
    `on_step(done, total)` reports progress. Raises CheckpointError, and UnsupportedError for another format.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.format != "safetensors":
        raise UnsupportedError(f"{checkpoint.path} is of format {checkpoint.format}: only safetensors is measured")
    files = sorted(checkpoint.path.glob("model*.safetensors"))
    size, rates = sum(file.stat().st_size for file in files), {}
    steps = [(what, place) for place in ("disk", "memory") for what in ("read", "load")]
    for done, (what, place) in enumerate(steps, 1):
        if place == "disk":
            forget(files)
        rates[f"{what}_from_{place}"] = size / (read(files) if what == "read" else load(checkpoint))
        on_step(done, len(steps))
    device = jax.devices()[0]
    upload = None if device.platform == "cpu" else upload_rate()  # a CPU's arrays may stay where they are
    shares = {}
    for place in ("disk", "memory"):
        limit = min(rates[f"read_from_{place}"], upload or float("inf"))
        shares[place] = rates[f"load_from_{place}"] / limit
    return {"device": device.device_kind, "bytes": size, "files": len(files), "bytes_per_s": rates,
            "upload_bytes_per_s": upload, "shares": shares}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """What `run` gave, for people."""
    lines = [f"{result['bytes'] / 1e9:.2f} GB in {result['files']} files, {result['device']}"]
    lines += [f"{name.replace('_', ' '):<20}{rate / 1e9:8.2f} GB/s" for name, rate in result["bytes_per_s"].items()]
    upload = result["upload_bytes_per_s"]
    lines.append(f"{'host to device':<20}" + ("       -" if upload is None else f"{upload / 1e9:8.2f} GB/s"))
    lines += [f"load from {place}: {share:.2f} of the slowest of these" for place, share in result["shares"].items()]
    return "\n".join(lines)


def forget(files: list[Path]) -> None:
    """Asks the system to drop what it holds of the files in memory."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # pages not yet written cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> float:
    """Seconds to read the files one after another."""
    buffer = bytearray(BLOCK)
    begin = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - begin


def load(checkpoint: Checkpoint) -> float:
    """Seconds until every parameter is on the device."""
    begin = time.perf_counter()
    load_params(checkpoint, checkpoint.config.dtype, create_mesh())
    return time.perf_counter() - begin
