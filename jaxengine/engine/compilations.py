"""What programs are compiled for, and how often the process compiled: after warm-up, a fault."""

from typing import Any

import jax
import jax.monitoring


def stand_in(argument: Any) -> Any:
    """What a program can be compiled for when the device's array itself is gone by then."""
    if not isinstance(argument, jax.Array):
        return argument
    return jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=argument.sharding)


class CompilationCounter:
    """Counts the compilations of the whole process; `after_warmup` is what should stay zero."""

    def __init__(self):
        self.total, self._warm = 0, None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        self.total += event == "/jax/core/compile/backend_compile_duration"

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def mark_warm(self) -> None:
        self._warm = self.total

    @property
    def after_warmup(self) -> int | None:
        """None before the first warm-up."""
        return None if self._warm is None else self.total - self._warm
