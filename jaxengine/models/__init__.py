"""The registry: `model_type` -> the parameters and the module of a family.

The canonical layout is public: a flat dict from a dotted path to an array, unfused, kernels `[in, out]`, names as
transformers has them (`layers.0.self_attn.q_proj.kernel`). The experts of a layer are stacked, `[experts, in, out]`
(`layers.0.mlp.experts.up_proj.kernel`); their router is `layers.0.mlp.gate.kernel`. `prepare` turns it into what
the step runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxengine.config import ModelConfig
from jaxengine.errors import ConfigError, UnsupportedModelError
from jaxengine.models import gpt2, llama
from jaxengine.sharding import (
    EXPERT,
    LAYER,
    STAGE,
    TENSOR,
    Axis,
    ParamSpec,
    axis_size,
    named_sharding,
    stacked_sharding,
)

# All but GPT-2 are Llama with options that ModelConfig carries: windows, biases, norms on q and k, experts, sinks.
FAMILIES = {
    "llama": llama, "mistral": llama, "mixtral": llama, "qwen2": llama, "qwen3": llama, "qwen3_moe": llama,
    "gpt_oss": llama, "gpt2": gpt2,
}  # fmt: skip

# Kernels with the same input that `prepare` joins into one. Those of experts stay apart: one op reads gate and up.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

GROUPS = {"qkv", "gate_up"}  # Projections: nodes of a module's state that canonical paths do without


def family(config: ModelConfig) -> ModuleType:
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"{config.model_type=} is not one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the canonical layout: path -> shape and logical axes."""
    specs = family(config).param_specs(config)
    layers = {path: int(path.split(".")[1]) for path in specs if path.startswith("layers.")}
    return specs | {path: replace(specs[path], layer=(i, config.num_layers)) for path, i in layers.items()}


def sums_over_peers(config: ModelConfig, implementation: str) -> bool:
    """Whether its layers add and normalize in one pass, by a kernel that can sum over devices too."""
    return family(config) is llama and implementation == "triton"


def one_stage(config: ModelConfig, stages: int) -> ModelConfig:
    """The layers of each stage of a pipeline: layer i of stage s is layer `s * layers + i` of the model.

    Raises ConfigError where stages would differ.
    """
    if stages == 1:
        return config
    experts = config.experts.layers if config.experts else ()
    kinds = [(w, s, i in experts) for i, (w, s) in enumerate(zip(config.windows, config.attention_scales))]

    def fits(count: int) -> bool:
        own = config.num_layers // count
        return config.num_layers % count == 0 and kinds == kinds[:own] * count

    if not fits(stages):
        names = "windows", "attention_scales", "experts"
        differ = ", ".join(name for name, kind in zip(names, zip(*kinds)) if len(set(kind)) > 1)
        raise ConfigError(
            f"pipeline_parallel_size={stages} does not divide num_layers={config.num_layers} into stages that are alike"
            f"{f' (layers differ in {differ})' if differ else ''}; "
            f"use one of {[n for n in range(1, config.num_layers + 1) if fits(n)]}"
        )
    own = config.num_layers // stages
    return replace(
        config,
        num_layers=own,
        windows=config.windows[:own],
        attention_scales=config.attention_scales[:own],
        experts=config.experts and replace(config.experts, layers=tuple(i for i in experts if i < own)),
    )


