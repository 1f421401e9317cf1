"""A step on its way."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxengine.step import StepOutputs


class Flight:
    """Results are being copied to the host while others are computed."""

    def __init__(
        self,
        arrays: Mapping[str, Any],
        prompt_vocab: Sequence[np.ndarray],
        order: np.ndarray | None,
        asked: tuple[int, int] = (1, 0),
    ):
        """`arrays["prompt"]` has parts, a chunk of each shard's tokens. asked: how many shards, of how many tokens."""
        self._arrays, self._prompt_vocab, self._order, self._asked = arrays, prompt_vocab, order, asked
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def result(self) -> StepOutputs:
        """Waits for the device. Raises what the device raised."""
        host: dict[str, Any] = jax.tree.map(np.asarray, dict(self._arrays))
        if self._order is not None:
            host |= {name: host[name][self._order] for name in host.keys() - {"prompt", "pooled"}}
        if "prompt" in host:
            host["prompt"] = tuple(self._of_shards(parts) for parts in zip(*host["prompt"], strict=True))
        tokens = host.pop("tokens", np.zeros(0, np.int32))
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        return StepOutputs(tokens, **host, prompt_vocab=self._prompt_vocab)

    def _of_shards(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """[shards * chunk, ...] of each part -> [shards * tokens, ...]; what no part holds is 0."""
        (shards, tokens), (_, *rest) = self._asked, parts[0].shape
        known = np.concatenate([part.reshape(shards, len(part) // shards, *rest) for part in parts], axis=1)
        missing = max(0, tokens - known.shape[1])
        whole = np.pad(known[:, :tokens], [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
        return whole.reshape(shards * tokens, *rest)
