"""Which canonical parameter a tensor of a checkpoint becomes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Target:
    """Canonical parameters that one tensor holds; several are equal shares of its last dimension, in this order.

    `transposed`: the tensor is `[out, in]`, the parameter `[in, out]`. `index`: the tensor is that entry of the
    parameter's first dimension, which has others of the same kind. `interleaved`: the shares take turns, column by
    column.
    """

    paths: tuple[str, ...]
    transposed: bool = False
    index: int | None = None
    interleaved: bool = False

    def stored_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's, from those of the parameters."""
        if not self.paths:
            return ()
        parts = [shapes[path][0 if self.index is None else 1 :] for path in self.paths]
        whole = (*parts[0][:-1], sum(part[-1] for part in parts))
        return whole[::-1] if self.transposed else whole


IGNORED = Target(())  # a buffer that some writers left among the weights


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def find(table: Mapping[str, Target], prefix: str, name: str) -> Target | None:
    """The target of a tensor: its name without the optional `prefix`, `{}` for layer and expert, looked up.

    None: unknown.
    """
    name = name.removeprefix(prefix)
    numbers = _NUMBER.findall(name)
    target = table.get(_NUMBER.sub("{}", name))
    if target is None or not numbers:
        return target
    index = int(numbers[1]) if len(numbers) > 1 else None
    return replace(target, paths=tuple(path.format(numbers[0]) for path in target.paths), index=index)


def find_sources(table: Mapping[str, Target], path: str, count: int) -> list[str]:
    """The reverse: the tensors, without their prefix, that hold a canonical parameter, stacked ones `count`."""
    pattern, numbers = _NUMBER.sub("{}", path), _NUMBER.findall(path)
    name = next(name for name, target in table.items() if pattern in target.paths)
    stacked = name.count("{}") > len(numbers)
    return [name.format(*numbers, i) for i in range(count)] if stacked else [name.format(*numbers)]


def rotary_decoder_table(experts: tuple[str, tuple[str, str, str]] | None = None) -> dict[str, Target]:
    """The tensors of llama and its kin, without `model.`; a config that has no biases and norms makes these extra.

    experts: what a layer calls its mixture of experts, and an expert its gate, up and down.
    """
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
    if experts is not None:
        block, names = experts
        table[f"layers.{{}}.{block}.gate.weight"] = Target(("layers.{}.mlp.gate.kernel",), True)
        for name, part in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
            path = f"layers.{{}}.mlp.experts.{part}.kernel"
            table[f"layers.{{}}.{block}.experts.{{}}.{name}.weight"] = Target((path,), True)
    for part in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        table[f"layers.{{}}.{part}.weight"] = Target((f"layers.{{}}.{part}.scale",))
    return table


def _linear(path: str) -> dict[str, Target]:
    return {f"{path}.weight": Target((f"{path}.kernel",), True), f"{path}.bias": Target((f"{path}.bias",))}
