"""Sums over peers' memory: on one GPU, whose peers are itself, and on several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxengine.layers.peers import create_peers, linked, own, peers_sharding
from jaxengine.sharding import LAYER, create_mesh
from pallas_kernels import all_reduce_rms_norm, all_reduce_rms_norm_reference, workspace_words
from pallas_kernels.all_reduce_rms_norm import EMPTY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")]

ROWS, CALLS = 40, 5
LIMIT = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES = [
    (2, 4096, "bfloat16"),
    (40, 4096, "bfloat16"),
    (3, 576, "float32"),
    (5, 5120, "bfloat16"),
    (2, 16384, "float16"),
]


def drawn(seed, dtype, *shapes):
    """By NumPy, as jax would compile a program for each shape."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def check_close(found, wanted, dtype):
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= LIMIT[dtype] * np.linalg.norm(b)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("rows, size, dtype", SHAPES)
def test_a_device_that_is_its_own_peer(rows, size, dtype, devices):
    """A peer's workspace is its own, further on by as much as makes what it sends come from that peer."""
    row_bytes = size * jnp.dtype(dtype).itemsize
    apart = row_bytes * ROWS
    workspace = jnp.full(workspace_words(devices, ROWS, row_bytes) + devices * apart // 4, EMPTY, jnp.int32)
    begin = workspace.block_until_ready().unsafe_buffer_pointer()
    halves = np.array([*(begin + peer * apart for peer in range(devices)), ROWS << 32], "<u8").view("<i4")
    addresses = jnp.asarray(halves.reshape(-1, 2))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    reference = jax.jit(
        jax.shard_map(
            partial(all_reduce_rms_norm_reference, axis="x", eps=1e-5), mesh=mesh,
            in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False,
        )
    )  # fmt: skip
    for call in range(CALLS):
        x, y, scale = drawn(call, dtype, (rows, size), (rows, size), (size,))
        found = all_reduce_rms_norm(x, y, scale, addresses, workspace, eps=1e-5)
        check_close(found, reference(x, y * devices, scale), dtype)
    assert np.asarray(workspace)[:rows].tolist() == [CALLS - 1] * rows
    assert (np.asarray(workspace)[rows:] == EMPTY).all()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rows, size, dtype", SHAPES)
def test_several_devices(rows, size, dtype):
    """Each call's result goes into the next, as in a step."""
    mesh = create_mesh(jax.device_count())
    assert linked(mesh)
    peers = create_peers(mesh, ROWS, size * jnp.dtype(dtype).itemsize)
    each, whole = peers_sharding(mesh), PartitionSpec()

    def run(x, y, scale, peers):
        found = wanted = x, y[0]
        for _ in range(CALLS):
            wanted = all_reduce_rms_norm_reference(found[0], found[1], scale, LAYER, eps=1e-5)
            found = all_reduce_rms_norm(*found, scale, *own(peers), eps=1e-5)
        return tuple(array[None] for array in (*found, *wanted))

    program = jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=(whole, each.spec, whole, each.spec), out_specs=each.spec, check_vma=False
        )
    )
    for seed in range(CALLS):
        x, y, scale = drawn(seed, dtype, (rows, size), (mesh.size, rows, size), (size,))
        found = [np.asarray(array) for array in program(x, jax.device_put(y, each), scale, peers)]
        check_close(found[:2], found[2:], dtype)
        assert all((array == array[0]).all() for array in found[:2])
    words = np.asarray(peers.workspace)
    assert (words[:, :rows] == CALLS**2 - 1).all() and (words[:, rows:] == EMPTY).all()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
def test_data_with_all_bits_set_arrive():
    mesh = create_mesh(jax.device_count())
    peers = create_peers(mesh, ROWS, 8192)
    each, whole = peers_sharding(mesh), PartitionSpec()
    y = jnp.full((mesh.size, 2, 4096), -1, jnp.int16).view(jnp.bfloat16).at[:, 1].set(1)

    def run(x, y, peers):
        return all_reduce_rms_norm(x, y[0], x[0], *own(peers), eps=1e-5)[0]

    program = jax.shard_map(run, mesh=mesh, in_specs=(whole, each.spec, each.spec), out_specs=whole, check_vma=False)
    found = np.asarray(jax.jit(program)(jnp.ones((2, 4096), jnp.bfloat16), jax.device_put(y, each), peers), np.float32)
    assert np.isnan(found[0]).all() and (found[1] == 1 + mesh.size).all()
