"""Prompts become the engine's requests, and the engine's requests become outputs."""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from numbers import Integral
from typing import Any

import numpy as np

from jaxengine.engine.sequence import Request
from jaxengine.engine.sequence import Sequence as EngineSequence
from jaxengine.errors import EngineError, RequestError
from jaxengine.request import CompletionOutput, Logprobs, RequestMetrics, RequestOutput, SamplingParams
from jaxengine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class Frontend:
    """Knows the model's limits and its tokenizer; makes no step."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        max_logprobs: int,
        eos_token_ids: Sequence[int],
        seed: int,
    ):
        self.tokenizer, self.vocab_size, self.max_model_len = tokenizer, vocab_size, max_model_len
        self.max_logprobs, self.eos_token_ids, self.seed = max_logprobs, tuple(eos_token_ids), seed
        self._decode = None if tokenizer is None else tokenizer.token_text
        self._ends, self._no_ends = frozenset(eos_token_ids), frozenset[int]()
        self._arrivals = itertools.count()

    def token_ids(self, prompts: Sequence[Any]) -> list[Any]:
        """The prompts with every text encoded, all at once: {"prompt", "prompt_token_ids", "cache_salt"} each."""
        parsed = [_parse(prompt) for prompt in prompts]
        texts = [p["prompt"] for p in parsed if p["prompt_token_ids"] is None]
        try:
            encoded = iter(self._tokenizer_for("a text prompt").encode_batch(texts) if texts else ())
        except TypeError as error:  # the tokenizer's word for half of a surrogate pair
            raise RequestError(f"a prompt among {texts!r:.200} is not valid Unicode") from error
        return [p if p["prompt_token_ids"] is not None else p | {"prompt_token_ids": next(encoded)} for p in parsed]

    def request(
        self, prompt: Mapping[str, Any], params: SamplingParams, priority: int = 0, request_id: str | None = None
    ) -> Request:
        """The request for a prompt from `token_ids`. Raises RequestError that names what cannot be served."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params={params!r} must be SamplingParams")
        if not isinstance(priority, Integral):
            raise RequestError(f"{priority=} must be an integer; smaller goes first")
        ids = self._checked_ids(prompt["prompt_token_ids"], prompt["prompt"], params.max_tokens != 0)
        params.validate_for(self.vocab_size, self.max_logprobs)
        room = max(0, self.max_model_len - len(ids))
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens={params.min_tokens} and a prompt of {len(ids)} tokens exceed "
                f"max_model_len={self.max_model_len}"
            )
        if params.prompt_logprobs_start >= len(ids):
            raise RequestError(
                f"prompt_logprobs_start={params.prompt_logprobs_start} is past the prompt's {len(ids)} tokens"
            )
        if params.detokenize or params.bad_words:
            tokenizer = self._tokenizer_for("text (detokenize=True)" if params.detokenize else "bad_words")
            if params.stop and tokenizer.clean_up_spaces:
                raise RequestError(
                    f"stop={list(params.stop)!r}: this tokenizer changes spaces after decoding, so that text is known "
                    "at the end only; use stop_token_ids"
                )
        number = next(self._arrivals)
        ends = self._no_ends if params.ignore_eos else self._ends
        bad_words = self._bad_word_ids(params.bad_words)
        now = time.time()
        return Request(
            request_id=f"request-{number}" if request_id is None else request_id,
            prompt=prompt["prompt"],
            prompt_token_ids=ids,
            params=params,
            eos_token_ids=self.eos_token_ids,
            priority=int(priority),
            seed=self._derived_seed(number) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_token_ids=ends.union(params.stop_token_ids) if params.stop_token_ids else ends,
            arrival_time=now,
            deadline=None if params.timeout is None else time.monotonic() + params.timeout,
            cache_salt=(prompt["cache_salt"] or "").encode(),
            bad_word_ids=bad_words,
            needs_everything=params.needs_everything,
            edits_logits=params.edits_logits,
            needs_last_token=any(len(word) > 1 for word in bad_words),
        )

    def _checked_ids(self, ids: Any, text: str | None, draws: bool) -> list[int]:
        ids = np.asarray(ids).tolist() if hasattr(ids, "dtype") else list(ids)
        if not ids:
            raise RequestError(f"prompt {text!r} has no tokens" if text is not None else "prompt_token_ids=[] is empty")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise RequestError(f"token id {bad} is out of range: the vocabulary has {self.vocab_size} tokens")
        # Where nothing is drawn, the last token is a target only, and not computed.
        if len(ids) + (1 if draws else -1) > self.max_model_len:
            raise RequestError(
                f"a prompt of {len(ids)} tokens {'leaves no room for output' if draws else 'does not fit'} within "
                f"max_model_len={self.max_model_len}; shorten it, or make the engine with a larger max_model_len"
            )
        if not draws and len(ids) == 1:
            raise RequestError("max_tokens=0 and a prompt of one token: there is no log-probability to compute")
        return ids

    def _bad_word_ids(self, words: Sequence[str]) -> Sequence[list[int]]:
        """Each word at the beginning of a text and behind a space."""
        if not words:
            return ()
        tokenizer = self._tokenizer_for("bad_words")
        found = [
            tuple(tokenizer.encode(prefix + (word.lstrip() or word), add_special_tokens=False))
            for word in words
            for prefix in ("", " ")
        ]
        return [list(word) for word in dict.fromkeys(found) if word]

    def _derived_seed(self, number: int) -> int:
        return int.from_bytes(blake2b(f"{self.seed} {number}".encode(), digest_size=8).digest(), "little")

    def _tokenizer_for(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{what} needs a tokenizer, and the model has none: pass tokenizer=, or prompt_token_ids and "
                "detokenize=False"
            )
        return self.tokenizer

    def refused(self, prompt: Any, error: RequestError) -> RequestOutput:
        """The output for a prompt that cannot be served."""
        failed = CompletionOutput(0, "", [], finish_reason="error")
        text, metrics = prompt if isinstance(prompt, str) else None, RequestMetrics(time.time())
        return RequestOutput(f"request-{next(self._arrivals)}", text, [], None, [failed], True, metrics, error=error)

    def reporter(self, request: Request, tell: Callable[[RequestOutput], None], loop: Any) -> "Reporter":
        """`loop` has `abort`."""
        return Reporter(request, self._decode, tell, loop)


