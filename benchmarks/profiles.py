"""The kernels of one step, from jax's profiler, under the names that the model gives its ops (`jax.named_scope`)."""

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxengine.step import StepInputs

INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(")
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*{")
PART = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
PATH = re.compile(r'op_name="([^"]*)"')
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}

Event = tuple[float, float, str, str, str]  # start and duration in microseconds, module, instruction, kernel


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

    Of several GPUs, first all steps of the first, and so on. On a CPU they are XLA's operations, on any of its threads.
    Raises RuntimeError where the steps' kernels differ.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python would hold up the host
    with tempfile.TemporaryDirectory() as folder, _programs_run(runner) as programs:
        with jax.profiler.trace(folder, profiler_options=options):
            [runner.submit(inputs) for _ in range(steps)][-1].result()
        file = next(Path(folder).rglob("*.xplane.pb"))
        trace = jax.profiler.ProfileData.from_file(str(file))
    texts = [program.as_text() for program in programs.values()]
    return kernels_of_steps(trace, texts, steps)


def kernels_of_steps(trace: Any, texts: Sequence[str], steps: int) -> list[list[Kernel]]:
    """As `profile`, of a profile and the texts of the compiled programs that ran during it."""
    modules = {text.split(maxsplit=2)[1].rstrip(","): launches(text) for text in texts}
    found = []
    for events in _events(trace, modules):
        size = len(events) // steps
        parts = [events[i * size : (i + 1) * size] for i in range(steps)]
        names = [Counter(name for *_, name in part) for part in parts]
        if not size or len(events) % steps or any(of_step != names[0] for of_step in names):
            raise RuntimeError(f"{steps} equal steps, but the profile has {len(events)} kernels, not the same of each")
        found += [_kernels(part, modules) for part in parts]
    return found


class Instruction(NamedTuple):
    """One of a compiled program that launches a kernel."""

    op: str
    path: str  # "": XLA kept none
    names: tuple[str, str]  # that its kernel may have, as `name_of` has them


def launches(text: str) -> list[Instruction]:
    """Of a compiled program's text, in the order in which they are scheduled."""
    lines = [line.strip() for line in text.splitlines()]
    fused = {name for line in lines if " call(" not in line for name in PART.findall(line)}
    found, inside = [], ""
    for line in lines:
        if computation := COMPUTATION.fullmatch(line):
            inside = computation[1]
        elif (known := INSTRUCTION.match(line)) and inside not in fused and known[2] not in NO_KERNEL:
            path = names[1] if (names := PATH.search(line)) else ""
            found.append(Instruction(known[1], path, (name_of(known[1]), path.split("/")[-2:][0])))
    return found


def name_of(kernel: str) -> str:
    """Without numbers, as equal fusions share the kernel of the first, and without what Mosaic adds."""
    return re.sub(r"(_mosaic_gpu_kernel|[._]+\d+)+$", "", kernel)


def _place(instructions: Sequence[Instruction], op: str, name: str, start: int) -> int:
    """Which instruction launched this kernel.

    The profile says which where kernels are launched singly. Those of a CUDA graph run in the order of their
    instructions: a known name is that of the next of that name, any other (cuBLAS's) of the one whose turn it is.
    """
    order = [*range(start, len(instructions)), *range(min(start, len(instructions)))]
    single = (i for i in order if instructions[i].op == op)
    named = (i for i in order if name_of(name) in instructions[i].names)
    return next(single, next(named, min(start, len(instructions) - 1)))


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


def _kernels(events: Sequence[Event], modules: Mapping[str, Sequence[Instruction]]) -> list[Kernel]:
    """Of one step, which all programs begin anew."""
    places, kernels = dict.fromkeys(modules, 0), []
    for start, us, module, op, name in events:
        path = ""
        if instructions := modules.get(module):
            place = _place(instructions, op, name, places[module])
            places[module] = place + (name_of(name) in instructions[place].names)
            path = instructions[place].path
        kernels.append(Kernel(name, path, start - events[0][0], us))
    return kernels


def _events(trace: Any, modules: Mapping[str, Sequence[Instruction]]) -> Iterator[list[Event]]:
    """Of each GPU or, without one, of the CPU, in the order of time."""
    planes = list(trace.planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    known = {(module, instruction.op) for module, found in modules.items() for instruction in found}
    for plane in on_gpu or [plane for plane in planes if plane.name == "/host:CPU"]:
        events: list[Event] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib's class of statistics names no module
            for event in (event for line in plane.lines for event in line.events):
                facts = dict(event.stats)
                module, op = facts.get("hlo_module", ""), facts.get("hlo_op", "")
                # A CPU's loops hold other operations; a GPU's copies to and from the host are no program's.
                if (module or not event.name.startswith("Mem")) if on_gpu else (module, op) in known:
                    events.append((event.start_ns / 1e3, event.duration_ns / 1e3, module, op, event.name))
        yield sorted(events, key=lambda event: event[0])
