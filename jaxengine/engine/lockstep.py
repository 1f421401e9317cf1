"""Several processes, each with its devices of one mesh: process 0 schedules, the others do what its runner is told.

A command is a name and plain data. Every process carries out the same ones in the same order; nothing else differs.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from jaxengine.engine.engine import Flight
from jaxengine.errors import EngineError
from jaxengine.step import StepInputs

STEPS_AHEAD = 2  # of a follower, beyond which it waits for its device
Commands = dict[str, Callable[..., Any]]


class Channel(Protocol):
    """See jaxengine.processes.Processes."""

    rank: int
    count: int

    def send(self, content: Any) -> None: ...
    def receive(self) -> Any: ...
    def end(self) -> None: ...
    def fail(self, reason: str) -> None: ...
    def die(self, error: BaseException) -> NoReturn: ...


class Leader:
    """Process 0's runner: a command goes to the others before it is carried out here."""

    def __init__(self, runner: Any, channel: Channel):
        self._runner, self._channel = runner, channel
        self.commands = runner_commands(runner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def everywhere(self, name: str, *arguments: Any) -> Any:
        """When it fails here, all processes end: they are no longer in step."""
        self._channel.send((name, arguments))
        try:
            return self.commands[name](*arguments)
        except Exception as error:
            self._channel.die(error)

    def submit(self, inputs: StepInputs) -> Flight:
        self._runner.weights.check()  # before anybody has started
        return self.everywhere("submit", inputs)

    def reset(self) -> None:
        self.everywhere("reset")

    def sleep(self, level: int) -> None:
        self.everywhere("sleep", level)

    def lose(self, error: Exception) -> NoReturn:
        """The device failed a step, which those of other processes may wait in for ever."""
        self._channel.die(error)

    def close(self, reason: str | None) -> None:
        """`reason`: the error that ends the others too."""
        self._channel.send(("close", (reason,)))
        self._channel.end()
        self._runner.close()


class Follower:
    """Stands in any other process where process 0 has its engine."""

    def __init__(self, commands: Commands, close: Callable[[], None], channel: Channel):
        self._commands, self._close, self._channel = commands, close, channel

    def follow(self) -> None:
        """Returns when process 0 has closed its engine. Raises EngineError when an error made it do so."""
        flights: deque[Flight] = deque()
        try:
            while (command := self._channel.receive())[0] != "close":
                name, arguments = command
                result = self._commands[name](*arguments)
                if name == "submit":
                    flights.append(result)
                if len(flights) > STEPS_AHEAD:
                    flights.popleft().result()
            for flight in flights:
                flight.result()
        except Exception as error:
            self._channel.die(error)
        self._channel.end()
        [reason] = command[1]
        if reason is not None:
            raise EngineError(f"process 0 of {self._channel.count} ended: {reason}")

    def close(self, reason: str | None = None) -> None:
        """A second call does nothing."""
        self._channel.fail(reason or "it closed its engine before process 0 did")
        close, self._close = self._close, lambda: None
        close()

    def raise_if_ended(self) -> NoReturn:
        """What every method does that only process 0 has."""
        raise EngineError(
            f"this is process {self._channel.rank} of {self._channel.count}, which does what process 0 does: call "
            "follow() here, and everything else in process 0"
        )

    def check(self, request: Any) -> None:
        self.raise_if_ended()

    def add(self, request: Any, listener: Any) -> None:
        self.raise_if_ended()

    def call(self, function: Any) -> Any:
        self.raise_if_ended()

    def abort(self, request_ids: Any) -> None:
        self.raise_if_ended()


def runner_commands(runner: Any) -> Commands:
    return {"submit": runner.submit, "reset": runner.reset, "sleep": runner.sleep}
