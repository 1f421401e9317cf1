"""Parameters that a trainer has in memory: named, checked like a checkpoint, borrowed where they fit."""

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
from jaxengine.weights.checkpoint import EMBEDDING, HEAD, Checkpoint, raise_faults, read_config

WHERE = Path("parameters in memory")  # where a checkpoint's messages have its path
CHUNK_BYTES = 2**28  # that are copied or resharded at a time
SAME = ParamRule(("",))


@dataclass(frozen=True)
class Leaf:
    """One canonical parameter: part `index` of what `rule` makes of `source`."""

    name: str  # the trainer's
    source: Any  # jax or NumPy array
    rule: ParamRule  # without names, so that layers share a program
    index: int
    shape: tuple[int, ...]  # of the result

    def value(self) -> Any:
        """The array itself where the rule changes nothing."""
        return self.source if self.rule == SAME else _program(self.rule, self.index)(self.source)


def checkpoint_in_memory(tree: Any, config: Any, mapping: Mapping[str, ParamRule] | None = None) -> Checkpoint:
    """Finds every parameter of the model in `tree`; nothing is computed or copied, but to compare a tied head.

    tree: an NNX module of ours, its nnx.State, or a tree of arrays (nested, or with dotted names) by canonical or by
    transformers' names. config: config.json's content, a transformers config, or a ModelConfig. mapping: for other
    trainers, patterns of their dotted names; the first that matches a whole name says what becomes of it.

    Raises CheckpointError with all that is missing, unexpected, misshapen, deleted or of a dtype that is not served;
    UnsupportedModelError for the config; ConfigError for what is no tree, or no mapping.
    """
    arrays = _arrays(tree)
    model, hf_config = _model_config(config)
    return Checkpoint(
        WHERE, "memory", replace(model, dtype=_usual_dtype(arrays)), {}, None, hf_config,
        arrays=_leaves(arrays, model, mapping),
    )  # fmt: skip


def _arrays(tree: Any) -> dict[str, Any]:
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"model of type {type(tree).__name__}: parameters are an NNX module, an nnx.State, or a dict of arrays; "
            "files are given by their folder"
        )
    leaves = list(flatten(tree))
    arrays = dict(leaves)
    if not arrays:
        raise CheckpointError(f"{WHERE}: there are none")
    if twice := [name for name, count in Counter(name for name, _ in leaves).items() if count > 1]:
        raise CheckpointError(f"{WHERE}: twice: {', '.join(twice)}")
    if wrong := [
        f"{n} is a {type(x).__name__}" for n, x in arrays.items() if not isinstance(x, jax.Array | np.ndarray)
    ]:
        raise CheckpointError(f"{WHERE}: {', '.join(wrong)}, not an array")
    return arrays


def _usual_dtype(arrays: Mapping[str, Any]) -> str:
    """That of most of the values."""
    sizes: dict[str, int] = {}
    for array in arrays.values():
        sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.size
    return max(DTYPES, key=lambda name: sizes.get(name, 0))


def _model_config(config: Any) -> tuple[ModelConfig, Mapping[str, Any]]:
    if isinstance(config, ModelConfig):
        return config, {}
    found = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"config={config!r:.100} must be what config.json holds, a transformers config, or a ModelConfig"
        )
    try:
        return read_config(found, "float32", ()), found
    except UnsupportedOptionError as error:
        raise UnsupportedModelError(f"config: {error}") from error
    except (ConversionError, ConfigError) as error:
        raise CheckpointError(f"config: {error}") from error


