"""How far an engine's log-probabilities are from those of a trainer's own forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.errors import ConfigError, RequestError
from jaxengine.llm import LLM
from jaxengine.request import RequestOutput

# Of one token. bfloat16 rounds logits of 10 to 0.06, and the two round at different places.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


class Divergence(NamedTuple):
    """A token on which the two disagree."""

    sequence: int
    position: int  # of the token in its sequence
    token_id: int
    engine: float
    reference: float


@dataclass(frozen=True, repr=False)
class ParityReport:
    """Both log-probabilities of n tokens, in the order of the sequences; arrays of shape [n]."""

    sequence: np.ndarray  # int64, of which sequence
    position: np.ndarray  # int64, where in it
    token_id: np.ndarray  # int64
    engine: np.ndarray  # float32
    reference: np.ndarray  # float32
    tolerance: float

    @property
    def difference(self) -> np.ndarray:
        """float32 [n], engine - reference; 0 where both are -inf."""
        with np.errstate(invalid="ignore"):
            return np.where(self.engine == self.reference, np.float32(0), self.engine - self.reference)

    @property
    def largest(self) -> float:
        return float(np.abs(self.difference).max())

    @property
    def mean(self) -> float:
        """Of the absolute differences."""
        return float(np.abs(self.difference).mean(dtype=np.float64))

    @property
    def first_diverging(self) -> Divergence | None:
        """The earliest token of a sequence that differs by more than `tolerance`; NaN does too."""
        [beyond] = np.nonzero(~(np.abs(self.difference) <= self.tolerance))
        if not len(beyond):
            return None
        i = beyond[self.position[beyond].argmin()]
        return Divergence(*(x[i].item() for x in (self.sequence, self.position, self.token_id, self.engine,
                                                  self.reference)))  # fmt: skip

    def __repr__(self) -> str:
        where = self.first_diverging
        return (
            f"{len(self.engine)} tokens of {len(np.unique(self.sequence))} sequences: log-probabilities differ by "
            f"{self.largest:.2e} at most, {self.mean:.2e} on average; "
            + (f"all within {self.tolerance:g}" if where is None else f"beyond {self.tolerance:g} first at {where}")
        )

    def to_pandas(self) -> Any:
        """A DataFrame with one row for each token. Raises ImportError that says what to install."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        names = ("sequence", "position", "token_id", "engine", "reference", "difference")
        return pandas.DataFrame({name: getattr(self, name) for name in names})

    def plot(self, axis: Any = None) -> Any:
        """Absolute differences by position, on matplotlib's `axis` or a new one, which it returns."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        axis = pyplot.subplots(figsize=(8, 3), layout="constrained")[1] if axis is None else axis
        smallest = np.finfo(np.float32).eps  # equal ones have a place on a logarithmic axis too
        shown = np.maximum(np.abs(self.difference), smallest)
        axis.scatter(self.position, shown, c=self.sequence, s=8, cmap="viridis")
        axis.axhline(self.tolerance, color="grey", linestyle="--", label="tolerance")
        axis.set(yscale="log", xlabel="position", ylabel="|difference| in log-probability")
        axis.legend()
        return axis


def parity_report(
    llm: LLM,
    sequences: Sequence[Any],
    reference: Callable[[np.ndarray], Any] | Sequence[Any],
    *,
    tolerance: float | None = None,
    batch_size: int = 8,
) -> ParityReport:
    """Compares the engine's log-probabilities with those of a trainer's own forward.

    sequences: lists of token ids, of which all tokens but the first are compared, teacher-forced; or outputs of
    `llm.generate` with `logprobs`, of which those that were drawn are, by the log-probabilities they were drawn with.
    reference: int32 [batch, length] -> logits [batch, length, vocab]; it is given `batch_size` sequences at a time,
    always of one length, filled up with zeros behind, which a causal model does not see. Or log-probabilities, float
    [len - 1] for each sequence. tolerance: of one token; None: 1e-4 in float32, 0.02 in float16, 0.1 in bfloat16.

    Raises RequestError for sequences that cannot be scored, ConfigError for a reference of another shape.

    >>> with LLM() as llm:
    ...     ids = llm.encode("import os")
    ...     report = parity_report(llm, [ids], llm.logprobs([ids]))
    >>> report.largest, report.first_diverging
    (0.0, None)
    """
    if any(isinstance(sequence, RequestOutput) for sequence in sequences):
        ids, starts, engine = _drawn(llm, sequences)
    else:
        ids, starts, engine = [list(sequence) for sequence in sequences], [1] * len(sequences), llm.logprobs(sequences)
    if not ids:
        raise RequestError("there is no token to compare")
    expected = _forward(reference, ids, batch_size) if callable(reference) else [np.asarray(x) for x in reference]
    if [x.shape for x in expected] != [(len(row) - 1,) for row in ids]:
        raise ConfigError(
            f"reference has shapes {[x.shape for x in expected]} where the sequences need "
            f"{[(len(row) - 1,) for row in ids]}: log-probabilities of all tokens but the first"
        )
    rows = [
        (np.full(len(row) - start, i), np.arange(start, len(row)), np.array(row[start:]), own, other[start - 1 :])
        for i, (row, start, own, other) in enumerate(zip(ids, starts, engine, expected, strict=True))
    ]
    sequence, position, token_id, own, other = map(np.concatenate, zip(*rows, strict=True))
    tolerance = TOLERANCES[llm.config.dtype] if tolerance is None else tolerance
    return ParityReport(sequence, position, token_id, own, other.astype(np.float32), tolerance)


def _drawn(llm: LLM, outputs: Sequence[RequestOutput]) -> tuple[list[list[int]], list[int], list[np.ndarray]]:
    """Token ids, where the output begins, and its log-probabilities, of each completion that has tokens."""
    if llm.config.logprobs_mode != "raw":
        raise RequestError(f"{llm.config.logprobs_mode=} are not the model's own: make the engine with 'raw'")
    ids, starts, found = [], [], []
    for output in outputs:
        for completion in output.outputs:
            if completion.logprobs is None:
                raise RequestError(f"{output.request_id} has no log-probabilities: SamplingParams(logprobs=0) asks")
            if len(completion.token_ids):
                ids.append([*output.prompt_token_ids, *completion.token_ids])
                starts.append(len(output.prompt_token_ids))
                found.append(completion.logprobs.logprobs)
    return ids, starts, found


def _forward(forward: Callable[[np.ndarray], Any], ids: Sequence[Sequence[int]], batch_size: int) -> list[np.ndarray]:
    """float32 [len - 1] for each sequence. One shape throughout: a jitted forward is compiled once."""
    length, found = max(map(len, ids)), []
    for first in range(0, len(ids), batch_size):
        batch = ids[first : first + batch_size]
        tokens = np.zeros((batch_size, length), np.int32)
        for row, own in zip(tokens, batch):
            row[: len(own)] = own
        logits = forward(tokens)
        if getattr(logits, "ndim", 0) != 3 or logits.shape[:2] != tokens.shape:
            raise ConfigError(
                f"reference gives {getattr(logits, 'shape', type(logits).__name__)} for tokens {tokens.shape}, where "
                "it should give logits [batch, length, vocab]"
            )
        values = np.asarray(_of_next(logits, tokens))
        found += [row[: len(own) - 1] for row, own in zip(values, batch)]
    return found


@jax.jit
def _of_next(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[batch, length, vocab], [batch, length] -> log-probabilities of tokens[:, 1:], float32."""
    logprobs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
