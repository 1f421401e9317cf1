"""Answers a batch in OpenAI's format: lines in, records out, and what is done stays done."""

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxengine.errors import ConfigError, EngineError, JaxEngineError, RequestError, UnsupportedError
from jaxengine.evaluate.journal import Journal, KeySet, Record, id_key, line_key
from jaxengine.evaluate.manifest import manifest
from jaxengine.evaluate.protocol import SAMPLING, Job, Server, job, response_id
from jaxengine.evaluate.tables import COMPLETIONS, count_lines, read_lines
from jaxengine.progress import token_bar
from jaxengine.request import RequestOutput

AHEAD = 2  # requests in the engine at a time, in units of max_num_seqs
LINE_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass
class BatchSummary:
    """Lines of this run. Those that failed have an error record."""

    completed: int = 0
    failed: int = 0
    skipped: int = 0  # finished by a run before
    stopped: bool = False  # before the end of the input


@dataclass(eq=False)
class _Line:
    """A line whose requests run."""

    custom_id: str | None
    number: int
    job: Job
    requests: Sequence[Any]
    outputs: dict[int, RequestOutput] = field(default_factory=dict)


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
    max_num_seqs. stop: `stop.set()`, from any thread or signal handler, ends the run: what is not finished then is left
    for the next one.

    Raises ConfigError for bad options or a file of another run, OSError when the disk is full, EngineError when the
    engine cannot go on. What was written before stays, and the same call goes on from there.
    """
    if unknown := set(defaults or {}) - set(SAMPLING):
        raise ConfigError(f"defaults has {sorted(unknown)}, which is not among {sorted(SAMPLING)}")
    if max_in_flight is not None and max_in_flight < 1:
        raise ConfigError(f"{max_in_flight=} must be 1 or more")
    if retry_errors and callable(sink):
        raise ConfigError("retry_errors needs a file as sink: a function remembers nothing")
    if llm.source["model"] is None and not callable(sink):
        raise UnsupportedError(
            "parameters in memory have no name, so that a resumed run could not tell them from others: give a function "
            "as sink, or write them as a checkpoint and make the LLM of its folder"
        )
    given = Path(llm.source["model"] or "parameters")
    names = [served_model_name] if isinstance(served_model_name, str) else list(served_model_name or ())
    server = Server(llm, names or [given.name, str(given)], dict(defaults or {}))
    server.params({}, "")  # bad defaults are refused before anything is written
    lines: Any = source
    total, table = None, None
    if isinstance(source, str | os.PathLike):
        lines, total = read_lines(source, column, id_column, url), count_lines(source)
        table = column and {"column": column, "id_column": id_column, "url": url or COMPLETIONS}
    elif column or id_column or url:
        raise ConfigError("column, id_column and url are for tables; the lines of an iterable say these themselves")
    made_by = manifest(server, names) | {"table": table}
    with ExitStack() as stack:
        journal = None
        if not callable(sink):
            journal = stack.enter_context(Journal(sink, made_by, retry_errors))
        if total is not None and journal is not None:
            total = max(0, total - len(journal))
        show = stack.enter_context(token_bar("Batch", use_tqdm, total))
        limit = max_in_flight or AHEAD * llm.config.max_num_seqs
        return _Run(server, iter(lines), sink if callable(sink) else None, journal, limit, show, stop or Stop()).run()


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


class _Run:
    def __init__(
        self,
        server: Server,
        lines: Iterator[Any],
        sink: Callable[[Record], None] | None,
        journal: Journal | None,
        limit: int,
        show: Callable[[int, Sequence[RequestOutput]], None],
        stop: Stop,
    ):
        self.server, self.sink, self.journal = server, sink, journal
        self.lines: Iterator[tuple[int, Any]] = enumerate(lines, 1)
        self.limit, self.show, self.stop = limit, show, stop
        self.summary = BatchSummary()
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # (line, place, output), or None: look again
        self._active: dict[str, _Line] = {}  # by the id of each unfinished request
        self._seen = KeySet()

    def run(self) -> BatchSummary:
        self.stop.bind(lambda: self._inbox.put(None))
        exhausted = False
        try:
            while not self.stop.is_set and not (exhausted and not self._active):
                if not exhausted:
                    refused, exhausted = self._fill()
                    self._write([(record, ()) for record in refused])
                if self._active:
                    self._write([self._record(line) for line in self._finished()])
            self.summary.stopped = bool(self._active) or not exhausted
            return self.summary
        finally:
            self.server.llm.abort(list(self._active))

    def _fill(self) -> tuple[list[Record], bool]:
        """Starts lines while there is room; the records of those that cannot be served, and whether none are left."""
        refused: list[Record] = []
        while len(self._active) < self.limit and len(refused) < self.limit and not self.stop.is_set:
            number, line = next(self.lines, (0, {}))
            if number == 0:
                return refused, True
            if line == {}:  # an empty line of a file
                continue
            key, custom_id, error = self._identify(number, line)
            if self.journal is not None and key in self.journal:
                self.summary.skipped += 1
                continue
            try:
                if error is not None:
                    raise error
                self._start(key, custom_id, number, line)
            except Exception as error:  # whatever is wrong with a line, the others go on
                self.server.llm.raise_if_ended()
                refused.append(_failure(custom_id, number, error))
        return refused, False

    def _identify(self, number: int, line: Any) -> tuple[str, str | None, RequestError | None]:
        """What a line is known by, its custom_id, and why it has none."""
        key = line_key(number)
        if isinstance(line, RequestError):
            return key, None, line
        if not isinstance(line, Mapping):
            return key, None, RequestError(f"{line!r:.200} is not an object")
        custom_id = line.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            return key, None, RequestError(f"custom_id={custom_id!r:.200} must be a text that names the line")
        if custom_id in self._seen:
            return key, None, RequestError(f"custom_id={custom_id!r:.200} stands on a line before; it names one line")
        self._seen.add(custom_id)
        return id_key(custom_id), custom_id, None

    def _start(self, key: str, custom_id: str | None, number: int, line: Mapping[str, Any]) -> None:
        if unknown := set(line) - LINE_FIELDS:
            raise RequestError(f"a line has no field {sorted(unknown)}; it has {sorted(LINE_FIELDS)}")
        if line.get("method", "POST") != "POST":
            raise RequestError(f"method={line['method']!r} must be 'POST'")
        llm, asked = self.server.llm, job(self.server, line.get("url", ""), line.get("body"), key)
        started = _Line(custom_id, number, asked, llm.requests(asked.prompts, asked.params))
        for place, request in enumerate(started.requests):
            self._active[request.request_id] = started
            llm.start(request, partial(self._tell, started, place), every_step=False)

    def _tell(self, line: _Line, place: int, output: RequestOutput) -> None:
        """In the engine's thread."""
        self._inbox.put((line, place, output))

    def _finished(self) -> Iterator[_Line]:
        """Waits for something to finish; lines that are complete then."""
        item = self._inbox.get()
        while True:
            if item is not None:
                line, place, output = item
                if isinstance(output.error, EngineError):
                    self.server.llm.raise_if_ended()
                line.outputs[place] = output
                del self._active[output.request_id]
                if len(line.outputs) == len(line.requests):
                    yield line
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _record(self, line: _Line) -> tuple[Record, Sequence[RequestOutput]]:
        outputs = [line.outputs[place] for place in range(len(line.requests))]
        try:
            if any(completion.finish_reason == "abort" for output in outputs for completion in output.outputs):
                raise EngineError("a request of this line was ended by LLM.abort")
            body = line.job.respond(outputs)
        except Exception as error:
            return _failure(line.custom_id, line.number, error), outputs
        response = {"status_code": 200, "request_id": body["id"], "body": body}
        return {"id": body["id"], "custom_id": line.custom_id, "response": response, "error": None}, outputs

    def _write(self, items: Sequence[tuple[Record, Sequence[RequestOutput]]]) -> None:
        """Records count once they are on the disk."""
        if self.journal is not None and items:
            self.journal.append([record for record, _ in items])
        for record, outputs in items:
            if self.sink is not None:
                self.sink(record)
            failed = record["error"] is not None
            self.summary.failed += failed
            self.summary.completed += not failed
            self.show(1, outputs)


CODES = {RequestError: "invalid_request", UnsupportedError: "unsupported", EngineError: "engine_error"}


def _failure(custom_id: str | None, number: int, error: Exception) -> Record:
    """The record of a line that failed; `line`, its number from 1 on, names it where custom_id cannot."""
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), "internal_error")
    text = str(error) if isinstance(error, JaxEngineError) else f"{type(error).__name__}: {error}"
    key = line_key(number) if custom_id is None else id_key(custom_id)
    return {
        "id": response_id(key), "custom_id": custom_id, "line": number, "response": None,
        "error": {"code": code, "message": text},
    }  # fmt: skip
