"""Arrays that have their heads, or their layers, on axes of their own -> canonical ones."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Merged:
    """A ParamRule's hook: NumPy and jax arrays alike, which jax can trace.

    source: the shape of one layer's array, as the trainer has it; target: the canonical one. layers: so many are
    stacked on axis 1; None: there is one, not stacked. interleaved: the two numbers that RoPE turns together are
    neighbours in a head (the last axis), where the canonical layout has them half a head apart. factor: what all is
    multiplied with, in float32.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    layers: int | None = None
    interleaved: bool = False
    factor: float = 1.0

    def __call__(self, x: Any) -> list[Any]:
        """One array of `target` for each layer. Raises ValueError when the shape is not the config's."""
        want = self.source if self.layers is None else (self.source[0], self.layers, *self.source[1:])
        if tuple(x.shape) != want:
            raise ValueError(f"the config makes it {list(want)}")
        return [self._one(x)] if self.layers is None else [self._one(x[:, i]) for i in range(self.layers)]

    def _one(self, x: Any) -> Any:
        if self.interleaved:
            x = x.reshape(*self.source[:-1], self.source[-1] // 2, 2).swapaxes(-1, -2)
        if self.factor != 1:
            x = (x.astype("float32") * self.factor).astype(x.dtype)
        return x.reshape(self.target)
