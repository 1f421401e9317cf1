"""The kernels of one step, from jax's profiler, under the names that the model gives its ops (`jax.named_scope`)."""

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxengine.step import StepInputs

INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = (.*)$", re.MULTILINE)
CONTAINER = re.compile(r" (?:while|conditional|call)\(")  # runs other instructions, which the profile has as well
PATH = re.compile(r'op_name="([^"]*)"')


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str  # the profile's
    path: str  # what it was traced under: `jit(_decode)/.../qkv_proj/dot_general`
    start: float  # microseconds after the step's first kernel
    us: float


def keep_names() -> None:
    """Before a program compiles: have the compilation cache give none that was traced under other names."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def profile(runner: Any, inputs: StepInputs, steps: int = 10) -> list[list[Kernel]]:
    """The kernels of each of `steps` equal steps, queued one behind another, in the order in which they ran.

    On a CPU they are XLA's operations, on any of its threads. Raises RuntimeError where the steps' kernels differ.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python would hold up the host
    with tempfile.TemporaryDirectory() as folder, _programs_run(runner) as programs:
        with jax.profiler.trace(folder, profiler_options=options):
            [runner.submit(inputs) for _ in range(steps)][-1].result()
        file = next(Path(folder).rglob("*.xplane.pb"))
        trace = jax.profiler.ProfileData.from_file(str(file))
    paths: dict[tuple[str, str], str] = {}
    for program in programs.values():
        paths |= instruction_paths(program.as_text())
    kernels = sorted(_kernels(trace, paths), key=lambda kernel: kernel.start)
    size = len(kernels) // steps
    parts = [kernels[i * size : (i + 1) * size] for i in range(steps)]
    names = [Counter(kernel.name for kernel in part) for part in parts]
    if not kernels or len(kernels) % steps or any(of_step != names[0] for of_step in names):
        raise RuntimeError(f"{steps} equal steps, but the profile has {len(kernels)} kernels, not the same of each")
    return [[kernel._replace(start=kernel.start - part[0].start) for kernel in part] for part in parts]


def instruction_paths(text: str) -> dict[tuple[str, str], str]:
    """Of a compiled program's text: (module, instruction) -> path, "" where XLA kept none; without containers."""
    module = text.split(maxsplit=2)[1].rstrip(",")
    lines = [(name, rest) for name, rest in INSTRUCTION.findall(text) if not CONTAINER.search(rest)]
    return {(module, name): found[1] if (found := PATH.search(rest)) else "" for name, rest in lines}


def median_step(steps: Sequence[Sequence[Kernel]]) -> Sequence[Kernel]:
    """The one that took the median time from its first kernel to the end of its last."""
    return sorted(steps, key=span)[len(steps) // 2]


def span(kernels: Sequence[Kernel]) -> float:
    """Microseconds from the first kernel's start to the last one's end."""
    return max(kernel.start + kernel.us for kernel in kernels)


@contextmanager
def _programs_run(runner: Any) -> Iterator[dict[tuple, Any]]:
    """The compiled programs that the runner calls meanwhile, by key."""
    programs: dict[tuple, Any] = {}

    def run(name: str, key: tuple, *arguments: Any) -> Any:
        result = type(runner)._run(runner, name, key, *arguments)
        programs[name, *key] = runner._programs[name, *key]
        return result

    runner._run = run
    try:
        yield programs
    finally:
        del runner._run


def _kernels(trace: Any, paths: dict[tuple[str, str], str]) -> Iterator[Kernel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib's class of statistics names no module
        for event in (event for plane in trace.planes for line in plane.lines for event in line.events):
            facts = dict(event.stats)
            path = paths.get((facts.get("hlo_module", ""), facts.get("hlo_op", "")))
            if path is not None:
                yield Kernel(event.name, path, event.start_ns / 1e3, event.duration_ns / 1e3)
