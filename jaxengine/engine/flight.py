"""A step on its way."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxengine.step import StepOutputs


class Flight:
    """Results are being copied to the host while others are computed."""

    def __init__(self, arrays: Mapping[str, Any], prompt_vocab: Sequence[np.ndarray], order: np.ndarray | None):
        self._arrays, self._prompt_vocab, self._order = arrays, prompt_vocab, order
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def result(self) -> StepOutputs:
        """Waits for the device. Raises what the device raised."""
        host: dict[str, Any] = jax.tree.map(np.asarray, dict(self._arrays))
        if self._order is not None:
            host |= {name: host[name][self._order] for name in host.keys() - {"prompt", "pooled"}}
        tokens = host.pop("tokens", np.zeros(0, np.int32))
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        return StepOutputs(tokens, **host, prompt_vocab=self._prompt_vocab)
