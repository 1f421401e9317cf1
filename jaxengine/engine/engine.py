"""The loop: requests in, steps on the device, tokens out. Knows no text: a sink turns ids into it."""

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxengine.engine.batch import Buckets, build_batch
from jaxengine.engine.scheduler import Row, Scheduler
from jaxengine.engine.sequence import Request, Sequence
from jaxengine.errors import EngineError, RequestError
from jaxengine.step import StepInputs, StepOutputs


class TextSink(Protocol):
    """Turns token ids into text and finds stop strings, for all rows of a step at once."""

    def open(self, key: Any, prompt_ids: Seq[int], params: Any) -> None: ...
    def update(self, items: Seq[tuple[Any, Seq[int]]]) -> Seq[Any]: ...  # text_delta, stop, keep for each
    def close(self, key: Any) -> str: ...  # text that was held back


class Flight(Protocol):
    def result(self) -> StepOutputs: ...


class Runner(Protocol):
    def submit(self, inputs: StepInputs) -> Flight: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class _Step:
    """A step on its way: its rows in output order."""

    rows: list[Row]
    flight: Flight
    vocab_spans: Seq[tuple[int, int]]  # tokens whose successors' whole distributions come back


class _DeviceFailure(Exception):
    """The device failed a step with these rows."""

    def __init__(self, rows: list[Row]):
        self.rows = rows


