"""The engine's own thread: callers in any thread, or any event loop, hand in requests and hear what becomes of them."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from jaxengine.engine.engine import Engine
from jaxengine.engine.sequence import Request, Sequence
from jaxengine.errors import EngineClosedError, EngineError, JaxEngineError, RequestError

logger = logging.getLogger(__name__)
COMMANDS = 256  # taken between two steps, most of them requests at 17 us each: all of a long list would hold up a step
Listener = Callable[[Request], None]  # called in the engine's thread: it must not wait, and sees the request at rest


class EngineLoop:
    """Steps an engine while it has work. Every method may be called from any thread."""

    def __init__(self, engine: Engine, on_exit: Callable[[str | None], None] = lambda reason: None):
        """`on_exit` is called in the thread when it ends, after the last step, with the error that made it end."""
        self._engine, self._on_exit = engine, on_exit
        self._wake = threading.Condition(threading.RLock())
        self._commands: list[Callable[[], None] | Request] = []  # a request is to be admitted
        self._listeners: dict[str, tuple[Request, Listener]] = {}
        self._end: EngineError | None = None  # why no more requests are taken
        self._reason: str | None = None  # the error, if one ended it
        self._thread = threading.Thread(target=self._run, name="jaxengine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that could never run."""
        self._engine.check(request)

    def add(self, request: Request, listener: Listener) -> None:
        """Queues a request; the listener hears of each step that gave it something, and of its end.

        Raises RequestError for a request that could never run or an id in use, EngineError when the engine has ended.
        """
        self._engine.check(request)
        with self._wake:
            if request.request_id in self._listeners:
                raise RequestError(f"request_id={request.request_id!r} is in use")
            self._post(request)
            self._listeners[request.request_id] = request, listener

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests as soon as the present step allows; their listeners hear it. Unknown ids are passed over."""
        ids = list(request_ids)
        with self._wake:
            if ids and self._end is None:
                self._post(lambda: self._tell(r for i in ids if (r := self._engine.abort(i)) is not None))

    def call(self, function: Callable[[Engine], Any]) -> Any:
        """Runs `function(engine)` between two steps and returns what it returns."""
        done: Future = Future()

        def command() -> None:
            try:
                done.set_result(function(self._engine))
            except Exception as error:
                done.set_exception(error)

        self._post(command)
        return done.result()

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._listeners)

    def close(self, reason: str | None = None) -> None:
        """Ends every request and the thread; a second call does nothing. `reason`: of a program that fails."""
        with self._wake:
            self._reason = self._reason or reason
            self._end = self._end or EngineClosedError("the engine was closed")
            self._wake.notify()
        if threading.current_thread() is not self._thread:  # a finalizer may run anywhere
            self._thread.join()

    def raise_if_ended(self) -> None:
        """Raises EngineError when the engine was closed or cannot go on."""
        if self._end is not None:
            raise type(self._end)(str(self._end)) from self._end.__cause__

    def _post(self, command: Callable[[], None] | Request) -> None:
        with self._wake:  # with the end known no command is left behind: see _fail_all
            self.raise_if_ended()
            self._commands.append(command)
            self._wake.notify()

    # -- in the thread

    def _admit(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except JaxEngineError as error:
            self._fail(request, error.with_traceback(None))  # its frames hold the request, which holds it

    def _fail(self, request: Request, error: JaxEngineError | None) -> None:
        request.error = error
        if not request.sequences:  # it was never admitted
            request.sequences = [Sequence(request, i) for i in range(request.params.n)]
        for sequence in request.sequences:
            sequence.finish_reason = sequence.finish_reason or "error"
        self._tell([request])

    def _run(self) -> None:
        try:
            while (commands := self._next_commands()) is not None:
                self._do(commands)
                self._tell(self._engine.step())
        except Exception as error:
            logger.exception("the engine ended")
            self._end = EngineError(f"the engine cannot go on: {type(error).__name__}: {error}")
            self._end.__cause__, self._reason = error, str(self._end)
        finally:
            try:
                self._fail_all()
            finally:
                self._on_exit(self._reason)

    def _do(self, commands: list[Callable[[], None] | Request]) -> None:
        for command in commands:
            if isinstance(command, Request):
                self._admit(command)
            else:
                command()

    def _next_commands(self) -> list[Callable[[], None] | Request] | None:
        """What to do before the next step, in order; waits while there is nothing at all. None: the end."""
        with self._wake:
            while not (self._commands or self._engine.has_work or self._end):
                self._wake.wait()
            if self._end:
                return None
            count = COMMANDS if self._engine.has_work else len(self._commands)
            commands, self._commands = self._commands[:count], self._commands[count:]
            return commands

    def _tell(self, requests: Iterable[Request]) -> None:
        for request in requests:
            entry = self._listeners.get(request.request_id)
            if request.finished:
                self._listeners.pop(request.request_id, None)
            if entry is not None:
                entry[1](request)
            if request.finished:
                request.sequences = ()  # no cycles: the collector, which they would wait for, stops all threads

    def _fail_all(self) -> None:
        with self._wake:
            commands, self._commands = self._commands, []
        self._do(commands)  # someone may wait for one
        if self._end is not None:
            self._engine.drop_update(self._end)
        for request, _ in list(self._listeners.values()):
            try:
                self._fail(request, self._end)
            except Exception:  # a listener's; the others are told all the same
                logger.exception("request %s cannot be told that the engine ended", request.request_id)