class Reporter:
    """Tells the outputs of one request; remembers how much of it was told, for deltas.

    One object a request, and nothing in it that only some need: of long lists of requests Python's collector, which
    stops all threads, looks at each object several times.
    """

    __slots__ = ("_decode", "_delta", "_done", "_failed", "_loop", "_request", "_tell", "_told")

    def __init__(self, request: Request, decode: Any, tell: Callable[[RequestOutput], None], loop: Any):
        self._request, self._decode, self._tell, self._loop = request, decode, tell, loop
        self._delta, self._failed = request.params.output_kind == "delta", False
        if self._delta:
            self._told = [(0, 0)] * request.params.n  # output tokens, characters
            self._done = [False] * request.params.n

    def __call__(self, _: Request) -> None:
        if self._failed:  # the end of what is ended below
            return
        try:
            output = self.output()
        except Exception as error:  # a bug of ours: it ends this request and no other
            logger.exception("request %s has an output that cannot be made", self._request.request_id)
            self._failed = True
            self._loop.abort([self._request.request_id])
            output = self._ended(EngineError(f"no output can be made: {type(error).__name__}: {error}"))
        self._tell(output)

    def output(self) -> RequestOutput:
        """What the request's output_kind shows of it now."""
        request = self._request
        first = request.sequences[0]
        prompt_logprobs = hidden_state = None
        if request.params.pooling is not None:
            hidden_state = None if first.pooled is None else (first.pooled / first.num_pooled).astype(np.float32)
        elif request.params.prompt_logprobs is not None:
            skipped = max(1, request.params.prompt_logprobs_start)
            ids = request.prompt_token_ids[skipped:]
            prompt_logprobs = Logprobs(ids, first.prompt_logprobs, skipped=skipped, decode=self._decode)
        shown = [self._completion(i, s) for i, s in enumerate(request.sequences) if not (self._delta and self._done[i])]
        if self._delta:
            self._done = [sequence.finished for sequence in request.sequences]
        metrics = RequestMetrics(
            request.arrival_time,
            request.queued_time,
            request.scheduled_time,
            request.first_token_time,
            request.last_token_time,
            sum(sequence.num_output for sequence in request.sequences),
        )
        return RequestOutput(
            request.request_id, request.prompt, request.prompt_token_ids, prompt_logprobs, shown, request.finished,
            metrics, first.num_cached, hidden_state, request.error,
        )  # fmt: skip

    def _ended(self, error: EngineError) -> RequestOutput:
        request, shown = self._request, [CompletionOutput(0, "", [], finish_reason="error")]
        metrics, ids = RequestMetrics(request.arrival_time), request.prompt_token_ids
        return RequestOutput(request.request_id, request.prompt, ids, None, shown, True, metrics, error=error)

    def _completion(self, i: int, sequence: EngineSequence) -> CompletionOutput:
        tokens = characters = 0
        if self._delta:
            tokens, characters = self._told[i]
            self._told[i] = sequence.num_output, len(sequence.text)
        asked = sequence.params.logprobs is not None
        ids = sequence.output(tokens)
        rows = sequence.logprobs[tokens:] if tokens else sequence.logprobs
        versions = _spans(sequence.weight_versions, tokens, sequence.num_output)
        return CompletionOutput(
            index=sequence.index,
            text=sequence.text[characters:],
            token_ids=ids,
            cumulative_logprob=sequence.cumulative_logprob if asked else None,
            logprobs=Logprobs(ids, rows, decode=self._decode) if asked else None,
            finish_reason=sequence.finish_reason,  # type: ignore[arg-type]
            stop_reason=sequence.stop_reason,
            weight_version=versions[-1][1] if versions else 0,
            weight_versions=versions,
        )


