"""Rollouts for reinforcement learning over an LLM, by the contract that Tunix has for its rollout engines.

The contract is that of `BaseRollout` in https://github.com/google/tunix, tunix/rl/rollout/base_rollout.py. Tunix itself
is not needed; where it checks the type, `BaseRollout.register(Rollout)` says that this is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxengine.errors import ConfigError, UnsupportedError
from jaxengine.llm import LLM
from jaxengine.request import SamplingParams


@dataclass(frozen=True)
class RolloutConfig:
    """What Tunix's config of this name says to any engine; `Rollout.generate` reads these attributes of either."""

    max_tokens_to_generate: int = 64
    temperature: float = 0.9
    top_p: float | None = 1.0
    top_k: int | None = None  # None or -1: all
    seed: int | jax.Array | None = None  # a number or a key; None: derived by the engine
    max_prompt_length: int = 64
    eos_tokens: Sequence[int] | None = None  # end the output instead of the model's own


@dataclass(frozen=True)
class RolloutOutput:
    """Completions of a batch of prompts. Padding is `pad_id`, and 0 in `logprobs`."""

    text: list[str]  # empty ones of a model without a tokenizer
    tokens: np.ndarray  # int32 [batch, max_tokens_to_generate], padded on the right; the end token is kept
    left_padded_prompt_tokens: np.ndarray  # int32 [batch, length of the longest prompt, max_prompt_length at least]
    logprobs: np.ndarray  # float32 as `tokens`; of what distribution: EngineConfig.logprobs_mode
    lengths: np.ndarray  # int32 [batch]: tokens of each completion
    prompt_lengths: np.ndarray  # int32 [batch]: of each prompt, without padding
    weight_versions: list[tuple[tuple[int, int], ...]]  # of each completion: (its first token, version) of each span
    logits: None = None  # of the contract; a step keeps none


