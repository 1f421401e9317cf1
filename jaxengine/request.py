"""What a caller asks for and what comes back: sampling parameters and outputs. Plain data, no jax."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, overload

import numpy as np

from jaxengine.errors import RequestError, UnsupportedError

OutputKind = Literal["cumulative", "delta", "final_only"]
FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
Pooling = Literal["last", "mean", "cls"]  # of hidden states: the last token's, the mean of all, the first token's
MAX_LOGIT_BIAS = 512  # entries: each row of a step has room for so many
GREEDY_BELOW = 1e-5  # a temperature under this is 0
INT32_MAX, FLOAT32_MAX = 2**31 - 1, 3.4e38  # what the device holds

# field: smallest, largest, may it be None
_INTEGERS = {
    "n": (1, 16384, False),
    "top_k": (-1, INT32_MAX, False),
    "seed": (-(2**63), 2**64 - 1, True),
    "max_tokens": (0, INT32_MAX, True),
    "min_tokens": (0, INT32_MAX, False),
    "logprobs": (-1, INT32_MAX, True),
    "prompt_logprobs": (-1, INT32_MAX, True),
    "prompt_logprobs_start": (0, INT32_MAX, False),
}
# field: smallest, largest, is the smallest itself out of range
_FLOATS = {
    "temperature": (0.0, FLOAT32_MAX, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (1e-6, 1e6, False),  # in effect "above 0": more would overflow float32 logits
}
_FLAGS = (
    "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, when they end, and what is reported. Names, defaults and meanings as in vLLM.

    Checked here as far as possible without the model, in `validate_for` with it. Raises RequestError naming the field
    and its value; UnsupportedError for `structured_outputs`.
    """

    n: int = 1  # completions of the prompt
    temperature: float = 1.0  # 0 (or below 1e-5): the most probable token, always
    top_p: float = 1.0  # the fewest most probable tokens that hold this probability, ties included
    top_k: int = 0  # that many most probable tokens, ties included; 0 or -1: all
    min_p: float = 0.0  # tokens at least this fraction as probable as the most probable one
    presence_penalty: float = 0.0  # taken once from the logit of each token that was generated
    frequency_penalty: float = 0.0  # taken for each time that it was
    repetition_penalty: float = 1.0  # divides (multiplies, where negative) logits of tokens in prompt or output
    seed: int | None = None  # None or -1: derived by the engine
    stop: Sequence[str] = ()  # a str is one of them; output ends before (see include_stop_str_in_output) any of these
    stop_token_ids: Sequence[int] = ()  # output ends with any of these
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # the model's own end-of-sequence tokens do not end the output
    max_tokens: int | None = 16  # None: as many as max_model_len allows; 0: only the log-probabilities of the prompt
    min_tokens: int = 0  # before this many, no token is drawn that would end the output
    logprobs: int | None = None  # for each output token its own and so many best; -1: the whole vocabulary
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    prompt_logprobs_start: int = 0  # first prompt position they are wanted for; the prefix cache serves those before
    logit_bias: Mapping[int, float] | None = None  # token id -> what is added to its logit; -inf bans it
    allowed_token_ids: Sequence[int] | None = None  # only these are drawn
    bad_words: Sequence[str] = ()  # never completed
    detokenize: bool = True  # False: no text, and no stop strings
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: OutputKind = "cumulative"  # of a stream: all so far, what is new, or nothing until the end
    structured_outputs: Any = None
    timeout: float | None = None  # seconds from arrival, then finish_reason is "timeout"
    pooling: ClassVar[Pooling | None] = None  # see PoolingParams

    def __post_init__(self):
        if self.structured_outputs is not None:
            raise UnsupportedError(
                f"structured_outputs={self.structured_outputs!r} is not built yet; allowed_token_ids and logit_bias "
                "restrict single tokens"
            )
        for name, (low, high, optional) in _INTEGERS.items():
            if not (optional and getattr(self, name) is None):
                self._set(name, _integer(name, getattr(self, name), low, high))
        for name, (smallest, largest, above) in _FLOATS.items():
            self._set(name, _real(name, getattr(self, name), smallest, largest, above))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("stop", "bad_words"):
            self._set(name, _strings(name, getattr(self, name)))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids=[] leaves nothing to draw; None allows every token")
        if self.logit_bias is not None:
            self._set("logit_bias", _logit_bias(self.logit_bias))
        if self.timeout is not None:
            self._set("timeout", _real("timeout", self.timeout, 0.0, math.inf, above=True))
        if self.output_kind not in ("cumulative", "delta", "final_only"):
            raise RequestError(f"output_kind={self.output_kind!r} must be 'cumulative', 'delta' or 'final_only'")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.max_tokens == 0 and (self.prompt_logprobs is None or self.n != 1):
            raise RequestError(
                f"max_tokens=0 draws nothing: it needs prompt_logprobs, and n=1 (given: prompt_logprobs="
                f"{self.prompt_logprobs}, n={self.n})"
            )
        if self.stop and not self.detokenize:
            raise RequestError(f"stop={list(self.stop)!r} needs detokenize=True; stop_token_ids work without")
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise RequestError(f"prompt_logprobs_start={self.prompt_logprobs_start} needs prompt_logprobs")
        # One way to say each thing: the engine need not know the other.
        if self.temperature < GREEDY_BELOW:
            self._set("temperature", 0.0)
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.seed == -1:
            self._set("seed", None)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def validate_for(self, vocab_size: int, max_logprobs: int) -> None:
        """The checks that need the model and the engine. Raises RequestError."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if outside := [token for token in getattr(self, name) or () if token >= vocab_size]:
                raise RequestError(f"{name} holds {outside[0]}, the vocabulary ends at {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > max_logprobs:
                raise RequestError(
                    f"{name}={getattr(self, name)} is more than {max_logprobs=}; make the engine with a larger "
                    "max_logprobs, or ask for -1, the whole vocabulary"
                )

    @property
    def greedy(self) -> bool:
        """Is the most probable token taken always?"""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def edits_logits(self) -> bool:
        """Do penalties, biases or a mask of allowed tokens change the logits?"""
        restricted = self.logit_bias or self.allowed_token_ids is not None or self.bad_words or self.min_tokens
        return self.has_penalties or bool(restricted)

    @property
    def needs_everything(self) -> bool:
        """Is more needed than a token drawn from the model's own logits?"""
        return self.edits_logits or self.logprobs is not None