def _spans(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Those that tokens `start` to `end` lie in, counted from `start`; without tokens the last one before them."""
    past = [(0, version) for first, version in spans if first <= start][-1:]
    return (*past, *((first - start, version) for first, version in spans if start < first < end))


def _parse(prompt: Any) -> dict[str, Any]:
    """A prompt of any accepted kind. Raises RequestError."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif not isinstance(prompt, Mapping) and is_token_ids(prompt):
        return {"prompt": None, "prompt_token_ids": prompt, "cache_salt": None}
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f"a prompt is a text, a list of token ids or a dict, not {type(prompt).__name__}: {prompt!r}"
        )
    if unknown := set(prompt) - PROMPT_KEYS:
        raise RequestError(f"prompt has {sorted(unknown)}, which is not among {sorted(PROMPT_KEYS)}")
    text, ids, salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
    if text is None and ids is None:
        raise RequestError(f"a prompt needs 'prompt' or 'prompt_token_ids', not only {sorted(prompt)}")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt={text!r} must be a text")
    if ids is not None and not is_token_ids(ids):
        raise RequestError(f"prompt_token_ids={ids!r} must be a list of integers")
    if salt is not None and not isinstance(salt, str):
        raise RequestError(f"cache_salt={salt!r} must be a text")
    return {"prompt": text, "prompt_token_ids": ids, "cache_salt": salt}


def is_token_ids(value: Any) -> bool:
    """A sequence of integers (a NumPy array of them too)?"""
    if hasattr(value, "dtype"):
        return getattr(value, "ndim", 0) == 1 and value.dtype.kind in "iu"
    return isinstance(value, Sequence) and all(
        issubclass(kind, int) and kind is not bool for kind in set(map(type, value))
    )
