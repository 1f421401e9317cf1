"""An Orbax checkpoint of any trainer: where its parameters are, and by which rules they become canonical.

All of it is told by names of folders and by the metadata; no array is read.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.trainers import TRAINERS
from jaxengine.config import ModelConfig, ParamRule
from jaxengine.errors import CheckpointError, UnsupportedModelError

TREE = "_METADATA"  # the file that makes a folder a tree of arrays
# Parameters among the items of a step: ours and a user's own, Tunix's, MaxText's, CheckpointManager's, Orbax v1's.
ITEMS = ("params", "model_params", "items", "default", "pytree", "state", "model")
STEP = re.compile(r"(?:[^.]*[_-])?(\d+)")  # a dot: a save under way, `10.orbax-checkpoint-tmp-0`
RUN = "checkpoints"  # MaxText's folder of steps
# Nodes that may lie around a model. Moments of an optimizer have other parents, so they are not taken for one.
ROOT = r"((?:(?:params|model|state|model_params|base)\.)*?)"
OURS = r"embed_tokens\.embedding|(?:model\.)?embed_tokens\.weight|(?:transformer\.)?wte\.weight"  # transformers' too
SHOWN = 40  # lines of a tree that is not known


@dataclass(frozen=True)
class Layout:
    trainer: str  # of TRAINERS; "" for canonical or transformers' names, and for a table of the user's
    root: str = ""  # what stands before the name of each parameter
    mapping: Mapping[str, ParamRule] | None = None  # the user's

    def rules(self, path: Path, config: ModelConfig) -> Mapping[str, ParamRule] | None:
        """As find_leaves takes them. Raises UnsupportedModelError for a family that the trainer does not have."""
        if not self.trainer:
            return self.mapping
        trainer = TRAINERS[self.trainer]
        if config.model_type not in trainer.FAMILIES:
            raise UnsupportedModelError(
                f"{path}: {self.trainer}'s names for model_type={config.model_type!r} are not known, only those for "
                f"{', '.join(trainer.FAMILIES)}; param_mapping= says what becomes of each array"
            )
        return {pattern: ParamRule(**rule) for pattern, rule in trainer.rules(asdict(config)).items()}


def find_item(path: Path) -> Path | None:
    """The folder with the tree of parameters: `path`, an item of it, or one of its newest step; None: no Orbax here.

    Raises CheckpointError if there are several that could be meant.
    """
    for folder in (path, *(path / name for name in ITEMS)):
        if (folder / TREE).is_file():
            return folder
    folders = [child for child in path.iterdir() if child.is_dir()]
    steps = {int(match[1]): child for child in folders if (match := STEP.fullmatch(child.name))}
    for inner in ([steps[max(steps)]] if steps else []) + [path / RUN]:
        if inner.is_dir() and (item := find_item(inner)):
            return item
    others = sorted(folder.name for folder in folders if (folder / TREE).is_file())
    if len(others) > 1:
        raise CheckpointError(f"{path} holds several trees, give the one of the parameters: {', '.join(others)}")
    return path / others[0] if others else None


def homes(item: Path) -> Iterator[Path]:
    """Where config.json and the tokenizer may be: with the item, its step, or its run."""
    yield item
    yield item.parent
    run = item.parent
    if STEP.fullmatch(item.name) or STEP.fullmatch(run.name):
        run = run if STEP.fullmatch(item.name) else run.parent
        yield run
    if run.name == RUN:
        yield run.parent


def recognize(
    path: Path,
    arrays: Mapping[str, Any],
    mapping: Mapping[str, ParamRule] | None,
    default_mapping: Mapping[str, ParamRule] | None,
) -> Layout:
    """By the name of the embedding. Raises CheckpointError that shows the tree, if it is unknown or ambiguous.

    `mapping` comes before what would be known, `default_mapping` after.
    """
    if mapping is not None:
        return Layout("", mapping=mapping)
    patterns = {"": OURS} | {name: re.escape(trainer.EMBEDDING) for name, trainer in TRAINERS.items()}
    found = [
        Layout(trainer, match[1])
        for name in arrays
        for trainer, pattern in patterns.items()
        if (match := re.fullmatch(f"{ROOT}(?:{pattern})", name))
    ]
    if len(found) == 1:
        return found[0]
    if default_mapping is not None:
        return Layout("", mapping=default_mapping)
    what = f"holds {len(found)} models" if found else "is of a layout that is not known"
    raise CheckpointError(
        f"{path}: this Orbax checkpoint {what}. Known are canonical names (docs/trainer.md), transformers', those of "
        f"{' and '.join(TRAINERS)}. For others, param_mapping={{pattern: ParamRule}} says what becomes of each array, "
        "with ParamRule(()) for what is left out. The tree:\n  " + "\n  ".join(drawn(arrays))
    )


def drawn(arrays: Mapping[str, Any]) -> list[str]:
    """Names, shapes and dtypes; one line, with `*` for the numbers, for arrays that differ in those only."""
    alike: dict[str, list[str]] = {}
    for name, array in arrays.items():
        kind = f" {list(array.shape)} {array.dtype}"
        alike.setdefault(re.sub(r"\d+", "*", name) + kind, []).append(name + kind)
    lines = [lines[0] if len(lines) == 1 else f"{those} ({len(lines)} times)" for those, lines in alike.items()]
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
