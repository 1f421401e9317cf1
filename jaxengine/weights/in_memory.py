"""Parameters that are in memory already: a trainer's module, state or tree, by canonical or by transformers' names.

An array whose dtype and sharding are those that the engine wants is used as it is, not copied.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters import ConversionError, UnsupportedOptionError, families
from converters.tensors import Target
from jaxengine.config import ModelConfig
from jaxengine.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxengine.sharding import ParamSpec, named_sharding
from jaxengine.weights.checkpoint import Checkpoint, read_config
from jaxengine.weights.orbax_format import leaves, raise_unlike

GROUPS = ("qkv", "gate_up")  # of our modules: they hold the projections of one input, whose names do not say so
WHERE = Path("parameters in memory")
SERVED = ("float32", "bfloat16", "float16")
HEAD, EMBEDDING = "lm_head.kernel", "embed_tokens.embedding"


def checkpoint_in_memory(tree: Any, config: Any) -> Checkpoint:
    """Parameters as a checkpoint: `tree` as `flatten` takes it, `config` what config.json holds (a mapping or an object
    of transformers') or a ModelConfig.

    Raises CheckpointError and its kin; names and shapes are checked when the parameters are placed.
    """
    hf_config: Mapping[str, Any] = {}
    if not isinstance(config, ModelConfig):
        if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
            raise CheckpointError(
                f"config={config!r:.100} must be what config.json holds, a transformers config, or a ModelConfig"
            )
        hf_config = dict(config if isinstance(config, Mapping) else config.to_dict())
        try:
            config = read_config(hf_config, "float32", ())
        except UnsupportedOptionError as error:
            raise UnsupportedModelError(f"config: {error}") from error
        except (ConversionError, ConfigError) as error:
            raise CheckpointError(f"config: {error}") from error
    arrays = flatten(tree)
    if not arrays:
        raise CheckpointError(f"{WHERE}: there are none")
    if wrong := {name: str(array.dtype) for name, array in arrays.items() if str(array.dtype) not in SERVED}:
        raise CheckpointError(f"{WHERE}: of dtypes that are not among {', '.join(SERVED)}: {wrong}")
    config = replace(config, dtype=dtype_of(arrays))
    return Checkpoint(WHERE, "memory", config, {}, None, hf_config, arrays=canonical(config, arrays))


def flatten(tree: Any) -> dict[str, Any]:
    """An nnx.Module, an nnx.State or a mapping (nested, or with dotted names) -> arrays by dotted name.

    Raises CheckpointError for a leaf that is no array.
    """
    from flax import nnx

    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    if isinstance(state, nnx.State):
        state = nnx.to_pure_dict(state)
    found = {}
    for path, leaf in leaves(state):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise CheckpointError(f"{WHERE}: {'.'.join(path)} is a {type(leaf).__name__}, not an array")
        name = ".".join(part for part in path if part not in GROUPS)
        if name in found:
            raise CheckpointError(f"{WHERE}: {name} is there twice")
        found[name] = leaf
    return found


def canonical(config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays by canonical name. Those with transformers' names are transposed and cut, which copies them.

    A tied head that is there all the same is left out. Raises CheckpointError for one that is another than the
    embedding, for a name that comes twice, and for a tensor that cannot be cut.
    """
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        target = families.target(config.model_type, name)
        if target is None:
            target, parts = Target((name,)), [array]
        elif len(target.paths) > 1 and array.shape[-1] % len(target.paths):
            raise CheckpointError(f"{WHERE}: {name} {list(array.shape)} is not {len(target.paths)} equal parts")
        else:
            parts = _parts(array, target)
        if twice := found.keys() & set(target.paths):
            raise CheckpointError(f"{WHERE}: {', '.join(sorted(twice))} is there twice")
        found |= zip(target.paths, parts)
    if config.tie_word_embeddings and HEAD in found and EMBEDDING in found:
        head, embedding = found.pop(HEAD), found[EMBEDDING]
        if head.shape != embedding.shape[::-1] or not bool((jnp.asarray(head).T == jnp.asarray(embedding)).all()):
            raise CheckpointError(
                f"{WHERE}: the config says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; leave it out, "
                "or say tie_word_embeddings=False in config"
            )
    return found


def place(
    arrays: Mapping[str, Any], specs: Mapping[str, ParamSpec], dtype: str, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Each on its devices and in `dtype`; the very same array where it is that already.

    Raises CheckpointError naming every parameter that is missing, unexpected or of the wrong shape.
    """
    raise_unlike(WHERE, {name: tuple(array.shape) for name, array in arrays.items()}, specs)

    def placed(name: str, array: Any) -> jax.Array:
        sharding = named_sharding(mesh, specs[name].axes)
        right = isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim)
        if right and array.dtype == dtype:
            return array
        return jax.device_put(jnp.asarray(array, dtype), sharding)

    return {name: placed(name, arrays[name]) for name in specs}


def dtype_of(arrays: Mapping[str, Any]) -> str:
    """That of most of the values."""
    sizes: dict[str, int] = {}
    for array in arrays.values():
        sizes[str(array.dtype)] = sizes.get(str(array.dtype), 0) + array.size
    return max(sizes, key=lambda name: sizes[name])


def _parts(array: Any, target: Target) -> list[Any]:
    if target.transposed:
        return [array.T]
    return jnp.split(array, len(target.paths), axis=-1) if len(target.paths) > 1 else [array] * len(target.paths)