@dataclass(frozen=True, kw_only=True)
class PoolingParams(SamplingParams):
    """Asks for the hidden states of a prompt, but for those of its last token, which is not computed. See embedding."""

    pooling: Pooling = "last"  # type: ignore[misc]


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: the `beam_width` best completions by summed log-probability / length ** length_penalty.

    Raises RequestError naming the field and its value.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # of the distribution whose log-probabilities are summed; 0: the model's own, as 1
    length_penalty: float = 1.0  # above 0 favours long completions, below 0 short ones

    def __post_init__(self):
        for name in ("beam_width", "max_tokens"):
            object.__setattr__(self, name, _integer(name, getattr(self, name), 1, INT32_MAX))
        object.__setattr__(self, "temperature", _real("temperature", self.temperature, 0.0, FLOAT32_MAX))
        penalty = _real("length_penalty", self.length_penalty, -FLOAT32_MAX, FLOAT32_MAX)
        object.__setattr__(self, "length_penalty", penalty)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r} must be True or False")


def _integer(name: str, value: Any, smallest: int, largest: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not smallest <= int(value) <= largest:
        limits = f"from {smallest} to {largest}" if largest != INT32_MAX else f"of {smallest} or more"
        raise RequestError(f"{name}={value!r} must be an integer {limits}")
    return int(value)


def _real(name: str, value: Any, smallest: float, largest: float, above: bool = False) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    # NaN fails every comparison; infinity is never meant.
    if not (number and smallest <= value <= largest and not (above and value == smallest) and value != math.inf):
        low = f"above {smallest:g}" if above else f"{smallest:g} or more"
        limits = f" and at most {largest:g}" if largest < FLOAT32_MAX else " and finite"
        raise RequestError(f"{name}={value!r} must be a number, {low}{limits}")
    return float(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    if any(not isinstance(string, str) or not string for string in strings):
        raise RequestError(f"{name}={value!r} must be a string or a list of strings, none of them empty")
    return strings


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not hasattr(ids, "__iter__"):
        raise RequestError(f"{name}={ids!r} must be a list of token ids")
    return tuple(_integer(f"{name}[{i}]", token, 0, INT32_MAX) for i, token in enumerate(ids))


def _logit_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias={bias!r} must map token ids to numbers")
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(bias)} entries, at most {MAX_LOGIT_BIAS} are served")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() else key  # JSON has no integer keys
        token = _integer("logit_bias token", token, 0, INT32_MAX)
        if token in checked:
            raise RequestError(f"logit_bias names token {token} twice")
        banned = isinstance(value, Real) and value == -math.inf
        checked[token] = -math.inf if banned else _real(f"logit_bias[{token}]", value, -FLOAT32_MAX, FLOAT32_MAX)
    return checked


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int | None  # 1: no token was more probable
    decoded_token: str | None = None


# Log-probability of a position's own token, its rank; ids [K] and log-probabilities [K] of the best, best first.
LogprobRow = tuple[float, int, Any, Any]


class Logprobs(Sequence[dict[int, Logprob] | None]):
    """Log-probabilities of n positions: a list of `{token_id: Logprob}`, and arrays.

    `logprobs[i]` holds the position's own token first, then the K best; the dict is made when it is asked for. Arrays,
    without any dict: `token_ids` int64 [n], `logprobs` float32 [n] and `ranks` int64 [n] of the positions' own tokens,
    `top_token_ids` int64 [n, K] and `top_logprobs` float32 [n, K] of the best.

    The first `skipped` entries of the list are None (a prompt's first token has no log-probability) and are not in the
    arrays. `rows` may go on growing: what is appended later does not show.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        rows: Sequence[LogprobRow],
        *,
        skipped: int = 0,
        decode: Callable[[int], str] | None = None,
    ):
        self._token_ids, self._rows, self._count = token_ids, rows, len(rows)
        self.skipped, self._decode = skipped, decode
        if len(token_ids) < len(rows):
            raise ValueError(f"{len(rows)} rows for {len(token_ids)} tokens")

    def __len__(self) -> int:
        return self.skipped + self._count

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[int, Logprob] | None]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        position = range(len(self))[index] - self.skipped
        if position < 0:
            return None
        logprob, rank, top_ids, top_logprobs = self._rows[position]
        found = {int(self._token_ids[position]): (float(logprob), int(rank))}
        top = np.asarray(top_logprobs, np.float32)
        ranks = np.searchsorted(-top, -top) + 1  # equals share the best rank, as `rank` has it
        for token, value, place in zip(np.asarray(top_ids).tolist(), top.tolist(), ranks.tolist()):
            found.setdefault(token, (value, place))
        decode = self._decode
        return {
            token: Logprob(value, place, None if decode is None else decode(token))
            for token, (value, place) in found.items()
        }

    def __repr__(self) -> str:
        return f"Logprobs({len(self)} positions)"

    def _column(self, index: int, dtype: type) -> np.ndarray:
        return np.array([row[index] for row in self._rows[: self._count]], dtype)

    @cached_property
    def token_ids(self) -> np.ndarray:
        return np.array(self._token_ids[: self._count], np.int64)

    @cached_property
    def logprobs(self) -> np.ndarray:
        return self._column(0, np.float32)

    @cached_property
    def ranks(self) -> np.ndarray:
        return self._column(1, np.int64)

    @cached_property
    def top_token_ids(self) -> np.ndarray:
        return self._column(2, np.int64).reshape(self._count, -1 if self._count else 0)

    @cached_property
    def top_logprobs(self) -> np.ndarray:
        return self._column(3, np.float32).reshape(self._count, -1 if self._count else 0)


@dataclass(frozen=True)
class RequestMetrics:
    """Moments of a request's life, in seconds since the epoch; None: it has not come to that."""

    arrival_time: float
    queued_time: float | None = None
    scheduled_time: float | None = None  # the first time
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_output_tokens: int = 0  # of all completions

    @property
    def time_in_queue(self) -> float | None:
        return _since(self.arrival_time, self.scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        return _since(self.arrival_time, self.first_token_time)

    @property
    def e2e_latency(self) -> float | None:
        """From arrival to the last token so far."""
        return _since(self.arrival_time, self.last_token_time)

    @property
    def tokens_per_sec(self) -> float | None:
        """Output tokens for each second since the request was first scheduled."""
        seconds = _since(self.scheduled_time, self.last_token_time)
        return self.num_output_tokens / seconds if seconds else None

    def get(self, name: str, default: Any = None) -> Any:
        """The metric of that name; `default` when there is none, or not yet."""
        value = None if name.startswith("_") or name == "get" else getattr(self, name, None)
        return default if value is None else value


def _since(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's n completions, as far as `output_kind` reports it."""

    index: int
    text: str
    token_ids: Sequence[int]  # the end-of-sequence token included
    cumulative_logprob: float | None = None  # None unless logprobs are asked for
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None  # None: it goes on
    stop_reason: int | str | None = None  # the stop string or token that ended it; None: the model's own end
    weight_version: int = 0  # of the weights that made its last token
    # (i, version) for each span of tokens that one version made, i its first token's place among `token_ids`.
    weight_versions: Sequence[tuple[int, int]] = ()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class WeightUpdate:
    """What update_weights did: the version that serves now, and what requests with output did that were in flight."""

    version: int
    restarted: tuple[str, ...] = ()  # request ids: their output was dropped and is made again
    continued: tuple[str, ...] = ()  # they keep it: further tokens are the new version's


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and what became of it."""

    request_id: str
    prompt: str | None  # None: given as token ids
    prompt_token_ids: Sequence[int]
    prompt_logprobs: Logprobs | None
    outputs: Sequence[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    hidden_state: np.ndarray | None = None  # float32 [hidden_size], what PoolingParams asked for
    error: Exception | None = field(default=None, compare=False)  # why finish_reason is "error"


class RequestOutputs(list[RequestOutput]):
    """A list of outputs that pandas understands."""

    def to_pandas(self) -> Any:
        """A DataFrame with one row for each completion. Raises ImportError that says what to install."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        timings = ("time_in_queue", "time_to_first_token", "e2e_latency", "tokens_per_sec")
        rows = [
            {
                "request_id": output.request_id,
                "prompt": output.prompt,
                "index": completion.index,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "cumulative_logprob": completion.cumulative_logprob,
                "num_prompt_tokens": len(output.prompt_token_ids),
                "num_cached_tokens": output.num_cached_tokens,
                "num_output_tokens": len(completion.token_ids),
                "token_ids": list(completion.token_ids),
                "weight_version": completion.weight_version,
                "error": None if output.error is None else str(output.error),
                **{name: getattr(output.metrics, name) for name in timings},
            }
            for output in self
            for completion in output.outputs
        ]
        return pandas.DataFrame(rows)
