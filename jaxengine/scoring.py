"""Log-likelihoods: texts become pairs of tokens, pairs become requests, outputs become sums. Knows no engine.

A request's prompt is context and continuation. The engine is asked for the log-probabilities of the continuation's
tokens only, and requests with one context share its pages, so that it is computed once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxengine.errors import RequestError
from jaxengine.request import Logprobs, SamplingParams

Encode = Callable[[str], list[int]]  # without special tokens


class Pair(NamedTuple):
    """Token ids."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class LogLikelihood:
    """Of a continuation under its context, natural logarithms."""

    logprob: float  # the sum
    is_greedy: bool  # is each token the most probable in its place (the lowest id among equals)?
    token_ids: np.ndarray  # int64 [tokens of the continuation]
    token_logprobs: np.ndarray  # float32, likewise

    @classmethod
    def of(cls, logprobs: Logprobs) -> "LogLikelihood":
        """From a prompt's log-probabilities with at least the best token of each place."""
        tokens, values = logprobs.token_ids, logprobs.logprobs
        greedy = bool((logprobs.top_token_ids[:, 0] == tokens).all())
        return cls(float(values.sum(dtype=np.float64)), greedy, tokens, values)

    @classmethod
    def join(cls, parts: Sequence["LogLikelihood"]) -> "LogLikelihood":
        """Of one text that was scored in parts."""
        tokens, values = (np.concatenate(arrays) for arrays in zip(*((p.token_ids, p.token_logprobs) for p in parts)))
        return cls(float(values.sum(dtype=np.float64)), all(part.is_greedy for part in parts), tokens, values)


def encode_pair(encode: Encode, context: str, continuation: str) -> Pair:
    """As lm-evaluation-harness cuts: spaces at the context's end belong to the continuation, whose tokens are those
    that the whole text has behind the context's own."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    own = encode(context) if context else []
    return Pair(own, encode(context + continuation)[len(own) :])


def truncate(pair: Pair, longest: int) -> Pair:
    """At most `longest` tokens, by leaving out the beginning of the context; one token of it stays."""
    return Pair(pair.context[max(0, len(pair.context) + len(pair.continuation) - longest) :], pair.continuation)


def rolling_pairs(tokens: Sequence[int], prefix: int, longest: int) -> Iterator[Pair]:
    """Pairs of at most `longest` tokens whose continuations are `tokens`, each once, each with all the context that
    fits (lm-evaluation-harness: rolling windows with a context of one token). The first is given `prefix` alone."""
    size = longest - 1  # tokens that a window predicts
    yield Pair([prefix], list(tokens[:size]))
    for start in range(size, len(tokens), size):
        end = min(start + size, len(tokens))
        yield Pair(list(tokens[max(0, end - longest) : start]), list(tokens[start:end]))


class Scorer:
    """Scores through `generate(prompts, params, use_tqdm=)`, which answers in order.

    `encode`: a text's token ids without special tokens. `prefix`: the token that stands for an empty context.
    """

    def __init__(self, generate: Callable[..., Any], encode: Encode, prefix: int | None, max_model_len: int):
        self._generate, self._encode, self._prefix = generate, encode, prefix
        self._longest = max_model_len - 1  # the engine draws a token, which no one wants

    def pairs(self, pairs: Iterable[tuple[Any, Any]], use_tqdm: Any) -> list[LogLikelihood]:
        """See LLM.loglikelihood."""
        found = [truncate(self._pair(i, *pair), self._longest) for i, pair in enumerate(pairs)]
        for i, pair in enumerate(found):
            if not 0 < len(pair.continuation) < self._longest:
                raise RequestError(
                    f"pair {i}: a continuation of {len(pair.continuation)} tokens, where 1 to {self._longest - 1} can "
                    "be scored; the engine's max_model_len decides"
                )
        return self._score(found, use_tqdm)

    def rolling(self, texts: Iterable[Any], use_tqdm: Any) -> list[LogLikelihood]:
        """See LLM.loglikelihood_rolling."""
        windows = []
        for i, text in enumerate(texts):
            tokens = self._encode(text) if isinstance(text, str) else list(text)
            if not tokens:
                raise RequestError(f"text {i} has no tokens")
            windows.append(list(rolling_pairs(tokens, self._prefixed([])[0], self._longest)))
        scored = iter(self._score([pair for pairs in windows for pair in pairs], use_tqdm))
        return [LogLikelihood.join([next(scored) for _ in pairs]) for pairs in windows]

    def _pair(self, i: int, context: Any, continuation: Any) -> Pair:
        if isinstance(context, str) != isinstance(continuation, str):
            raise RequestError(f"pair {i}: context and continuation must be two texts, or two lists of token ids")
        if isinstance(context, str):
            context, continuation = encode_pair(self._encode, context, continuation)
        return Pair(self._prefixed(list(context)), list(continuation))

    def _prefixed(self, context: list[int]) -> list[int]:
        if context:
            return context
        if self._prefix is None:
            raise RequestError(
                "an empty context needs a token that stands for it, and the model has neither a beginning-of-sequence "
                "nor an end-of-sequence one: give a context of token ids"
            )
        return [self._prefix]

    def _score(self, pairs: Sequence[Pair], use_tqdm: Any) -> list[LogLikelihood]:
        """Requests go by context, the longest first: those that share one stand together, and steps fill evenly."""
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i].context), pairs[i].context))
        params = [
            SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=1,
                           prompt_logprobs_start=len(pairs[i].context))
            for i in order
        ]  # fmt: skip
        prompts = [[*pairs[i].context, *pairs[i].continuation] for i in order]
        outputs = self._generate(prompts, params, use_tqdm=use_tqdm) if prompts else []
        found = {}
        for i, output in zip(order, outputs):
            if output.error is not None:
                raise output.error
            found[i] = LogLikelihood.of(output.prompt_logprobs)
        return [found[i] for i in range(len(pairs))]
