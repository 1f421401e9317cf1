"""Weights of a mesh that two processes share: each holds its slices, of safetensors and of Orbax."""

import socket
import subprocess
import sys

import numpy as np

from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint, save_checkpoint
from tests.tiny_llm import model_folder

CHILD = """
import sys
rank, port, *folders, out = sys.argv[1:]
import os
import jax
import numpy as np
preadv, counts = os.preadv, []
os.preadv = lambda *arguments: counts.append(preadv(*arguments)) or counts[-1]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
mesh = create_mesh(tensor=4)
held = {}
for i, folder in enumerate(folders):
    for path, array in load_params(open_checkpoint(folder), "float32", mesh).items():
        for shard in array.addressable_shards:
            place = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape)]
            held[f"{i} {path} {place}"] = np.asarray(shard.data)
    if i == 0:
        np.save(out + ".read.npy", sum(counts))
np.savez(out, **held)
"""


def test_each_process_holds_its_slices(tmp_path, monkeypatch):
    whole = load_params(open_checkpoint(model_folder()), "float32", create_mesh())
    save_checkpoint(open_checkpoint(model_folder()), whole, tmp_path / "orbax", "orbax")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folders, outs = [str(model_folder()), str(tmp_path / "orbax")], [tmp_path / f"{rank}.npz" for rank in range(2)]
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(rank), port, *folders, str(out)], stderr=subprocess.PIPE)
        for rank, out in enumerate(outs)
    ]
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors.decode()
    found = [dict(np.load(out)) for out in outs]
    assert set(found[0]) != set(found[1])
    for out, held in zip(outs, found, strict=True):
        for name, slice_ in held.items():
            _, path, place = name.split(" ", 2)
            index = tuple(slice(start, stop) for start, stop in eval(place))
            np.testing.assert_array_equal(slice_, np.asarray(whole[path])[index])
        assert {name.split()[1] for name in held} == set(whole)
        own = {name.partition(" ")[2]: slice_.nbytes for name, slice_ in held.items() if name.startswith("0 ")}
        assert int(np.load(f"{out}.read.npy")) == sum(own.values()), "nothing else is read, and nothing twice"
        split = sum(slice_.size for slice_ in held.values()) / (2 * sum(array.size for array in whole.values()))
        assert split < 0.6, "half of what is split, all of what is not"
