"""The families by `model_type`: config.json to ModelConfig's arguments, tensor names to canonical ones."""

from collections.abc import Iterable, Mapping
from typing import Any

from converters import ConversionError, UnsupportedOptionError, gpt2, llama, mistral, qwen2, qwen3
from converters.attributes import Attributes
from converters.tensors import Target, find, find_source

FAMILIES: dict[str, Any] = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's arguments, `rope` as a dict of RopeConfig's; no `dtype` if the file does not say it.

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


def tensors(model_type: str, paths: Iterable[str]) -> dict[str, Target]:
    """The checkpoint that holds these canonical parameters: every tensor, named as transformers names it."""
    family = FAMILIES[model_type]
    names = dict.fromkeys(find_source(family.TENSORS, path) for path in paths)
    found = {name: find(family.TENSORS, family.PREFIX, name) for name in names}
    return {name if name.startswith("lm_head") else family.PREFIX + name: t for name, t in found.items() if t}


def source(model_type: str, path: str) -> str:
    """The tensor that a canonical parameter comes from, without the optional prefix."""
    return find_source(FAMILIES[model_type].TENSORS, path)
