"""Parameters that a trainer has in memory: named, checked like a checkpoint, borrowed where they fit."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxengine.config import ModelConfig, ParamRule
from jaxengine.errors import CheckpointError, ConfigError
from jaxengine.models import flatten
from jaxengine.sharding import ParamSpec
from jaxengine.weights.checkpoint import EMBEDDING, HEAD, Checkpoint, given_config
from jaxengine.weights.rules import Leaf, find_leaves, usual_dtype

WHERE = Path("parameters in memory")  # where a checkpoint's messages have its path
CHUNK_BYTES = 2**28  # that are copied or resharded at a time


def checkpoint_in_memory(tree: Any, config: Any, mapping: Mapping[str, ParamRule] | None = None) -> Checkpoint:
    """Finds every parameter of the model in `tree`; nothing is computed or copied, but to compare a tied head.

    tree: an NNX module of ours, its nnx.State, or a tree of arrays (nested, or with dotted names) by canonical or by
    transformers' names. config: config.json's content, a transformers config, or a ModelConfig. mapping: for other
    trainers, patterns of their dotted names; the first that matches a whole name says what becomes of it.

    Raises CheckpointError with all that is missing, unexpected, misshapen, deleted or of a dtype that is not served;
    UnsupportedModelError for the config; ConfigError for what is no tree, or no mapping.
    """
    arrays = _arrays(tree)
    model, hf_config = given_config(config)
    leaves = find_leaves(WHERE, arrays, model, mapping, (HEAD,) if model.tie_word_embeddings else ())
    _drop_tied_head(leaves, model)
    return Checkpoint(
        WHERE, "memory", replace(model, dtype=usual_dtype(arrays)), {}, None, hf_config, arrays=leaves
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


def _drop_tied_head(leaves: dict[str, Leaf], config: ModelConfig) -> None:
    """Raises CheckpointError if it is something else than the embedding."""
    if config.tie_word_embeddings and HEAD in leaves:
        head, embedding = leaves.pop(HEAD), leaves[EMBEDDING]
        if head.shape != embedding.shape[::-1] or not bool(jnp.array_equal(head.value().T, embedding.value())):
            raise CheckpointError(
                f"{WHERE}: the config says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; leave it out, "
                "or say tie_word_embeddings=False in config"
            )


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
        leaf, sharding = leaves[path], spec.sharding(mesh)
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
        array = np.asarray(value).astype(jnp.dtype(dtype))
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        # device_put would compare all.
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__, dtype=array.dtype)
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
