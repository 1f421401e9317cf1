"""Answers a batch in OpenAI's format: lines in, records out, and what is done stays done."""

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Protocol

from jaxengine.errors import ConfigError, RequestError, UnsupportedError
from jaxengine.evaluate.answering import Answer, Answering, Line, Started, failure
from jaxengine.evaluate.journal import Journal, KeySet, Record, id_key, line_key
from jaxengine.evaluate.protocol import SAMPLING
from jaxengine.evaluate.tables import Source, open_source
from jaxengine.progress import token_bar
from jaxengine.request import RequestOutput

REFUSED_AT_ONCE = 256  # records that are written together, of lines that run nothing


@dataclass
class BatchSummary:
    """Lines of this run. Those that failed have an error record."""

    completed: int = 0
    failed: int = 0
    skipped: int = 0  # finished by a run before
    stopped: bool = False  # before the end of the input


def run_batch(
    llm: Any,
    source: str | os.PathLike | Iterable[Any],
    sink: str | os.PathLike | Callable[[Record], None],
    *,
    defaults: Mapping[str, Any] | None = None,
    served_model_name: str | Sequence[str] | None = None,
    column: str | None = None,
    id_column: str | None = None,
    url: str | None = None,
    retry_errors: bool = False,
    max_in_flight: int | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    stop: "Stop | None" = None,
) -> BatchSummary:
    """Reads lines as requests finish, and writes a record for each as soon as it is answered.

    source: a file (JSONL; CSV or parquet with `column`, `id_column` and `url`, which is /v1/completions where None), or
    an iterable of lines. A line that cannot be served gets an error record, and the others go on.
    sink: a JSONL file; records are on the disk (fsync) before they count as done. Run again with the same file, the
    lines it holds are skipped, with retry_errors only those that were answered. The manifest beside it names model and
    parameters: a run with others is refused. A function instead takes each record, and nothing is remembered.
    defaults: sampling fields for where a body says nothing. served_model_name: what a body's `model` may be; None: the
    model as it was given to LLM, or its last part. max_in_flight: requests in the engine at a time; None: twice
    the max_num_seqs of all shards. stop: `stop.set()`, from any thread or signal handler, ends the run: what is not
    finished then is left for the next one.

    Raises ConfigError for bad options or a file of another run, OSError when the disk is full, EngineError when the
    engine cannot go on. What was written before stays, and the same call goes on from there.
    """
    check_options(sink, defaults, retry_errors, max_in_flight)
    if llm.source["model"] is None and not callable(sink):
        raise UnsupportedError(
            "parameters in memory have no name, so that a resumed run could not tell them from others: give a function "
            "as sink, or write them as a checkpoint and make the LLM of its folder"
        )
    lines = open_source(source, column, id_column, url)
    answering = Answering(llm, defaults or {}, list_names(served_model_name))
    with closing(_Engine(answering, max_in_flight or answering.ahead)) as engine:
        return answer_all(engine, answering.made_by, lines, sink, retry_errors, use_tqdm, stop or Stop())


def check_options(sink: Any, defaults: Mapping[str, Any] | None, retry_errors: bool, max_in_flight: int | None) -> None:
    """Raises ConfigError."""
    if unknown := set(defaults or {}) - set(SAMPLING):
        raise ConfigError(f"defaults has {sorted(unknown)}, which is not among {sorted(SAMPLING)}")
    if max_in_flight is not None and max_in_flight < 1:
        raise ConfigError(f"{max_in_flight=} must be 1 or more")
    if retry_errors and callable(sink):
        raise ConfigError("retry_errors needs a file as sink: a function remembers nothing")


def list_names(served_model_name: str | Sequence[str] | None) -> list[str]:
    return [served_model_name] if isinstance(served_model_name, str) else list(served_model_name or ())


class Stop:
    """Ends a run from elsewhere."""

    def __init__(self) -> None:
        self.is_set = False
        self._wake: Callable[[], None] = lambda: None

    def set(self) -> None:
        """Safe in a signal handler: it takes no lock that the run may hold."""
        self.is_set = True
        self._wake()

    def bind(self, wake: Callable[[], None]) -> None:
        self._wake = wake


class Answerer(Protocol):
    """Who answers lines: the engine of this process, or several elsewhere."""

    @property
    def has_room(self) -> bool: ...
    @property
    def busy(self) -> bool:
        """Whether there are lines without an answer."""
        ...

    @property
    def note(self) -> str:
        """For the progress bar."""
        ...

    def start(self, line: Line) -> Answer | None:
        """Takes a line, when there is room. The answer of one that cannot be served."""

    def finished(self) -> Sequence[Answer]:
        """Waits for something to happen, or for `wake`; what was answered then."""
        ...

    def wake(self) -> None:
        """From any thread or signal handler."""


