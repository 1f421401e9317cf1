"""The loop: requests in, steps on the device, tokens out. Knows no text: a sink turns ids into it."""

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np

from jaxengine.engine.batch import Buckets, build_batch
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.sequence import Request, Sequence
from jaxengine.engine.shards import Shards
from jaxengine.engine.slots import Rows
from jaxengine.engine.updates import PendingUpdate, turn_over
from jaxengine.errors import EngineError, RequestError, WeightsDeletedError
from jaxengine.step import PromptSpan, StepInputs, StepOutputs


class TextSink(Protocol):
    """Turns token ids into text and finds stop strings, for several rows of a step at once."""

    def open(self, key: Any, prompt_ids: Seq[int], params: Any) -> None: ...
    def update(self, items: Seq[tuple[Any, Seq[int]]]) -> Seq[Any]: ...  # text_delta, stop, keep for each
    def close(self, key: Any, ids: Seq[int]) -> str: ...  # text that was held back, and that of the last ids


class Flight(Protocol):
    def result(self) -> StepOutputs: ...


class Runner(Protocol):
    @property
    def compiling(self) -> bool: ...
    def submit(self, inputs: StepInputs) -> Flight: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class _Step:
    """A step on its way: its rows in output order."""

    rows: Rows
    flight: Flight
    prompt_spans: Seq[PromptSpan]  # what was asked about prompts


class _DeviceFailure(Exception):
    """The device failed a step with these sequences."""

    def __init__(self, sequences: list[Sequence]):
        self.sequences = sequences


