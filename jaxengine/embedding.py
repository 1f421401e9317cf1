"""Embeddings: prompts become requests for hidden states behind the last norm, and their outputs become vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, get_args

import numpy as np

from jaxengine.errors import RequestError
from jaxengine.request import Pooling, PoolingParams, RequestOutput


def as_list(prompts: Any) -> list[Any]:
    """Several prompts, of several or of one: a text, or the token ids of one."""
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    return [found] if found and all(isinstance(token, Integral) for token in found) else found


@dataclass(frozen=True)
class Embedding:
    """What a vector is made of. Raises RequestError for what cannot be."""

    hidden_size: int
    pooling: Pooling = "last"
    normalize: bool = True  # to length 1
    dimensions: int | None = None  # the first ones alone (Matryoshka), before the length is made 1; None: all

    def __post_init__(self):
        if self.pooling not in get_args(Pooling):
            raise RequestError(f"pooling={self.pooling!r} must be one of {', '.join(get_args(Pooling))}")
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize={self.normalize!r} must be True or False")
        whole = isinstance(self.dimensions, int) and not isinstance(self.dimensions, bool)
        if self.dimensions is not None and not (whole and 1 <= self.dimensions <= self.hidden_size):
            raise RequestError(f"dimensions={self.dimensions!r} must be an integer from 1 to {self.hidden_size}")

    def request(self, ids: Sequence[int], max_model_len: int, truncate: bool) -> tuple[list[int], PoolingParams]:
        """Prompt and parameters for a text. truncate: one that is too long loses its last tokens, else it raises."""
        if isinstance(ids, str) or not isinstance(ids, Sequence | np.ndarray):
            raise RequestError(f"what is embedded is a text or a list of token ids, not {ids!r:.100}")
        if not len(ids):
            raise RequestError("a text without tokens has no hidden states to pool")
        if len(ids) > max_model_len and not truncate:
            raise RequestError(
                f"a text of {len(ids)} tokens exceeds {max_model_len=}; truncate=True cuts its last tokens off"
            )
        ids = np.asarray(ids[:max_model_len]).tolist()
        params = PoolingParams(
            max_tokens=0, temperature=0, prompt_logprobs=0, detokenize=False, pooling=self.pooling,
            prompt_logprobs_start=len(ids) if self.pooling == "last" else 0,
        )  # fmt: skip
        return [*ids, ids[-1]], params  # any token: the last one of such a prompt is not computed

    def vector(self, output: RequestOutput) -> np.ndarray:
        """float32 [dimensions]. Raises the request's error."""
        if output.error is not None:
            raise output.error
        assert output.hidden_state is not None
        found = output.hidden_state[: self.dimensions]
        return found / max(float(np.linalg.norm(found)), 1e-12) if self.normalize else found