class Rollout:
    """An LLM as a rollout engine: it samples, scores what was sampled, and takes the trainer's new parameters."""

    def __init__(self, llm: LLM):
        """Raises ConfigError for a model that has no end token."""
        self.llm = llm
        if not llm.model_config.eos_token_ids:
            raise ConfigError("the model has no eos_token_id: give one in the config")
        pad = None if llm._tokenizer is None else llm._tokenizer.pad_token_id
        self._pad = self.eos_id() if pad is None else pad

    def generate(self, prompts: Sequence[Any], rollout_config: Any, **sampling: Any) -> RolloutOutput:
        """A completion of each prompt, a text or token ids; a prompt that comes several times gets different ones.

        rollout_config: RolloutConfig, or Tunix's. sampling: further fields of SamplingParams. Raises RequestError for
        bad input, and what the engine raised for a request that it could not end.
        """
        seed = _seed_number(rollout_config.seed)
        ends = rollout_config.eos_tokens
        params = [
            SamplingParams(
                max_tokens=rollout_config.max_tokens_to_generate,
                temperature=rollout_config.temperature,
                top_p=1.0 if rollout_config.top_p is None else rollout_config.top_p,
                top_k=0 if rollout_config.top_k is None else rollout_config.top_k,
                seed=None if seed is None else (seed + i) % 2**63,
                ignore_eos=ends is not None,
                stop_token_ids=tuple(ends or ()),
                logprobs=0,
                **{"detokenize": self.llm._tokenizer is not None, **sampling},
            )
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate(list(prompts), params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
        completions = [output.outputs[0] for output in outputs]
        lengths = np.array([len(completion.token_ids) for completion in completions], np.int32)
        width, pad = rollout_config.max_tokens_to_generate, self.pad_id()
        prompt_lengths = np.array([len(output.prompt_token_ids) for output in outputs], np.int32)
        before_width = max(prompt_lengths.max(initial=0), rollout_config.max_prompt_length)
        before = np.full((len(outputs), before_width), pad, np.int32)
        tokens = np.full((len(outputs), width), pad, np.int32)
        logprobs = np.zeros((len(outputs), width), np.float32)
        for i, (output, completion) in enumerate(zip(outputs, completions, strict=True)):
            assert completion.logprobs is not None
            before[i, before_width - prompt_lengths[i] :] = output.prompt_token_ids
            tokens[i, : lengths[i]] = completion.token_ids
            logprobs[i, : lengths[i]] = completion.logprobs.logprobs
        return RolloutOutput(
            [completion.text for completion in completions], tokens, before, logprobs, lengths,
            prompt_lengths, [tuple(completion.weight_versions) for completion in completions],
        )  # fmt: skip

    def get_per_token_logps(
        self, prompt_tokens: Any, completion_tokens: Any, completion_mask: Any | None = None
    ) -> jax.Array:
        """The model's log-probability of each completion token, float32 [batch, completion]; 0 where there is none.

        prompt_tokens [batch, prompt], padded on the left. completion_tokens [batch, completion]: those count that the
        mask has, a run from the left; without a mask those up to the first end token. Raises RequestError.
        """
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        lengths = _completion_lengths(completions, completion_mask, self.llm.model_config.eos_token_ids)
        first = (prompts != self.pad_id()).argmax(axis=1)
        rows = zip(prompts, completions, first.tolist(), lengths.tolist(), strict=True)
        texts = [[*prompt[start:].tolist(), *completion[:n].tolist()] for prompt, completion, start, n in rows]
        found = np.zeros(completions.shape, np.float32)
        for i, scores in enumerate(self.llm.logprobs(texts)):
            found[i, : lengths[i]] = scores[len(scores) - lengths[i] :]
        return jnp.asarray(found)

    def update_params(self, params: Any, filter_types: Sequence[Any] | None = None) -> None:
        """Serves these from now on: what the LLM was made of, or another tree that its `param_mapping` reads.

        All of them: filter_types is None or (nnx.Param,). Raises UnsupportedError, CheckpointError.
        """
        names = [getattr(kind, "__name__", str(kind)) for kind in filter_types or ()]
        if names not in ([], ["Param"]):
            raise UnsupportedError(f"filter_types={names}: only all parameters are taken, (nnx.Param,) or None; "
                                   "merge LoRA's into them")  # fmt: skip
        self.llm.update_weights(params)

    def pad_id(self) -> int:
        """The tokenizer's padding token, else its end token."""
        return self._pad

    def eos_id(self) -> int:
        return self.llm.model_config.eos_token_ids[0]

    def model(self) -> nnx.Module:
        """The module that steps run, over the parameters of now: an update does not change it.

        Raises UnsupportedError where layers are split over devices: each then has a module of its own share.
        """
        weights = self.llm._runner.weights
        if weights.axis is not None:
            raise UnsupportedError(
                f"the module of a model whose layers are split (tensor_parallel_size="
                f"{self.llm.config.tensor_parallel_size}, expert_parallel_size="
                f"{self.llm.config.expert_parallel_size}): score with get_per_token_logps, or the trainer's own module"
            )
        return weights.module(weights.leaves)


def _seed_number(seed: Any) -> int | None:
    """A number for a number or for jax's keys, of either kind."""
    if seed is None or isinstance(seed, int):
        return seed
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    words = np.asarray(seed).astype(np.uint32).reshape(-1)
    return int(sum(int(word) << 32 * i for i, word in enumerate(words.tolist()))) % 2**63


def _completion_lengths(completions: np.ndarray, mask: Any | None, ends: Sequence[int]) -> np.ndarray:
    """Tokens of each row that count, int [batch]."""
    if mask is None:
        ended = np.isin(completions, list(ends))
        return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, completions.shape[1])
    kept = np.asarray(mask) != 0
    lengths = kept.sum(axis=1)
    if (kept != (np.arange(kept.shape[1]) < lengths[:, None])).any():
        raise ConfigError("completion_mask has gaps: it must be a run from the left in each row")
    return lengths
