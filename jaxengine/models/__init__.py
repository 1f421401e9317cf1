"""The registry: `model_type` -> the parameters and the module of a family.

The canonical layout is public: a flat dict from a dotted path to an array, unfused, kernels `[in, out]`, names as
transformers has them (`layers.0.self_attn.q_proj.kernel`). `prepare` turns it into what the step runs.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.config import ModelConfig
from jaxengine.errors import UnsupportedModelError
from jaxengine.models import gpt2, llama
from jaxengine.sharding import ParamSpec

# Mistral, Qwen2 and Qwen3 are Llama with options that ModelConfig carries: windows, biases, norms on q and k.
FAMILIES = {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama, "gpt2": gpt2}

# Kernels with the same input that `prepare` joins into one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

GROUPS = {"qkv", "gate_up"}  # Projections: nodes of a module's state that canonical paths do without


def family(config: ModelConfig) -> ModuleType:
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"{config.model_type=} is not one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the canonical layout: path -> shape and logical axes."""
    return family(config).param_specs(config)


def build(config: ModelConfig, params: Mapping[str, jax.Array], max_model_len: int) -> nnx.Module:
    """The family's module over these arrays (canonical or prepared), not copied.

    `max_model_len`, in tokens, decides between the two factor sets of longrope.
    """
    return family(config).Model(config, nest(params), max_model_len)


def nest(params: Mapping[str, jax.Array]) -> dict:
    """{'a.b': x} -> {'a': {'b': x}}."""
    tree: dict = {}
    for path, value in params.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The reverse of `nest`, for nested mappings and lists of arrays (an nnx.State too): dotted paths and arrays."""
    if isinstance(tree, nnx.Variable):
        tree = tree.get_value()
    if isinstance(tree, Mapping | list | tuple):
        for name, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from flatten(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


def prepare(
    config: ModelConfig, params: dict[str, jax.Array], fuse: bool = True, transpose: bool = False
) -> dict[str, jax.Array]:
    """Canonical parameters -> those the step runs: q, k, v and gate, up joined, a tied head as a kernel of its own.

    Takes the arrays out of `params` one group at a time, so the peak is the model and one group. The kernel of a tied
    head is the embedding transposed: streaming `[in, out]` is several times faster. `transpose`: kernels are stored
    `[out, in]`, as `kernel_t`, and a tied head is the embedding itself; a CPU multiplies a few tokens by those faster.
    `fuse=False` runs on the very arrays it is given (and on the embedding where the head is tied).
    """
    if not fuse:
        return dict(params)
    for fused, parts in FUSED.items():
        for path in [path for path in params if path.split(".")[-2] == parts[0]]:
            scope, kind = path.removesuffix(path.split(parts[0])[-1]).removesuffix(parts[0]), path.split(".")[-1]
            params[f"{scope}{fused}.{kind}"] = _concatenate([params.pop(f"{scope}{part}.{kind}") for part in parts])
    if transpose:
        for path in [path for path in params if path.endswith(".kernel")]:
            params[f"{path}_t"] = _transpose(params.pop(path))
    if config.tie_word_embeddings:
        embedding = params["embed_tokens.embedding"]
        params |= {"lm_head.kernel_t": embedding} if transpose else {"lm_head.kernel": _transpose(embedding)}
    return params


@jax.jit
def _concatenate(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
    return x.T
