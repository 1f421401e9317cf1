"""Memory through which the devices that split a layer hand each other rows: `pallas_kernels.all_reduce_rms_norm`."""

import ctypes
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxengine.sharding import LAYER, axis_size
from pallas_kernels import workspace_words

NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: over NVLink they are, over PCIe not
SENT_BYTES = 2**22  # two H200s were quicker than XLA's all-reduce up to there, see benchmarks/README.md


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
    return SENT_BYTES // (row_bytes * (axis_size(mesh, LAYER) - 1)) if row_bytes % 16 == 0 else 0


def peers_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with one entry for each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def create_peers(mesh: Mesh, rows: int, row_bytes: int) -> tuple[jax.Array, jax.Array]:
    """The devices' workspaces, int32 [devices, words], and the `peers` of each, int32 [devices, of a layer + 1, 2].

    XLA knows nothing of what is written to the former: they must outlive each program that is given the latter, and
    must be neither donated nor read.
    """
    count, place = axis_size(mesh, LAYER), peers_sharding(mesh)
    workspaces = jnp.zeros((mesh.size, workspace_words(count, rows, row_bytes)), jnp.int32, device=place)
    workspaces.block_until_ready()  # zeros must not come after what a peer writes
    address = {shard.device: shard.data.unsafe_buffer_pointer() for shard in workspaces.addressable_shards}
    peers = [
        [*(address[device] for device in np.roll(group, -rank)), rank + (rows << 32)]
        for group in mesh.devices.reshape(-1, count)
        for rank in range(count)
    ]
    halves = np.array(peers, "<u8").view("<i4").reshape(mesh.size, count + 1, 2)
    return workspaces, jax.device_put(halves, place)
