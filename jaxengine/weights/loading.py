"""Canonical parameters, each on its devices: streamed from files, restored from Orbax, or drawn at random."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np

from converters import ConversionError, families
from converters.attributes import DTYPES
from converters.tensors import Target
from jaxengine.config import ModelConfig
from jaxengine.errors import CheckpointError
from jaxengine.models import param_specs
from jaxengine.sharding import ParamSpec
from jaxengine.weights import in_memory
from jaxengine.weights.checkpoint import EMBEDDING, HEAD, Checkpoint
from jaxengine.weights.rules import raise_faults

# Threads that load, and so tensors that the host holds at a time. On a CPU they only got in each other's way.
READERS = {"cpu": 1, "gpu": 8}
OnTensor = Callable[[int, int], None]


def load_params(
    checkpoint: Checkpoint,
    dtype: str,
    mesh: jax.sharding.Mesh,
    *,
    seed: int = 0,
    borrow: bool = False,
    on_tensor: OnTensor | None = None,
) -> dict[str, jax.Array]:
    """Every canonical parameter in `dtype`, committed to its sharding on `mesh`.

    Of several devices, vocabularies from safetensors and GGUF are padded with zeros to what the devices divide.
    `seed` is for random weights. `borrow`: parameters in memory that are as they should be are not copied.
    `on_tensor(done, total)` is called as tensors arrive. Raises CheckpointError naming all tensors that are missing,
    unexpected, of the wrong shape or of a dtype that is not served, before any is read.
    """
    specs = param_specs(checkpoint.config)
    report = on_tensor or (lambda done, total: None)
    if checkpoint.format == "memory":
        return in_memory.place(checkpoint.arrays, specs, dtype, mesh, borrow, report)
    elif checkpoint.format == "dummy":
        from jaxengine.weights.dummy import random_params

        params = random_params(specs, dtype, mesh, seed)
        report(len(params), len(params))
        return params
    elif checkpoint.format == "orbax":
        from jaxengine.weights.orbax_format import restore

        return restore(checkpoint.reader, checkpoint.config, dtype, mesh, report)
    try:
        return _stream(checkpoint, specs, dtype, mesh, report)
    except ConversionError as error:
        raise CheckpointError(str(error)) from error


def check_params(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError as `load_params` would, reading names, shapes and dtypes only."""
    specs = param_specs(checkpoint.config)
    if checkpoint.format == "orbax":
        checkpoint.reader.leaves(checkpoint.config)
    elif checkpoint.format in ("safetensors", "gguf"):
        try:
            plan_tensors(checkpoint, specs)
        except ConversionError as error:
            raise CheckpointError(str(error)) from error


