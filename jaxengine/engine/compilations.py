"""Compiling programs, with which options, in threads, and how often the process compiled: after warm-up, a fault."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Any

import jax
import jax.monitoring
from jax.sharding import Mesh

from jaxengine.engine.program_store import ProgramStore

# XLA's default but for collectives, and WHILE: the sampler's conditions have loops in them, and what is in no graph the
# host decides, for which it waits.
IN_GRAPHS = ("FUSION", "CUBLAS", "CUBLASLT", "CUDNN", "CUSTOM_CALL", "DYNAMIC_SLICE_FUSION", "CONDITIONAL", "WHILE")
CUBLAS_ROWS = 64  # of a decode step, from which XLA's own Triton products are slower: see benchmarks/README.md
COMPILERS = 2  # programs compiled beside one another: each takes memory of the device, see memory.compiling_bytes


def compiler_options(name: str, rows: int, mesh: Mesh) -> dict[str, Any]:
    """XLA's, for a program of the runner; `rows` that a decode step computes at a time. They are for GPUs."""
    options: dict[str, Any] = {}
    if mesh.devices.flat[0].platform != "gpu":
        return options
    if name == "decode" and rows >= CUBLAS_ROWS:
        options["xla_gpu_enable_triton_gemm"] = False
    if name in ("decode", "head") and mesh.size == 1:
        options["xla_gpu_enable_command_buffer"] = ",".join(IN_GRAPHS)
    if mesh.is_multi_process:  # one that finds the program in its cache would keep others waiting
        options["xla_gpu_shard_autotuning"] = False
    return options


class Compiler:
    """Programs by name and key that are being compiled, or wait to be taken."""

    def __init__(self, store: ProgramStore | None):
        self.waiting: dict[tuple, Future] = {}
        self._store = store
        self._threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="jaxengine-compile")
        # jax keeps what it has traced for the next program: of two at a time, each would depend on which is first.
        self._lowering = Lock()
        self._ahead = Lock()  # so that a program which a step waits for comes after one of the others, not after all

    @property
    def busy(self) -> bool:
        return any(not future.done() for future in self.waiting.values())

    def start(
        self, name: str, key: tuple, lower: Callable[..., Any], arguments: tuple, wanted: bool, depends_on: Any
    ) -> None:
        """Starts to make the program that `lower(arguments)` gives. Lowering is Python: it is done here if a step waits
        for the program (`wanted`), else in a thread. `depends_on`: what `lower` reads that may change meanwhile.
        """
        arguments = jax.tree.map(stand_in, arguments)
        store = self._store
        place = store.place(name, (key, depends_on), arguments) if store else None
        now = wanted and not (place and place.exists())
        ready = self._lower(lower, arguments, wanted) if now else None

        def lowered() -> Any:
            return ready or self._lower(lower, arguments, wanted)

        make = partial(store.get, place, lowered) if store and place else lambda: lowered().compile()
        self.waiting[name, *key] = self._threads.submit(make)

    def _lower(self, lower: Callable[..., Any], arguments: tuple, wanted: bool) -> Any:
        with nullcontext() if wanted else self._ahead, self._lowering:
            return lower(arguments)

    def take(self, name: str, key: tuple) -> Any:
        """Waits for the program. Raises what compiling it raised."""
        return self.waiting.pop((name, *key)).result()

    def close(self) -> None:
        """What has not begun never will."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.waiting = {}


def stand_in(argument: Any) -> Any:
    """What a program can be compiled for when the device's array itself is gone by then."""
    if not isinstance(argument, jax.Array):
        return argument
    return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=argument.sharding)


class CompilationCounter:
    """Counts the compilations of the whole process; `after_warmup` is what should stay zero."""

    def __init__(self):
        self.total, self._warm = 0, None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.total += event == "/jax/core/compile/backend_compile_duration"

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def mark_warm(self) -> None:
        self._warm = self.total

    @property
    def after_warmup(self) -> int | None:
        """None before the first warm-up."""
        return None if self._warm is None else self.total - self._warm