class Engine:
    """Schedules, submits, commits. Called from one thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        buckets: Buckets,
        sink: TextSink,
        *,
        vocab_size: int,
        steps_in_flight: int = 1,
        is_device_error: Callable[[Exception], bool] = lambda error: isinstance(error, RuntimeError),
    ):
        self.scheduler, self.runner, self.buckets, self.sink = scheduler, runner, buckets, sink
        self.vocab_size, self.steps_in_flight, self.is_device_error = vocab_size, steps_in_flight, is_device_error
        self._steps: deque[_Step] = deque()
        self._requests: dict[str, Request] = {}
        self._deadlines: list[tuple[float, int, Request]] = []  # heap
        self._news: dict[Request, None] = {}  # to be returned by the next step
        self._torn = False  # true while a step changes the books: an exception in between leaves them unusable
        self._committing: list[Row] = []
        self._dead: Exception | None = None
        self.prompt_tokens = self.generation_tokens = 0
        self.ended: Counter[str] = Counter()  # requests by finish reason, of n completions the first one's

    @property
    def has_work(self) -> bool:
        return bool(self._requests) or bool(self._steps) or self.scheduler.has_work

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that could never run. Reads nothing that steps change: for any thread."""
        if too_small := self.scheduler.too_small(request):
            needed, pages = too_small
            raise RequestError(
                f"a request of {len(request.prompt_token_ids)} prompt and up to {request.max_tokens} output tokens "
                f"needs {needed} pages of KV cache, there are {pages}; lower max_tokens or raise kv_cache_memory_bytes"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError for one that could never run, or an id that is in use."""
        self._mend()
        if self._dead is not None:
            raise EngineError(f"the device is lost: {self._dead}") from self._dead
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is in use")
        self.check(request)
        request.queued_time = time.time()
        request.sequences = [Sequence(request, i, list(request.prompt_token_ids)) for i in range(request.params.n)]
        for sequence in request.sequences:
            self.sink.open(sequence, request.prompt_token_ids, request.params)
        self._requests[request.request_id] = request
        self.prompt_tokens += len(request.prompt_token_ids)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, id(request), request))
        self.scheduler.add(request)

    def step(self) -> list[Request]:
        """Starts the next step and commits the oldest one that is due; returns the requests with something new.

        What is not the device's failure is raised; the engine may go on being used.
        """
        self._mend()
        self._expire()
        try:
            started = self._start()
            if self._steps and (len(self._steps) > self.steps_in_flight or not started):
                self._commit(self._steps[0])
        except _DeviceFailure as failure:
            self._recover(failure)
        news, self._news = self._news, {}
        return list(news)

    def _start(self) -> bool:
        self._torn = True
        rows = self.scheduler.schedule()
        if rows:
            now = time.time()
            for row in rows:
                if row.sequence.fresh_slot:
                    row.sequence.request.scheduled_time = row.sequence.request.scheduled_time or now
            rows, inputs = build_batch(rows, self.buckets, self.vocab_size)
            with self._device(rows):
                flight = self.runner.submit(inputs)
            self._steps.append(_Step(rows, flight, inputs.prompt_vocab_spans))
        self._torn = False
        return bool(rows)

    def _commit(self, step: _Step) -> None:
        """The only place that writes back what the device computed."""
        with self._device(step.rows):
            outputs = step.flight.result()
        self._torn, self._committing = True, step.rows
        self._steps.popleft()
        whole = {start: part for (start, _), part in zip(step.vocab_spans, outputs.prompt_vocab, strict=True)}
        drawn: list[tuple[Sequence, list[int]]] = []
        tokens, count = outputs.tokens.tolist(), outputs.count.tolist()
        start = sampled = 0
        now = time.time()
        for row in step.rows:
            sequence = row.sequence
            if sequence.finish_reason is None:
                if outputs.prompt is not None:
                    _keep_prompt_logprobs(row, start, outputs.prompt, whole.get(start))
                if row.samples:
                    ids = tokens[sampled][: count[sampled]]
                    _accept(sequence, ids, outputs, sampled, now)
                    drawn.append((sequence, ids))
            start += row.count
            sampled += row.samples
            self.scheduler.land(row)
        self.generation_tokens += sum(len(ids) for _, ids in drawn)
        self._apply_stops(drawn)
        for sequence, _ in drawn:
            if sequence.finish_reason is not None:
                self._report(sequence.request)
            elif sequence.request.watched:
                self._news[sequence.request] = None
        self._torn, self._committing = False, []

    def _apply_stops(self, drawn: list[tuple[Sequence, list[int]]]) -> None:
        """Ends the sequences that drew a stop token or a stop string, or that have all their tokens."""
        stops = [self._stop_token(sequence) for sequence, _ in drawn]
        shown = [
            (sequence, ids if stop is None or sequence.params.include_stop_str_in_output else ids[:-1])
            for (sequence, ids), stop in zip(drawn, stops, strict=True)
        ]
        for (sequence, ids), stop, update in zip(drawn, stops, self.sink.update(shown), strict=True):
            sequence.text += update.text_delta
            if update.stop is not None:
                del sequence.tokens[len(sequence.tokens) - len(ids) + update.keep :]
                self._finish(sequence, "stop", update.stop)
            elif stop is not None:
                self._finish(sequence, "stop", None if stop in sequence.request.eos_token_ids else stop)
            elif sequence.num_output >= sequence.request.max_tokens:
                self._finish(sequence, "length")

    def _stop_token(self, sequence: Sequence) -> int | None:
        last, request = sequence.tokens[-1], sequence.request
        return last if last in request.stop_token_ids and sequence.num_output >= request.params.min_tokens else None

    def _finish(self, sequence: Sequence, reason: str, stop: int | str | None = None) -> None:
        if not sequence.finished:
            sequence.text += self.sink.close(sequence)
            self.scheduler.finish(sequence, reason, stop)

    def _report(self, request: Request) -> None:
        if request.finished or request.watched:
            self._news[request] = None
        if request.finished and self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
            self.ended[str(request.sequences[0].finish_reason)] += 1

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        request.error = error
        for sequence in request.sequences:
            self._finish(sequence, reason)
        self._report(request)

    # -- ends that the caller asks for

    def abort(self, request_id: str, reason: str = "abort") -> Request | None:
        """Ends a request now, and no step returns it any more; None when there is no such request (any more)."""
        self._mend()
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, reason)
            del self._news[request]
        return request

    def _expire(self) -> None:
        while self._deadlines and (self._deadlines[0][0] <= time.monotonic() or self._deadlines[0][2].finished):
            request = heapq.heappop(self._deadlines)[2]
            if not request.finished:
                self._end(request, "timeout")

    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    def metrics(self) -> dict[str, Any]:
        """The present state and counts since the start, by the names that Prometheus shows."""
        scheduler = self.scheduler
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": scheduler.num_waiting,
            "kv_cache_usage_perc": max(pool.usage for pool in scheduler.pools),
            "weight_version": scheduler.weight_version,
            "prefix_cache_queries": scheduler.prefix_queries,
            "prefix_cache_hits": scheduler.prefix_hits,
            "num_preemptions": scheduler.num_preemptions,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "request_success": dict(self.ended),
        }

    # -- failures

    @contextmanager
    def _device(self, rows: list[Row]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.is_device_error(error):
                raise _DeviceFailure(rows) from error
            raise

    def _recover(self, failure: _DeviceFailure) -> None:
        """The device failed a step and its donated arrays are dead: a new cache, and every request starts again.

        The requests of that step are tried once more; when they fail again they end with the error.
        """
        for sequence in dict.fromkeys(row.sequence for row in failure.rows):
            sequence.failures += 1
        self._restart()
        for request in dict.fromkeys(row.sequence.request for row in failure.rows):
            if not request.finished and any(s.failures > 1 for s in request.sequences):
                error = EngineError(f"the device failed twice on request {request.request_id!r}: {failure.__cause__}")
                error.__cause__ = failure.__cause__
                self._end(request, "error", error)

    def _restart(self) -> None:
        """Every request waits again, and the device is empty. When it will not have that, all requests end."""
        self._steps.clear()
        unfinished = [s for request in self._requests.values() for s in request.sequences if not s.finished]
        self.scheduler.restart(unfinished)
        try:
            self.runner.reset()
        except Exception as error:
            self._dead = error
            for request in list(self._requests.values()):
                lost = EngineError(f"the device is lost, request {request.request_id!r} with it: {error}")
                lost.__cause__ = error
                self._end(request, "error", lost)
        self._torn, self._committing = False, []

    def _mend(self) -> None:
        """Puts in order what an exception in the middle of a step left behind; a half-committed step's requests end."""
        if not self._torn:
            return
        torn = dict.fromkeys(row.sequence.request for row in self._committing)
        self._restart()
        for request in torn:
            if not request.finished:
                self._end(
                    request, "error", EngineError(f"request {request.request_id!r} was interrupted in its commit")
                )
            self._report(request)

    def check_integrity(self) -> None:
        """Raises AssertionError when a page, a slot or a request is lost."""
        self.scheduler.check_integrity()
        assert all(not request.finished for request in self._requests.values())


def _accept(sequence: Sequence, ids: list[int], outputs: StepOutputs, i: int, now: float) -> None:
    sequence.tokens += ids
    sequence.in_flight -= 1
    request = sequence.request
    if request.first_token_time is None:
        request.first_token_time = now
    request.last_token_time = now
    wanted = request.params.logprobs
    if wanted is not None:
        assert outputs.logprob is not None and outputs.rank is not None
        assert outputs.top_ids is not None and outputs.top_logprobs is not None
        logprob = float(outputs.logprob[i])
        sequence.cumulative_logprob += logprob
        if wanted == -1:
            assert outputs.vocab_logprobs is not None
            top = _ranked(outputs.vocab_logprobs[i])
        else:  # copies: a view would keep the whole step's
            top = outputs.top_ids[i, :wanted].copy(), outputs.top_logprobs[i, :wanted].copy()
        sequence.logprobs.append((logprob, int(outputs.rank[i]), *top))


def _keep_prompt_logprobs(row: Row, start: int, prompt: tuple[np.ndarray, ...], whole: np.ndarray | None) -> None:
    """The row's hidden state at position p gives the log-probability of the prompt's token at p + 1."""
    sequence = row.sequence
    first, wanted = sequence.next_prompt_logprob, sequence.params.prompt_logprobs
    count = 0 if first is None else min(row.start + row.count + 1, sequence.num_prompt) - first
    if first is None or count <= 0:
        return
    offset = first - 1 - row.start
    logprob, rank, top_ids, top_logprobs = (part[start + offset : start + offset + count] for part in prompt)
    if whole is None:
        best = zip(top_ids[:, :wanted].copy(), top_logprobs[:, :wanted].copy(), strict=True)
    else:
        # From the same program as the rest of the vocabulary: another one may round otherwise.
        rows = whole[offset : offset + count]
        best = map(_ranked, rows)  # type: ignore[assignment]
        logprob = rows[np.arange(count), sequence.tokens[first : first + count]]
        rank = 1 + (rows > logprob[:, None]).sum(axis=1)
    for own, place, (ids, values) in zip(logprob.tolist(), rank.tolist(), best, strict=True):
        sequence.prompt_logprobs.append((own, place, ids, values))


def _ranked(logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = (-logprobs).argsort(kind="stable")
    return order, logprobs[order]