def _stream(
    checkpoint: Checkpoint, specs: Mapping[str, ParamSpec], dtype: str, mesh: jax.sharding.Mesh, report: OnTensor
) -> dict[str, jax.Array]:
    plan, shapes = plan_tensors(checkpoint, specs), _shapes(checkpoint.config, specs)
    specs = {path: spec.padded(mesh) for path, spec in specs.items()}
    jobs: dict[tuple[str, ...], list[str]] = {}  # parameters -> the tensors that hold them: one, or each expert's
    for name, target in sorted(plan.items(), key=lambda item: item[1].index or 0):
        jobs.setdefault(target.paths, []).append(name)

    def load(names: list[str]) -> list[jax.Array]:
        target, kind = plan[names[0]], jax.numpy.dtype(dtype)
        if mesh.is_multi_process:
            return jax.block_until_ready(_read_own(checkpoint, names, target, specs, dtype, mesh))
        if target.index is None:
            array = checkpoint.reader.read(names[0]).astype(kind, copy=False)
        else:
            array = np.empty((len(names), *target.stored_shape(shapes)), kind)
            for i, name in enumerate(names):
                array[i] = checkpoint.reader.read(name)
        return jax.block_until_ready(_place(array, target, specs, mesh, platform))

    platform = mesh.devices.flat[0].platform
    params: dict[str, jax.Array] = {}
    # A thread waits until its parameter has arrived before it reads another: the host holds one for each thread.
    with ThreadPoolExecutor(READERS[platform]) as pool:
        try:
            for done, (paths, placed) in enumerate(zip(jobs, pool.map(load, jobs.values())), 1):
                params |= zip(paths, placed)
                report(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    return params


def _place(
    array: np.ndarray, target: Target, specs: Mapping[str, ParamSpec], mesh: jax.sharding.Mesh, platform: str
) -> list[jax.Array]:
    """One tensor, or several that were stacked, as the parameters that it holds, on their way to the devices."""
    if target.transposed:
        spec = specs[target.paths[0]]
        array = _pad(array, _swapped(spec.shape))
        if platform == "cpu":  # the transfer transposes faster than NumPy does
            return [jax.device_put(array.swapaxes(-1, -2), spec.sharding(mesh))]
        arrived = jax.device_put(array, _stored(spec).sharding(mesh))
        return [_transposed(spec.sharding(mesh))(arrived)]  # at 1 GB/s a host would be the slowest part
    widths = [specs[path].shape[-1] for path in target.paths]
    array = _pad(array, (*specs[target.paths[0]].shape[:-1], sum(widths)))
    if target.interleaved:
        parts = [array[..., i :: len(widths)] for i in range(len(widths))]
    else:
        parts = np.split(array, np.cumsum(widths)[:-1], axis=-1)
    return [jax.device_put(part, specs[path].sharding(mesh)) for path, part in zip(target.paths, parts)]


def _stored(spec: ParamSpec) -> ParamSpec:
    """Of the tensor that a transposed kernel is read from."""
    return replace(spec, shape=_swapped(spec.shape), axes=_swapped(spec.axes))


def _swapped[T](entries: tuple[T, ...]) -> tuple[T, ...]:
    """Those of the last two dimensions, the other way round."""
    return (*entries[:-2], entries[-1], entries[-2])


def _read_own(
    checkpoint: Checkpoint, names: Sequence[str], target: Target, specs: Mapping[str, ParamSpec], dtype: str,
    mesh: jax.sharding.Mesh,
) -> list[jax.Array]:  # fmt: skip
    """The same of several processes, each of which reads what its devices hold and no more; of GGUF all, once."""
    read_tensor = _cut(checkpoint.reader.read) if checkpoint.format == "gguf" else checkpoint.reader.read
    placed, start = [], 0
    step = len(target.paths) if target.interleaved else 1
    for path in target.paths:
        spec = specs[path]
        stored = _stored(spec) if target.transposed else spec
        part = partial(_read_part, read_tensor, dtype, start, step)
        stacked = target.index is not None
        read = partial(_stack_parts, part, names) if stacked else partial(part, names[0])
        held = cache(partial(read, stored.shape))  # devices may hold the same
        arrived = jax.make_array_from_callback(stored.shape, stored.sharding(mesh), held, dtype=jax.numpy.dtype(dtype))
        placed.append(_transposed(spec.sharding(mesh))(arrived) if target.transposed else arrived)
        start += 1 if target.interleaved else stored.shape[-1]
    return placed


def _cut(read: Callable[[str], np.ndarray]) -> Callable[[str, tuple[slice, ...]], np.ndarray]:
    """Reads parts of what can be read as a whole only."""
    whole = cache(read)
    return lambda name, part: whole(name)[part]


def _stack_parts(
    part: Callable[..., np.ndarray], names: Sequence[str], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """`index` of an array of this shape whose entries are these tensors."""
    return np.stack([part(name, shape[1:], index[1:]) for name in names[index[0]]])


def _read_part(
    read: Callable[[str, tuple[slice, ...]], np.ndarray], dtype: str, start: int, step: int, name: str,
    shape: tuple[int, ...], index: tuple[slice, ...],
) -> np.ndarray:  # fmt: skip
    """`index` of an array of this shape: of each `step` columns of the tensor one, from `start` on."""
    *others, last = (slice(*each.indices(length)) for each, length in zip(index, shape))
    part = *others, slice(last.start * step + start, last.stop * step + start)
    array = read(name, part).astype(jax.numpy.dtype(dtype), copy=False)
    return _pad(array, tuple(each.stop - each.start for each in part))[..., ::step]


def _pad(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    widths = [(0, wanted - found) for wanted, found in zip(shape, array.shape, strict=True)]
    return np.pad(array, widths) if array.shape != shape else array


@cache
def _transposed(sharding: jax.sharding.NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jax.numpy.matrix_transpose, out_shardings=sharding)


def plan_tensors(checkpoint: Checkpoint, specs: Mapping[str, ParamSpec]) -> dict[str, Target]:
    """What each tensor becomes. Raises CheckpointError with every fault there is."""
    config, faults = checkpoint.config, []
    shapes = _shapes(config, specs)
    plan: dict[str, Target] = {}
    sources: dict[tuple[str, int | None], str] = {}  # canonical path, and which entry of it -> tensor
    for name, (shape, dtype) in checkpoint.reader.names().items():
        target = families.target(config.model_type, name)
        if target is None or not all(_has_place(path, target.index, shapes) for path in target.paths):
            faults.append(f"unexpected: {name} {list(shape)}")
            continue
        places = [(path, target.index) for path in target.paths]
        faults += [f"twice: {name} and {sources[place]}" for place in places if place in sources]
        sources |= dict.fromkeys(places, name)
        if target.paths and dtype not in DTYPES:
            faults.append(f"of dtype {dtype}, not one of {', '.join(DTYPES)}: {name}")
        want = target.stored_shape(shapes)
        if target.paths and shape != want:
            faults.append(f"of shape {list(shape)}, where the config says {list(want)}: {name}")
        if target.paths and not _is_tied(config, target.paths[0]):
            plan[name] = target
    wanted = families.sources(config.model_type, {path: spec.shape for path, spec in specs.items()})
    faults += [
        f"missing: {name}"
        for name, target in wanted.items()
        if any((path, target.index) not in sources for path in target.paths)
    ]
    raise_faults(checkpoint.path, faults)
    if config.tie_word_embeddings and (HEAD, None) in sources:
        head, embedding = (checkpoint.reader.read(sources[path, None]) for path in (HEAD, EMBEDDING))
        if not np.array_equal(head, embedding):
            raise CheckpointError(
                f"{checkpoint.path}: tie_word_embeddings=true, but {sources[HEAD, None]} differs from "
                f"{sources[EMBEDDING, None]}; hf_overrides={{'tie_word_embeddings': False}} uses both"
            )
    return plan


def _is_tied(config: ModelConfig, path: str) -> bool:
    """Some files hold a tied head all the same."""
    return config.tie_word_embeddings and path == HEAD


def _has_place(path: str, index: int | None, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return path in shapes and (index is None or index < shapes[path][0])


def _shapes(config: ModelConfig, specs: Mapping[str, ParamSpec]) -> dict[str, tuple[int, ...]]:
    """Of the parameters, and of a tied head, should the file hold one."""
    head = {HEAD: specs[EMBEDDING].shape[::-1]} if config.tie_word_embeddings else {}
    return head | {path: spec.shape for path, spec in specs.items()}
