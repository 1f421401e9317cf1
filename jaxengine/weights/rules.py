"""What becomes of each array of a tree: rules by name, checked on names, shapes and dtypes before anything is read."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from converters import families
from converters.attributes import DTYPES
from jaxengine.config import ModelConfig, ParamRule
from jaxengine.errors import CheckpointError, ConfigError
from jaxengine.models import GROUPS, param_specs

SAME = ParamRule(("",))


@dataclass(frozen=True)
class Leaf:
    """One canonical parameter: part `index` of what `rule` makes of `source`."""

    name: str  # the trainer's
    source: Any  # jax or NumPy array; of one on disk, an orbax_format.Stored
    rule: ParamRule  # without names, so that layers share a program
    index: int
    shape: tuple[int, ...]  # of the result

    def value(self) -> Any:
        """The array itself where the rule changes nothing."""
        return self.source if self.rule == SAME else _program(self.rule, self.index)(self.source)


def find_leaves(
    where: Path,
    arrays: Mapping[str, Any],
    config: ModelConfig,
    mapping: Mapping[str, ParamRule] | None,
    also: Collection[str] = (),
) -> dict[str, Leaf]:
    """Every canonical parameter among `arrays` (anything with shape and dtype), and those of `also` that are there.

    mapping: None for arrays with canonical or transformers' names. Raises CheckpointError with every fault there is.
    """
    specs, faults = param_specs(config), []
    leaves: dict[str, Leaf] = {}
    broken: set[str] = set()
    wanted = set(specs).union(also)
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
            name, target = next(iter(families.sources(config.model_type, {path: spec.shape}).items()))
            faults.append(f"missing: {name if theirs and target.index is None else path}")
        elif leaves[path].shape != spec.shape:
            got, name = list(leaves[path].shape), leaves[path].name
            origin = "" if name == path else f" from {name}"
            faults.append(f"of shape {got}, where the config says {list(spec.shape)}: {path}{origin}")
    raise_faults(where, list(dict.fromkeys(faults)))  # a fused tensor lacks once
    return leaves


def raise_faults(path: Path, faults: list[str]) -> None:
    """Raises CheckpointError with all of them, if there are any."""
    if faults:
        listed = "\n  ".join(faults)
        raise CheckpointError(f"{path}: the tensors are not those of its config\n  {listed}")


def usual_dtype(arrays: Mapping[str, Any]) -> str:
    """That of most of the values, of those that are served."""
    sizes: dict[str, int] = {}
    for array in arrays.values():
        sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.size
    return max(DTYPES, key=lambda name: sizes.get(name, 0))


def _mapped_rule(name: str, mapping: Mapping[str, ParamRule]) -> ParamRule | None:
    """What becomes of the parameter; None for one that no pattern matches."""
    for pattern, rule in mapping.items():
        if not isinstance(rule, ParamRule):
            raise ConfigError(f"param_mapping[{pattern!r}]={rule!r} must be a ParamRule")
        try:
            if match := re.fullmatch(pattern, name):
                return replace(rule, to=tuple(match.expand(path) for path in rule.paths))
        except (re.error, IndexError) as error:
            raise ConfigError(f"param_mapping[{pattern!r}] to {rule.to!r}: {error}") from error
    return None


def _canonical_rule(name: str, config: ModelConfig) -> ParamRule:
    """For a name that is transformers' or canonical already."""
    if target := families.target(config.model_type, name):
        if target.index is not None:
            raise CheckpointError(
                f"{name} is one of the experts: give all of them in one array, as {target.paths[0]} [experts, in, out]"
            )
        return ParamRule(
            target.paths, (1, 0) if target.transposed else None, hook=turns_of_two if target.interleaved else None
        )
    return ParamRule((".".join(part for part in name.split(".") if part not in GROUPS),))


def turns_of_two(x: jax.Array) -> list[jax.Array]:
    """The shares of a tensor of which two take turns, column by column."""
    return [x[..., ::2], x[..., 1::2]]


def _shapes(source: Any, rule: ParamRule) -> list[tuple[int, ...]]:
    """Of the parameters that the rule makes of an array."""
    if rule == SAME:
        return [tuple(source.shape)]
    parts = jax.eval_shape(partial(apply, rule), jax.ShapeDtypeStruct(source.shape, source.dtype))
    return [part.shape for part in parts]


def apply(rule: ParamRule, x: jax.Array) -> list[jax.Array]:
    """The parameters that a rule makes of an array. Raises ValueError, and what the user's hook raises."""
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
    return jax.jit(lambda x: apply(rule, x)[index])  # of the other parts nothing is computed
