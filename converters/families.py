"""The families by `model_type`: config.json to ModelConfig's arguments, tensor names to canonical ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from converters import (
    ConversionError,
    UnsupportedOptionError,
    gpt2,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from converters.attributes import Attributes
from converters.tensors import Target, find, find_sources

FAMILIES: dict[str, Any] = {
    "gpt2": gpt2, "gpt_oss": gpt_oss, "llama": llama, "mistral": mistral, "mixtral": mixtral, "qwen2": qwen2,
    "qwen3": qwen3, "qwen3_moe": qwen3_moe,
}  # fmt: skip


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's arguments, `rope` and `experts` as dicts of their own; no `dtype` if the file does not say it.

    Raises ConversionError naming every attribute that is wrong or, as UnsupportedOptionError, not handled.
    """
    kind = config.get("model_type")
    if kind is None:
        raise ConversionError(f"lacks model_type; known are {', '.join(FAMILIES)}")
    if kind not in FAMILIES:
        raise UnsupportedOptionError(f"model_type={kind!r} is not one of {', '.join(FAMILIES)}")
    attributes = Attributes(config)
    arguments = FAMILIES[kind].model_config(attributes)
    attributes.finish()
    return {"model_type": kind} | arguments


def target(model_type: str, name: str) -> Target | None:
    """What a tensor of this name becomes; None for a name that the family does not have."""
    family = FAMILIES[model_type]
    return find(family.TENSORS, family.PREFIX, name)


def sources(model_type: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Target]:
    """The tensors that hold canonical parameters of these shapes, without the optional prefix."""
    family = FAMILIES[model_type]
    names = dict.fromkeys(
        name for path, shape in shapes.items() for name in find_sources(family.TENSORS, path, shape[0])
    )
    return {name: target for name in names if (target := find(family.TENSORS, family.PREFIX, name))}


def tensors(model_type: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Target]:
    """The same as transformers names them."""
    prefix = FAMILIES[model_type].PREFIX
    return {
        name if name.startswith("lm_head") else prefix + name: target
        for name, target in sources(model_type, shapes).items()
    }
