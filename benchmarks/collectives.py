"""What devices take to tell each other something: microseconds of each collective, by size, beside the links' rate.

    python -m benchmarks.collectives --devices 2 --hidden 4096 --tokens 1,64,256,8192

Each is one of many in a chain inside one program, as in a step, with a product of few operations between two of them,
so that none can be joined with the next. `GB/s`: bytes that cross each device's links, as NCCL's bus bandwidth counts.
Then, on GPUs, what a layer does between two products: residual sum and norm alone, after an all-reduce, and with it in
one kernel over peers' memory.
"""

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

from benchmarks.common import report

GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES"}
KERNELS = {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": True}
# By name, XLA's options for the program.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "kernels": KERNELS,
    "kernels (new flag)": {"xla_gpu_experimental_use_collective_kernels": "COLLECTIVE_KERNEL_ALL_REDUCE"},
    "graphs": GRAPHS,
    "graphs (filter)": GRAPHS | {"xla_gpu_enable_collectives_command_buffer_filter": "ALLREDUCE"},
    "graphs and kernels": GRAPHS | KERNELS,
}


def chain(collective: str, devices: int, hidden: int, tokens: int, count: int, options: dict[str, Any]) -> Callable:
    """A compiled program of `count` collectives of bfloat16 [tokens, hidden], one after another."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from jaxengine.sharding import TENSOR, create_mesh, named_sharding

    def run(x: Any) -> Any:
        for _ in range(count):
            if collective == "all-reduce":
                x = jax.lax.psum(x, TENSOR)
            else:
                x = jax.lax.psum_scatter(x, TENSOR, tiled=True)
                x = jax.lax.all_gather(x * 0.5, TENSOR, tiled=True)
            x = jnp.sin(x)
        return x

    mesh = create_mesh(devices)
    program = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    place = named_sharding(mesh)
    x = jnp.ones((tokens, hidden), jnp.bfloat16, device=place)
    compiled = jax.jit(program, out_shardings=place, compiler_options=options).lower(x).compile()
    return lambda: compiled(x)


def norms(kind: str, devices: int, hidden: int, tokens: int, count: int) -> Callable:
    """A compiled program of `count` residual sums and norms of bfloat16 [tokens, hidden], one after another, and at the
    end, whatever the kind, one all-reduce."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from jaxengine.layers.peers import create_peers, own, peers_sharding
    from jaxengine.sharding import LAYER, create_mesh, named_sharding
    from pallas_kernels import add_rms_norm, all_reduce_rms_norm

    def run(x: Any, scale: Any, peers: Any) -> Any:
        y = x
        for _ in range(count):
            if kind == "peers":
                x, y = all_reduce_rms_norm(x, y, scale, *own(peers), eps=1e-5)
            else:
                x, y = add_rms_norm(x, jax.lax.psum(y, LAYER) if kind == "all-reduce" else y, scale, eps=1e-5)
        return jax.lax.psum(x, LAYER)  # no program with peers may be without, see layers/peers.py

    mesh = create_mesh(devices)
    peers = create_peers(mesh, tokens, 2 * hidden)
    specs = PartitionSpec(), PartitionSpec(), peers_sharding(mesh).spec
    program = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    x = jax.random.normal(jax.random.key(0), (tokens, hidden), jnp.bfloat16)
    x, scale = (jax.device_put(array, named_sharding(mesh)) for array in (x, jnp.ones(hidden, jnp.bfloat16)))
    compiled = jax.jit(program).lower(x, scale, peers).compile()
    return lambda: compiled(x, scale, peers)


def microseconds(run: Callable, count: int, repeats: int = 10) -> float:
    """Of one collective and what stands between two, the median of several calls."""
    run().block_until_ready()
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        run().block_until_ready()
        times.append(perf_counter() - begin)
    return statistics.median(times) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", default="1,64,256,8192")
    parser.add_argument("--count", type=int, default=64, help="collectives in a program, as in a model of 32 layers")
    args = parser.parse_args()
    import jax

    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for name, options in OPTIONS.items():
        for tokens in map(int, args.tokens.split(",")):
            size = tokens * args.hidden * 2
            for collective in ("all-reduce", "reduce-scatter + all-gather"):
                if tokens % args.devices and collective != "all-reduce":
                    continue
                result: dict[str, Any] = {"options": name, "collective": collective, "tokens": tokens, "bytes": size}
                try:
                    run = chain(collective, args.devices, args.hidden, tokens, args.count, options)
                    found = microseconds(run, args.count)
                except Exception as error:  # an option that this jaxlib has not, or cannot use
                    report(result | {"error": str(error)[:200]})
                    continue
                crossing = 2 * (args.devices - 1) / args.devices * size
                report(result | {"us": found, "GB/s": crossing / found / 1e3})
    if jax.devices()[0].platform == "gpu":
        for tokens in map(int, args.tokens.split(",")):
            for kind in ("none", "all-reduce", "peers"):
                found = microseconds(norms(kind, args.devices, args.hidden, tokens, args.count), args.count)
                report({"norms with": kind, "tokens": tokens, "bytes": tokens * args.hidden * 2, "us": found})


if __name__ == "__main__":
    main()
