"""Parameters that a trainer holds in memory: named, checked like a checkpoint, borrowed where they fit."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import ConversionError, UnsupportedOptionError, families
from converters.attributes import DTYPES
from jaxengine.config import ModelConfig, ParamRule
from jaxengine.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxengine.models import GROUPS, flatten, param_specs
from jaxengine.sharding import ParamSpec, named_sharding
from jaxengine.weights.checkpoint import EMBEDDING, HEAD, Checkpoint, parse_config, plain, raise_faults

MEMORY = Path("parameters in memory")  # where a checkpoint's messages have its path
CHUNK_BYTES = 2**28  # that are copied or resharded at a time
HF_SUFFIX = ".weight"  # tensors of a safetensors file have it, canonical paths never do
SAME = ParamRule("")


@dataclass(frozen=True)
class Leaf:
    """One canonical parameter: part `index` of what `rule` makes of `source`."""

    name: str  # the trainer's
    source: Any  # jax or NumPy array
    rule: ParamRule
    index: int
    shape: tuple[int, ...]  # of the result

    def value(self) -> Any:
        """The array itself where the rule changes nothing."""
        return self.source if self.rule == SAME else _program(self.rule)(self.source)[self.index]


def open_parameters(
    tree: Any,
    config: Any,
    *,
    mapping: Mapping[str, ParamRule] | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Finds every parameter of the model in `tree`; nothing is computed or copied.

    tree: an NNX module of ours, its nnx.State, or a pytree (nested or flat, dotted paths) in the canonical layout or
    with the names and layouts of a HuggingFace checkpoint (names that end in `.weight` tell). config: config.json as a
    dict, a transformers config, or a ModelConfig. mapping: for other trainers, patterns of their dotted paths; the
    first that matches a whole path tells what it becomes.

    Raises CheckpointError naming everything that is missing, unexpected, misshapen, of a dtype that is not served or
    deleted; ConfigError for a config or a mapping that makes no sense.
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"model of type {type(tree).__name__}: parameters are an NNX module, an nnx.State, or a dict of arrays; "
            "files are given by their folder"
        )
    arrays = dict(flatten(tree))
    if wrong := [f"{name} ({type(x).__name__})" for name, x in arrays.items() if not hasattr(x, "dtype")]:
        raise ConfigError(f"parameters must be arrays, which these are not: {', '.join(wrong)}")
    usual = Counter(str(x.dtype) for x in arrays.values() if str(x.dtype) in DTYPES).most_common(1)
    dtype = usual[0][0] if usual else "float32"
    model, hf_config = _model_config(config, dtype, hf_overrides)
    leaves = _leaves(arrays, model, mapping)
    return Checkpoint(MEMORY, "memory", replace(model, dtype=dtype), {}, None, hf_config, {}, leaves)


def _model_config(config: Any, dtype: str, overrides: Mapping[str, Any] | None) -> tuple[ModelConfig, Mapping]:
    if isinstance(config, ModelConfig):
        if overrides:
            raise ConfigError("hf_overrides changes a HuggingFace config; use dataclasses.replace on a ModelConfig")
        return config, {}
    found = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"config={config!r:.200} must be a HuggingFace config (a dict, or transformers' object) or a ModelConfig: "
            "parameters in memory do not say what model they are of"
        )
    found = {**found, **plain(overrides or {})}
    try:
        return parse_config({name: value for name, value in found.items() if name not in ("dtype", "torch_dtype")},
                            dtype), found  # fmt: skip
    except UnsupportedOptionError as error:
        raise UnsupportedModelError(f"config: {error}") from error
    except ConversionError as error:
        raise ConfigError(f"config: {error}") from error


def _leaves(arrays: Mapping[str, Any], config: ModelConfig, mapping: Mapping[str, ParamRule] | None) -> dict[str, Leaf]:
    """Every canonical parameter. Raises CheckpointError with every fault there is."""
    specs, faults = param_specs(config), []
    leaves: dict[str, Leaf] = {}
    named_as_hf = mapping is None and any(name.endswith(HF_SUFFIX) for name in arrays)
    wanted = set(specs) | ({HEAD} if config.tie_word_embeddings else set())
    for name, source in arrays.items():
        rule = _rule(name, config, mapping, named_as_hf)
        if rule is None or any(path not in wanted for path in rule.paths):
            becomes = f" (would be {', '.join(rule.paths)})" if rule and rule.paths != (name,) else ""
            faults.append(f"unexpected: {name} {list(source.shape)}{becomes}")
            continue
        if not rule.paths:
            continue
        if str(source.dtype) not in DTYPES:
            faults.append(f"of dtype {source.dtype}, not one of {', '.join(DTYPES)}: {name}")
        if is_deleted(source):
            faults.append(f"deleted, its buffer was given to a program that donates it: {name}")
        how = SAME if rule == ParamRule(rule.to) and len(rule.paths) == 1 else rule
        try:
            shapes = _shapes(source, how)
        except Exception as error:  # a hook may raise anything
            faults.append(f"of shape {list(source.shape)}, to which {how} cannot be applied ({error}): {name}")
            shapes = [()] * len(rule.paths)
        for i, (path, shape) in enumerate(zip(rule.paths, shapes, strict=True)):
            if path in leaves:
                faults.append(f"twice: {path} from {leaves[path].name} and {name}")
            leaves[path] = Leaf(name, source, how, i, shape)
    for path, spec in specs.items():
        source_name = families.source(config.model_type, path) if named_as_hf else path
        if path not in leaves:
            faults.append(f"missing: {source_name}")
        elif leaves[path].shape != spec.shape:
            got, name = list(leaves[path].shape), leaves[path].name
            faults.append(f"of shape {got}, where the config says {list(spec.shape)}: {path}"
                          + (f" from {name}" if name != path else ""))  # fmt: skip
    raise_faults(MEMORY, list(dict.fromkeys(faults)))
    if config.tie_word_embeddings and HEAD in leaves:
        head, embedding = (np.asarray(leaves[path].value()) for path in (HEAD, EMBEDDING))
        del leaves[HEAD]
        if not np.array_equal(head.T, embedding):
            raise CheckpointError(
                f"{MEMORY}: tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}; "
                "hf_overrides={'tie_word_embeddings': False} uses both"
            )
    return leaves


def _rule(
    name: str, config: ModelConfig, mapping: Mapping[str, ParamRule] | None, named_as_hf: bool
) -> ParamRule | None:
    """What becomes of the parameter; None for one that nothing is known of."""
    if mapping is not None:
        for pattern, rule in mapping.items():
            if not isinstance(rule, ParamRule):
                raise ConfigError(f"param_mapping[{pattern!r}]={rule!r} must be a ParamRule")
            if match := re.fullmatch(pattern, name):
                return replace(rule, to=tuple(match.expand(path) for path in rule.paths))
        return None
    if named_as_hf:
        target = families.target(config.model_type, name)
        return None if target is None else ParamRule(target.paths, (1, 0) if target.transposed else None)
    return ParamRule(".".join(part for part in name.split(".") if part not in GROUPS))


def _shapes(source: Any, rule: ParamRule) -> list[tuple[int, ...]]:
    """Of the parameters that the rule makes of an array."""
    if rule == SAME:
        return [tuple(source.shape)]
    return [x.shape for x in jax.eval_shape(_program(rule), jax.ShapeDtypeStruct(source.shape, source.dtype))]


@cache  # the next update with the same rules finds its programs compiled
def _program(rule: ParamRule) -> Callable[[Any], list[jax.Array]]:
    return _compiled(len(rule.paths), rule.transpose, rule.reshape, rule.hook)


@cache  # layers share a program
def _compiled(count: int, transpose: Any, reshape: Any, hook: Any) -> Callable[[Any], list[jax.Array]]:
    def apply(x: Any) -> list[jax.Array]:
        x = x if transpose is None else jnp.transpose(x, transpose)
        x = x if reshape is None else jnp.reshape(x, reshape)
        x = x if hook is None else hook(x)
        parts = list(x) if isinstance(x, list | tuple) else jnp.split(x, count, axis=-1)
        if len(parts) != count:
            raise ValueError(f"the hook gives {len(parts)} arrays for {count} names")
        return parts

    return jax.jit(apply)


def is_deleted(array: Any) -> bool:
    return isinstance(array, jax.Array) and array.is_deleted()


def place(
    leaves: Mapping[str, Leaf],
    specs: Mapping[str, ParamSpec],
    dtype: str,
    mesh: jax.sharding.Mesh,
    borrow: bool,
    report: Callable[[int, int], None],
) -> dict[str, jax.Array]:
    """The parameters in `dtype` on `mesh`. With `borrow` the very arrays where dtype, layout and sharding are right.

    What has to be copied or resharded is, some at a time, so that transfers never need much beside the results.
    """
    params: dict[str, jax.Array] = {}
    unfinished: list[jax.Array] = []
    for done, (path, spec) in enumerate(specs.items(), 1):
        leaf, sharding = leaves[path], named_sharding(mesh, spec.axes)
        value = leaf.value()
        params[path] = _placed(value, dtype, sharding, borrow or value is not leaf.source)
        if params[path] is not leaf.source:
            unfinished.append(params[path])
        if sum(array.nbytes for array in unfinished) > CHUNK_BYTES:
            jax.block_until_ready(unfinished)
            unfinished = []
        report(done, len(specs))
    return jax.block_until_ready(params)


def _placed(value: Any, dtype: str, sharding: jax.sharding.NamedSharding, may_keep: bool) -> jax.Array:
    if not isinstance(value, jax.Array):  # a copy in any case: the owner of NumPy's memory may write to it
        return jax.device_put(np.asarray(value).astype(jnp.dtype(dtype)), sharding)
    if str(value.dtype) != dtype:
        value, may_keep = _cast(value, dtype), True
    if may_keep and value.sharding.is_equivalent_to(sharding, value.ndim):
        return value
    placed = jax.device_put(value, sharding)  # shares memory where a shard is in its place already
    return placed if may_keep else _copy(placed)


@partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: str) -> jax.Array:
    return x.astype(dtype)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.copy(x)
