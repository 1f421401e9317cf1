"""Memory through which the devices that split a layer hand each other rows: `pallas_kernels.all_reduce_rms_norm`.

A program with it also needs a collective of XLA's, as drawing tokens has: only then does XLA make all devices ready for
it before any starts. What one still does meanwhile (instantiate a graph) may wait for a device that waits for that one.
"""

import ctypes
from itertools import permutations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxengine.sharding import LAYER, axis_size

NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: over NVLink they are, over PCIe not
SENT_BYTES = 2**22  # two H200s were quicker than XLA's all-reduce up to there, see benchmarks/README.md


class Peers(NamedTuple):
    """Of each device, or of one inside a program: see `all_reduce_rms_norm`."""

    addresses: jax.Array  # int32 [(mesh devices,) layer's devices + 1, 2]
    workspace: jax.Array  # int32 [(mesh devices,) words]


def linked(mesh: Mesh) -> bool:
    """Whether the devices that split a layer are several GPUs of this process with NVLink between any two."""
    groups = mesh.devices.reshape(-1, axis_size(mesh, LAYER))
    if groups.shape[1] == 1 or mesh.is_multi_process or groups[0, 0].platform != "gpu":
        return False
    driver, supported = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    for group in groups:
        for pair in permutations((device.local_hardware_id for device in group), 2):
            failed = driver.cuDeviceGetP2PAttribute(ctypes.byref(supported), NATIVE_ATOMICS, *pair)
            if failed or not supported.value:
                return False
    return True


def peer_rows(mesh: Mesh, row_bytes: int) -> int:
    """The rows of a step up to which a device rather sends them to all others than has XLA sum them."""
    if row_bytes % 16 or row_bytes < 512:
        return 0
    return SENT_BYTES // (row_bytes * (axis_size(mesh, LAYER) - 1))


def peers_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with one entry for each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def create_peers(mesh: Mesh, rows: int, row_bytes: int) -> Peers:
    """For steps of so many rows at most. XLA knows nothing of what is written to the workspaces: read them not, nor
    donate them.
    """
    from pallas_kernels.all_reduce_rms_norm import EMPTY, workspace_words  # what only GPUs need takes time to import

    count, place = axis_size(mesh, LAYER), peers_sharding(mesh)
    workspace = jnp.full((mesh.size, workspace_words(count, rows, row_bytes)), EMPTY, jnp.int32, device=place)
    workspace.block_until_ready()  # or it could come after what a peer writes
    address = {shard.device: shard.data.unsafe_buffer_pointer() for shard in workspace.addressable_shards}
    addresses = [
        [*(address[device] for device in np.roll(group, -rank)), rank + (rows << 32)]
        for group in mesh.devices.reshape(-1, count)
        for rank in range(count)
    ]
    halves = np.array(addresses, "<u8").view("<i4").reshape(mesh.size, count + 1, 2)
    return Peers(jax.device_put(halves, place), workspace)


def own(peers: Peers) -> Peers:
    """Inside a program that each device runs on its share: this device's."""
    return Peers(*(array.reshape(array.shape[1:]) for array in peers))