def _leaves(arrays: Mapping[str, Any], config: ModelConfig, mapping: Mapping[str, ParamRule] | None) -> dict[str, Leaf]:
    """Every canonical parameter. Raises CheckpointError with every fault there is."""
    specs, faults = param_specs(config), []
    leaves: dict[str, Leaf] = {}
    broken: set[str] = set()
    wanted = set(specs) | ({HEAD} if config.tie_word_embeddings else set())
    for name, source in arrays.items():
        rule = _canonical_rule(name, config) if mapping is None else _mapped_rule(name, mapping)
        if rule is None or not wanted.issuperset(rule.paths):
            becomes = f" (would be {', '.join(rule.paths)})" if rule and rule.paths != (name,) else ""
            faults.append(f"unexpected: {name} {list(source.shape)}{becomes}")
            continue
        if not rule.paths:
            continue
        if str(source.dtype) not in DTYPES:
            faults.append(f"of dtype {source.dtype}, not one of {', '.join(DTYPES)}: {name}")
        if isinstance(source, jax.Array) and source.is_deleted():
            faults.append(f"deleted, its buffer was given to a program that donates it: {name}")
        how = replace(rule, to=("",) * len(rule.paths))
        try:
            shapes = _shapes(source, how)
        except Exception as error:  # a hook may raise anything
            faults.append(f"of shape {list(source.shape)}, no {' and '.join(rule.paths)} ({error}): {name}")
            broken.update(rule.paths)
            continue
        for i, (path, shape) in enumerate(zip(rule.paths, shapes, strict=True)):
            if path in leaves:
                faults.append(f"twice: {path} from {leaves[path].name} and {name}")
            leaves[path] = Leaf(name, source, how, i, shape)
    theirs = mapping is None and any(name.endswith(".weight") for name in arrays)  # transformers' names
    for path, spec in specs.items():
        if path in broken:
            continue
        if path not in leaves:
            faults.append(f"missing: {families.source(config.model_type, path) if theirs else path}")
        elif leaves[path].shape != spec.shape:
            got, name = list(leaves[path].shape), leaves[path].name
            origin = "" if name == path else f" from {name}"
            faults.append(f"of shape {got}, where the config says {list(spec.shape)}: {path}{origin}")
    raise_faults(WHERE, list(dict.fromkeys(faults)))  # a fused tensor lacks once
    if config.tie_word_embeddings and HEAD in leaves:
        head, embedding = leaves.pop(HEAD), leaves[EMBEDDING]
        if head.shape != embedding.shape[::-1] or not bool(jnp.array_equal(head.value().T, embedding.value())):
            raise CheckpointError(
                f"{WHERE}: the config says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; leave it out, "
                "or say tie_word_embeddings=False in config"
            )
    return leaves


def _mapped_rule(name: str, mapping: Mapping[str, ParamRule]) -> ParamRule | None:
    """What becomes of the parameter; None for one that no pattern matches."""
    for pattern, rule in mapping.items():
        if not isinstance(rule, ParamRule):
            raise ConfigError(f"param_mapping[{pattern!r}]={rule!r} must be a ParamRule")
        if match := re.fullmatch(pattern, name):
            return replace(rule, to=tuple(match.expand(path) for path in rule.paths))
    return None


def _canonical_rule(name: str, config: ModelConfig) -> ParamRule:
    """For a name that is transformers' or canonical already."""
    if target := families.target(config.model_type, name):
        return ParamRule(target.paths, (1, 0) if target.transposed else None)
    return ParamRule((".".join(part for part in name.split(".") if part not in GROUPS),))


def _shapes(source: Any, rule: ParamRule) -> list[tuple[int, ...]]:
    """Of the parameters that the rule makes of an array."""
    if rule == SAME:
        return [tuple(source.shape)]
    parts = jax.eval_shape(partial(_apply, rule), jax.ShapeDtypeStruct(source.shape, source.dtype))
    return [part.shape for part in parts]


def _apply(rule: ParamRule, x: jax.Array) -> list[jax.Array]:
    count = len(rule.paths)
    x = x if rule.transpose is None else jnp.transpose(x, rule.transpose)
    x = x if rule.reshape is None else jnp.reshape(x, rule.reshape)
    found = x if rule.hook is None else rule.hook(x)
    if isinstance(found, list | tuple):
        if len(found) != count:
            raise ValueError(f"the hook gives {len(found)} arrays for {count} names")
        return list(found)
    if count > 1 and (not found.ndim or found.shape[-1] % count):
        raise ValueError(f"{list(found.shape)} is not {count} equal parts")
    return jnp.split(found, count, axis=-1)


@cache  # the next update with the same rules finds its programs compiled
def _program(rule: ParamRule, index: int) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda x: _apply(rule, x)[index])  # of the other parts nothing is computed


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