class Engine:
    """Schedules, submits, commits. Called from one thread."""

    def __init__(
        self,
        scheduler: Scheduler | Shards,
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
        self._committing: Seq[Sequence] = ()
        self._dead: Exception | None = None
        self._update: PendingUpdate | None = None
        self.asleep = 0  # the level; asleep it takes no requests and makes no steps
        self._enders = np.zeros(vocab_size, np.int32)  # by token: requests that it may stop
        self.prompt_tokens = self.generation_tokens = 0
        self.ended: Counter[str] = Counter()  # requests by finish reason, of n completions the first one's

    @property
    def has_work(self) -> bool:
        return not self.asleep and (bool(self._requests or self._steps or self._update) or self.scheduler.has_work)

    def check_awake(self) -> None:
        """Raises EngineError while it sleeps."""
        if self.asleep:
            raise EngineError(f"the engine sleeps (level {self.asleep}): call wake_up() first")

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that could never run, EngineError while the engine sleeps.

        Reads nothing that steps change: for any thread.
        """
        self.check_awake()
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
        request.sequences = [Sequence(request, i) for i in range(request.params.n)]
        for sequence in request.sequences:
            sequence.weight_versions = ((0, self.scheduler.weight_version),)
            self.sink.open(sequence, request.prompt_token_ids, request.params)
        self._requests[request.request_id] = request
        self._enders[self._stop_ids(request)] += 1
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
            self._change_weights()
            # While programs are compiled a step may wait for one: what the device has done meanwhile is told before.
            held = bool(self._steps) and self.runner.compiling
            started = not self.asleep and not held and self._start()
            if self._steps and (len(self._steps) > self.steps_in_flight or not started):
                self._commit(self._steps[0])
        except _DeviceFailure as failure:
            self._recover(failure)
        except WeightsDeletedError as error:
            self._restart()
            for request in list(self._requests.values()):
                self._end(request, "error", WeightsDeletedError(str(error)))
        news, self._news = self._news, {}
        return list(news)

    def _start(self) -> bool:
        self._torn = True
        rows, slots = self.scheduler.schedule(), self.scheduler.slots
        if len(rows):
            now = time.time()
            for sequence in slots.sequence[rows.slots[slots.uploaded[rows.slots] == 0]]:
                sequence.request.scheduled_time = sequence.request.scheduled_time or now
            rows, inputs = build_batch(rows, slots, self.buckets, self.vocab_size)
            with self._device(rows):
                flight = self.runner.submit(inputs)
            self._steps.append(_Step(rows, flight, inputs.prompt_spans))
        self._torn = False
        return len(rows) > 0

    def _commit(self, step: _Step) -> None:
        """The only place that writes back what the device computed."""
        rows, slots = step.rows, self.scheduler.slots
        with self._device(rows):
            outputs = step.flight.result()
        self._torn, self._committing = True, slots.sequence[rows.slots]
        self._steps.popleft()
        now = time.time()
        self._keep_prompt_results(step, outputs)
        sampled, counts = rows.slots[rows.samples], np.minimum(rows.count, rows.steps)[rows.samples]
        index = slots.live[sampled].nonzero()[0]  # what others drew after their end is dropped
        drawn, tokens, counts = sampled[index], outputs.tokens[index], counts[index]
        for i in (self._enders[tokens] > 0).any(axis=1).nonzero()[0].tolist():
            counts[i] = _up_to_stop(slots.sequence[drawn[i]], tokens[i, : counts[i]].tolist())
        slots.append(drawn, tokens, counts, now)
        self.generation_tokens += int(counts.sum())
        self.scheduler.land(rows)
        last = tokens[np.arange(len(drawn)), counts - 1]
        notable = (slots.attended | (slots.num_tokens >= slots.end))[drawn] | (self._enders[last] > 0)
        drawn, noted = drawn[notable], slots.sequence[drawn[notable]].tolist()
        slots.attended[drawn] = slots.followed[drawn]
        for sequence, i in zip(noted, index[notable].tolist(), strict=True):
            request = sequence.request
            request.first_token_time, request.last_token_time = request.first_token_time or now, now
            if request.params.logprobs is not None:
                _keep_logprobs(sequence, outputs, i)
        self._apply_stops(noted, last[notable].tolist())
        noted += self._end_scored(rows)
        for sequence in noted:
            if sequence.finished:
                self._report(sequence.request)
            elif sequence.request.watched:
                self._news[sequence.request] = None
        self._torn, self._committing = False, ()

    def _apply_stops(self, drawn: list[Sequence], tokens: list[int]) -> None:
        """Ends the sequences whose last token is a stop token, that have a stop string, or all their tokens."""
        stops = {
            sequence: token if _stops(sequence, token) else None for sequence, token in zip(drawn, tokens, strict=True)
        }
        before = {sequence: sequence.num_read for sequence in drawn if sequence.request.needs_text}
        updates = self.sink.update([(sequence, sequence.read(stops[sequence] is not None)) for sequence in before])
        found = dict(zip(before, updates, strict=True))
        for sequence, stop in stops.items():
            update = found.get(sequence)
            if update is not None:
                sequence.text += update.text_delta
            if update is not None and update.stop is not None:
                sequence.keep_output(before[sequence] + update.keep)
                self._finish(sequence, "stop", update.stop)
            elif stop is not None:
                self._finish(sequence, "stop", None if stop in sequence.request.eos_token_ids else stop)
            elif sequence.num_output >= sequence.request.max_tokens:
                self._finish(sequence, "length")

    def _end_scored(self, rows: Rows) -> list[Sequence]:
        """Ends the sequences that nothing is drawn for and that have their log-probabilities now."""
        slots, quiet = self.scheduler.slots, rows[~rows.samples]
        if not len(quiet):  # as in every decode step
            return []
        last = quiet.start + quiet.count + 1 == slots.end[quiet.slots]
        scored = slots.sequence[quiet.slots[last & slots.live[quiet.slots]]].tolist()
        for sequence in scored:
            self._finish(sequence, "length")
        return scored

    def _stop_ids(self, request: Request) -> list[int]:
        return [token for token in request.stop_token_ids if token < self.vocab_size]

    def _keep_prompt_results(self, step: _Step, outputs: StepOutputs) -> None:
        slots, whole = self.scheduler.slots, iter(outputs.prompt_vocab)
        for span in step.prompt_spans:
            rows = next(whole) if span.best == -1 else None
            if slots.live[span.slot]:
                sequence = slots.sequence[span.slot]
                if span.pooled:
                    assert outputs.pooled is not None
                    sequence.pool(outputs.pooled[span.begin], span.position, span.count)
                else:
                    assert outputs.prompt is not None
                    _keep_prompt_logprobs(sequence, span, outputs.prompt, rows)
                slots.asks_prompt[span.slot] = sequence.next_prompt_logprob is not None

    def _finish(self, sequence: Sequence, reason: str, stop: int | str | None = None) -> None:
        if not sequence.finished:
            sequence.text += self.sink.close(sequence, sequence.read(stopped=reason == "stop"))
            self.scheduler.finish(sequence, reason, stop)

    def _report(self, request: Request) -> None:
        if request.finished or request.watched:
            self._news[request] = None
        if request.finished and self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
            self._enders[self._stop_ids(request)] -= 1
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
        shards = self.scheduler.shards
        return {
            "num_requests_running": sum(len(shard.running) for shard in shards),
            "num_requests_waiting": sum(shard.num_waiting for shard in shards),
            "kv_cache_usage_perc": max(pool.usage for shard in shards for pool in shard.pools),
            "weight_version": self.scheduler.weight_version,
            "prefix_cache_queries": sum(shard.prefix_queries for shard in shards),
            "prefix_cache_hits": sum(shard.prefix_hits for shard in shards),
            "num_preemptions": sum(shard.num_preemptions for shard in shards),
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "request_success": dict(self.ended),
        }

    # -- other weights

    def update_weights(self, update: PendingUpdate) -> None:
        """Takes them up between two steps, as soon as the update's mode allows; `update.done` tells. One at a time."""
        assert self._update is None
        self._update = update
        if update.mode == "wait":
            update.awaited = list(self._requests.values())
            self.scheduler.hold()

    def _change_weights(self) -> None:
        update = self._update
        if update is None or not update.due:
            return
        while self._steps:  # tokens of the old weights
            self._commit(self._steps[0])
        try:
            update.install()
        except Exception as error:
            if update.destructive:
                raise  # without weights there is no going on
            self.drop_update(error)
            return
        version = self.scheduler.weight_version + 1 if update.version is None else update.version
        self.scheduler.change_weights(version)
        report, emptied = turn_over(self._requests.values(), update, version)
        for sequence in emptied:
            self.sink.close(sequence, ())
            self.sink.open(sequence, sequence.request.prompt_token_ids, sequence.params)
        self._update = None
        update.done.set_result(report)

    def drop_update(self, error: Exception) -> None:
        """Tells who waits for the update that it will not come."""
        self.scheduler.release()
        if self._update is not None:
            self._update.done.set_exception(error)
            self._update = None

    def sleep(self, level: int) -> None:
        """Unfinished requests keep their tokens, and wait; cache (1) and weights (2) may be taken from the runner."""
        self._mend()
        self.check_awake()
        try:
            while self._steps:
                self._commit(self._steps[0])
        except _DeviceFailure as failure:
            self._recover(failure)
        self.scheduler.change_weights(self.scheduler.weight_version)  # no page outlives the cache
        self.asleep = level

    def wake_up(self, update: PendingUpdate | None) -> None:
        """The runner has a cache again; the update brings weights where they were given up."""
        self.asleep, self._update = 0, update
        self._change_weights()

    # -- failures

    @contextmanager
    def _device(self, rows: Rows) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.is_device_error(error):
                raise _DeviceFailure(self.scheduler.slots.sequence[rows.slots].tolist()) from error
            raise

    def _recover(self, failure: _DeviceFailure) -> None:
        """The device failed a step and its donated arrays are dead: a new cache, and every request starts again.

        The requests of that step are tried once more; when they fail again they end with the error.
        """
        for sequence in failure.sequences:
            sequence.failures += 1
        self._restart()
        for request in dict.fromkeys(sequence.request for sequence in failure.sequences):
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
        self._torn, self._committing = False, ()

    def _mend(self) -> None:
        """Puts in order what an exception in the middle of a step left behind; a half-committed step's requests end."""
        if not self._torn:
            return
        torn = dict.fromkeys(sequence.request for sequence in self._committing)
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


def _stops(sequence: Sequence, token: int) -> bool:
    return token in sequence.request.stop_token_ids and sequence.num_output >= sequence.params.min_tokens


def _up_to_stop(sequence: Sequence, tokens: list[int]) -> int:
    """How many of its next tokens count: those up to the first that stops it."""
    for count, token in enumerate(tokens, 1):
        if token in sequence.request.stop_token_ids and sequence.num_output + count >= sequence.params.min_tokens:
            return count
    return len(tokens)


def _keep_logprobs(sequence: Sequence, outputs: StepOutputs, i: int) -> None:
    wanted = sequence.params.logprobs
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


def _keep_prompt_logprobs(
    sequence: Sequence, span: PromptSpan, prompt: Seq[np.ndarray], whole: np.ndarray | None
) -> None:
    """The hidden state at position p gives the prompt's token at p + 1."""
    first, wanted = sequence.next_prompt_logprob, sequence.params.prompt_logprobs
    if first is None or (count := span.position + span.count + 1 - first) <= 0:
        return
    offset = span.count - count
    logprob, rank, top_ids, top_logprobs = (part[span.begin + offset : span.begin + span.count] for part in prompt)
    best: Iterable[tuple[np.ndarray, np.ndarray]]
    if whole is not None:
        # From the same program as the rest of the vocabulary: another one may round otherwise.
        vocab = whole[offset:]
        best = map(_ranked, vocab)
        logprob = vocab[np.arange(count), sequence.tokens[first : first + count]]
        rank = 1 + (vocab > logprob[:, None]).sum(axis=1)
    elif wanted:
        best = zip(top_ids[:, :wanted].copy(), top_logprobs[:, :wanted].copy(), strict=True)
    else:
        best = repeat((np.zeros(0, np.int32), np.zeros(0, np.float32)), count)
    rows = zip(logprob.tolist(), rank.tolist(), best, strict=True)
    sequence.prompt_logprobs.extend((own, place, *of_best) for own, place, of_best in rows)


def _ranked(logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = (-logprobs).argsort(kind="stable")
    return order, logprobs[order]