def one_share(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model as each device has it: its stage's layers, its heads and MLP columns; where there are fewer KV heads, a
    whole one. Of the experts those of its group, and of them its columns.

    Raises ConfigError for what does not divide.
    """
    config = one_stage(config, axis_size(mesh, STAGE))
    experts, devices = config.experts, axis_size(mesh, LAYER)
    groups, columns = axis_size(mesh, EXPERT), axis_size(mesh, TENSOR)
    if groups > 1 and (experts is None or experts.count % groups):
        has = f"has {experts.count} experts" if experts else "has no experts"
        raise ConfigError(f"expert_parallel_size={groups} must divide the experts, this {config.model_type} {has}")

    def fits(count: int) -> bool:
        """For so many devices, in the groups there are."""
        return (
            (config.num_kv_heads % count == 0 or count % config.num_kv_heads == 0)
            and config.num_heads % count == 0
            and (not config.has_mlp or config.intermediate_size % count == 0)
            and (experts is None or experts.intermediate_size % (count // groups) == 0)
        )

    if not fits(devices):
        inner = f"intermediate_size={config.intermediate_size}" if config.has_mlp else ""
        of_experts = f"the experts' intermediate_size={experts.intermediate_size}" if experts else ""
        across = f" x expert_parallel_size={groups}" if groups > 1 else ""
        raise ConfigError(
            f"tensor_parallel_size={columns}{across} does not divide num_heads={config.num_heads}, "
            f"num_kv_heads={config.num_kv_heads} (or is not a multiple of it) and "
            f"{' and '.join(filter(None, (inner, of_experts)))}; "
            f"use one of {[n for n in range(1, columns) if fits(n * groups)]}"
        )
    if devices == 1:
        return config
    return replace(
        config,
        num_heads=config.num_heads // devices,
        num_kv_heads=max(1, config.num_kv_heads // devices),
        intermediate_size=config.intermediate_size // devices if config.has_mlp else config.intermediate_size,
        experts=experts and replace(experts, intermediate_size=experts.intermediate_size // columns),
    )


def build(config: ModelConfig, params: Mapping[str, Any], max_model_len: int, axis: Axis | None = None) -> nnx.Module:
    """The family's module over these arrays (canonical or prepared), not copied.

    `max_model_len`, in tokens, decides between the two factor sets of longrope. `axis`: the mesh axes that the arrays
    are split over; `config` is then `one_share`.
    """
    return family(config).Model(config, nest(params), max_model_len, axis)


def logical_axes(config: ModelConfig, paths: Iterable[str]) -> dict[str, tuple[str | None, ...]]:
    """Of canonical or prepared parameters."""
    axes = {path: spec.axes for path, spec in param_specs(config).items()}
    axes.setdefault("lm_head.kernel", axes["embed_tokens.embedding"][::-1])  # a tied one, prepared

    def of(path: str) -> tuple[str | None, ...]:
        *scope, name, kind = path.split(".")
        found = axes[".".join((*scope, FUSED.get(name, (name,))[0], kind.removesuffix("_t")))]
        return found[::-1] if kind.endswith("_t") else found

    return {path: of(path) for path in paths}


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
    config: ModelConfig,
    params: dict[str, jax.Array],
    fuse: bool = True,
    transpose: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """Canonical parameters -> those the step runs: q, k, v and gate, up joined, a tied head as a kernel of its own.

    Takes the arrays out of `params` one group at a time, so the peak is the model and one group. The kernel of a tied
    head is the embedding transposed: streaming `[in, out]` is several times faster. `transpose`: kernels are stored
    `[out, in]`, as `kernel_t`, and a tied head is the embedding itself; a CPU multiplies a few tokens by those faster.
    `fuse=False` runs on the very arrays it is given (and on the embedding where the head is tied).

    On a `mesh` of several devices KV heads of which there are fewer are repeated, the vocabulary is padded to what the
    devices divide, and what is joined is joined on each device: its heads of q, then those of k, then those of v.
    With stages the same parameter of each stage is a part of one array, under the name of the first stage's.
    """
    if mesh is not None and mesh.size == 1:
        mesh = None
    if mesh is not None:
        _fit(config, params, mesh)
    if fuse:
        _fuse(config, params, transpose, mesh)
    return dict(params) if mesh is None else _stack(config, params, mesh)


def _fuse(config: ModelConfig, params: dict[str, jax.Array], transpose: bool, mesh: Mesh | None) -> None:
    for fused, parts in FUSED.items():
        for path in [path for path in params if path.split(".")[-2] == parts[0] and ".experts." not in path]:
            scope, kind = path.removesuffix(path.split(parts[0])[-1]).removesuffix(parts[0]), path.split(".")[-1]
            sharding = params[path].sharding if mesh is not None else None
            apart = [params.pop(f"{scope}{part}.{kind}") for part in parts]
            params[f"{scope}{fused}.{kind}"] = _concatenate(apart, sharding)
    if transpose:
        for path in [path for path in params if path.endswith(".kernel") and params[path].ndim < 3]:
            params[f"{path}_t"] = _transpose(params.pop(path))
    if config.tie_word_embeddings:
        embedding = params["embed_tokens.embedding"]
        params |= {"lm_head.kernel_t": embedding} if transpose else {"lm_head.kernel": _transpose(embedding)}


def _fit(config: ModelConfig, params: dict[str, jax.Array], mesh: Mesh) -> None:
    devices = axis_size(mesh, LAYER)
    copies = max(1, devices // config.num_kv_heads)
    for path, spec in param_specs(config).items():
        axes, sharding = spec.axes, named_sharding(spec.on_stage(mesh), spec.axes)
        if copies > 1 and "kv_heads" in axes:
            params[path] = _repeat_heads(params[path], copies, config.head_dim, sharding)
        if "vocab" in axes and (padding := -params[path].shape[axes.index("vocab")] % devices):  # not yet padded
            params[path] = _pad(params[path], axes.index("vocab"), padding, sharding)
        params[path] = jax.device_put(params[path], sharding)  # shares the memory of what is in its place


def _stack(config: ModelConfig, params: Mapping[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Nothing moves: a device's part of the stacked array is what it has."""
    stages = axis_size(mesh, STAGE)
    if stages == 1:
        return dict(params)
    parts: dict[str, list[jax.Array]] = {}
    for path, array in params.items():
        if path.startswith("layers."):
            _, layer, rest = path.split(".", 2)
            parts.setdefault(f"layers.{int(layer) % (config.num_layers // stages)}.{rest}", []).append(array)
    stacked = {path: array for path, array in params.items() if not path.startswith("layers.")}
    for path, axes in logical_axes(config, parts).items():
        first, *others = parts[path][0].shape
        held = [shard.data for array in parts[path] for shard in array.addressable_shards]
        stacked[path] = jax.make_array_from_single_device_arrays(
            (stages * first, *others), stacked_sharding(mesh, axes), held
        )
    return stacked


@partial(jax.jit, static_argnums=(1, 2, 3))
def _repeat_heads(x: jax.Array, copies: int, head_dim: int, sharding: NamedSharding) -> jax.Array:
    heads = jnp.repeat(x.reshape(*x.shape[:-1], -1, head_dim), copies, axis=-2)
    return jax.lax.with_sharding_constraint(heads.reshape(*x.shape[:-1], -1), sharding)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _pad(x: jax.Array, axis: int, count: int, sharding: NamedSharding) -> jax.Array:
    widths = [(0, count if i == axis else 0) for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(jnp.pad(x, widths), sharding)


@partial(jax.jit, static_argnums=1)
def _concatenate(parts: list[jax.Array], sharding: NamedSharding | None) -> jax.Array:
    join = partial(jnp.concatenate, axis=-1)
    if sharding is None:
        return join(parts)
    return jax.shard_map(join, mesh=sharding.mesh, in_specs=(sharding.spec,), out_specs=sharding.spec)(parts)


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
    return x.T
