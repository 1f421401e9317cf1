"""Other weights for an engine that runs: what was asked for, and what becomes of the requests in flight."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from jaxengine.engine.sequence import Request, Sequence
from jaxengine.request import WeightUpdate

UpdateMode = Literal["wait", "restart", "continue"]


@dataclass(eq=False)
class PendingUpdate:
    """Weights that are to take the place of the present ones between two steps."""

    version: int | None  # None: the next one
    mode: UpdateMode
    install: Callable[[], None]  # called when no step is in flight
    destructive: bool  # does a failure of `install` leave no weights behind?
    awaited: list[Request] = field(default_factory=list)  # in flight when it was asked for: mode "wait"
    done: Future[WeightUpdate] = field(default_factory=Future)

    @property
    def due(self) -> bool:
        return all(request.finished for request in self.awaited)


def turn_over(requests: Iterable[Request], update: PendingUpdate, version: int) -> tuple[WeightUpdate, list[Sequence]]:
    """What each unfinished request does under the new weights; nothing runs just now.

    Returns the report, and the sequences that lost output and need their text from the beginning.
    """
    restarted: list[str] = []
    continued: list[str] = []
    emptied: list[Sequence] = []
    for request in requests:
        # What somebody has seen cannot be taken back.
        streamed = request.watched and any(sequence.num_output for sequence in request.sequences)
        again = update.mode == "restart" and not streamed
        outputs = [sequence for sequence in request.sequences if not sequence.finished and sequence.num_output]
        for sequence in request.sequences:
            if sequence.finished:
                continue
            if again or not sequence.num_output:
                sequence.start_over(version)
            else:
                sequence.go_on(version)
        if outputs:
            (restarted if again else continued).append(request.request_id)
            emptied += outputs if again else ()
    return WeightUpdate(version, tuple(restarted), tuple(continued)), emptied