def answer_all(
    engine: Answerer,
    made_by: Mapping[str, Any],
    source: Source,
    sink: str | os.PathLike | Callable[[Record], None],
    retry_errors: bool,
    use_tqdm: bool | Callable[..., Any],
    stop: Stop,
) -> BatchSummary:
    """`run_batch`, whoever answers."""
    with ExitStack() as stack:
        journal, total = None, source.total
        if not callable(sink):
            journal = stack.enter_context(Journal(sink, {**made_by, "table": source.table}, retry_errors))
        if total is not None and journal is not None:
            total = max(0, total - len(journal))
        show = stack.enter_context(token_bar("Batch", use_tqdm, total))
        return _Run(engine, source.lines, sink if callable(sink) else None, journal, show, stop).run()


class _Engine:
    """The one of this process; it has room for so many requests."""

    note = ""

    def __init__(self, answering: Answering, limit: int):
        self._answering, self._limit = answering, limit
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # (line, an output, whether the last), or None: look again
        self._active: set[str] = set()  # ids of unfinished requests

    @property
    def has_room(self) -> bool:
        return len(self._active) < self._limit

    @property
    def busy(self) -> bool:
        return bool(self._active)

    def wake(self) -> None:
        self._inbox.put(None)

    def start(self, line: Line) -> Answer | None:
        started = self._answering.start(line, self._tell)
        if isinstance(started, Answer):
            return started
        self._active.update(request.request_id for request in started.requests)
        return None

    def _tell(self, started: Started, output: RequestOutput) -> None:
        """In the engine's thread."""
        self._inbox.put((started, output, started.ended))

    def finished(self) -> list[Answer]:
        answers = []
        item = self._inbox.get()
        while True:
            if item is not None:
                started, output, ended = item
                self._active.discard(output.request_id)
                if ended:
                    answers.append(self._answering.answer(started))
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return answers

    def close(self) -> None:
        """Ends what runs."""
        self._answering.llm.abort(list(self._active))


class _Run:
    def __init__(
        self,
        engine: Answerer,
        lines: Iterator[Any],
        sink: Callable[[Record], None] | None,
        journal: Journal | None,
        show: Callable[..., None],
        stop: Stop,
    ):
        self.engine, self.sink, self.journal = engine, sink, journal
        self.lines: Iterator[tuple[int, Any]] = enumerate(lines, 1)
        self.show, self.stop = show, stop
        self.summary = BatchSummary()
        self._seen = KeySet()

    def run(self) -> BatchSummary:
        self.stop.bind(self.engine.wake)
        exhausted = False
        while not self.stop.is_set and not (exhausted and not self.engine.busy):
            if not exhausted:
                refused, exhausted = self._fill()
                self._write(refused)
            if self.engine.busy or not self.engine.has_room:
                self._write(self.engine.finished())
        self.summary.stopped = self.engine.busy or not exhausted
        return self.summary

    def _fill(self) -> tuple[list[Answer], bool]:
        """Starts lines while there is room; the answers of those that run nothing, and whether no line is left."""
        refused: list[Answer] = []
        while self.engine.has_room and len(refused) < REFUSED_AT_ONCE and not self.stop.is_set:
            number, content = next(self.lines, (0, {}))
            if number == 0:
                return refused, True
            if content == {}:  # an empty line of a file
                continue
            named = self._identify(content)
            key = id_key(named) if isinstance(named, str) else line_key(number)
            if self.journal is not None and key in self.journal:
                self.summary.skipped += 1
            elif isinstance(named, RequestError):
                refused.append(Answer(failure(None, number, named)))
            elif answer := self.engine.start(Line(number, named, content)):
                refused.append(answer)
        return refused, False

    def _identify(self, content: Any) -> str | RequestError:
        """A line's custom_id, or why it has none."""
        if isinstance(content, RequestError):
            return content
        if not isinstance(content, Mapping):
            return RequestError(f"{content!r:.200} is not an object")
        custom_id = content.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            return RequestError(f"custom_id={custom_id!r:.200} must be a text that names the line")
        if custom_id in self._seen:
            return RequestError(f"custom_id={custom_id!r:.200} stands on a line before; it names one line")
        self._seen.add(custom_id)
        return custom_id

    def _write(self, answers: Sequence[Answer]) -> None:
        """Records count once they are on the disk."""
        if self.journal is not None and answers:
            self.journal.append([answer.record for answer in answers])
        for answer in answers:
            if self.sink is not None:
                self.sink(answer.record)
            failed = answer.record["error"] is not None
            self.summary.failed += failed
            self.summary.completed += not failed
            self.show(1, answer.prompt_tokens, answer.output_tokens, self.engine.note)
