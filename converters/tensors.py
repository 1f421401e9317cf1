"""Which canonical parameter a tensor of a checkpoint becomes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Canonical parameters that one tensor holds; several are equal shares of its last dimension, in this order.

    `transposed`: the tensor is `[out, in]`, the parameter `[in, out]`.
    """

    paths: tuple[str, ...]
    transposed: bool = False


IGNORED = Target(())  # a buffer that some writers left among the weights


def find(table: Mapping[str, Target], prefix: str, name: str) -> Target | None:
    """The target of a tensor: its name without the optional `prefix`, `{}` for the layer, looked up. None: unknown."""
    name = name.removeprefix(prefix)
    layer = re.search(r"\.(\d+)\.", name)
    target = table.get(re.sub(r"\.\d+\.", ".{}.", name, count=1))
    if target is None or layer is None:
        return target
    return Target(tuple(path.format(layer[1]) for path in target.paths), target.transposed)


def find_source(table: Mapping[str, Target], path: str) -> str:
    """The reverse: the tensor, without its prefix, that holds a canonical parameter."""
    layer = re.search(r"\.(\d+)\.", path)
    pattern = re.sub(r"\.\d+\.", ".{}.", path, count=1)
    name = next(name for name, target in table.items() if pattern in target.paths)
    return name.format(layer[1] if layer else "")


def rotary_decoder_table() -> dict[str, Target]:
    """The tensors of llama and its kin, without `model.`; a config that has no biases and norms makes these extra."""
    table = {
        "embed_tokens.weight": Target(("embed_tokens.embedding",)),
        "norm.weight": Target(("norm.scale",)),
        "lm_head.weight": Target(("lm_head.kernel",), True),
        "rotary_emb.inv_freq": IGNORED,
        "layers.{}.self_attn.rotary_emb.inv_freq": IGNORED,
    }
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        table |= _linear(f"layers.{{}}.self_attn.{part}")
    for part in ("gate_proj", "up_proj", "down_proj"):
        table |= _linear(f"layers.{{}}.mlp.{part}")
    for part in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        table[f"layers.{{}}.{part}.weight"] = Target((f"layers.{{}}.{part}.scale",))
    return table


def _linear(path: str) -> dict[str, Target]:
    return {f"{path}.weight": Target((f"{path}.kernel",), True), f"{path}.bias": Target((f"{path}.bias",))}
