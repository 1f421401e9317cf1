"""A request inside the engine: one sequence for each of its n completions."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from jaxengine.engine.slots import SlotTable
from jaxengine.request import SamplingParams
from jaxengine.step import MODES, Mode


@dataclass(eq=False, slots=True)
class Sequence:
    """Token ids, and how many of them are computed: there is no prefill or decode state.

    It has its tokens itself while it waits and when it has ended; while it runs they are in its slot, with all counts.
    """

    request: Request
    index: int  # among the request's n
    params: SamplingParams = field(init=False)
    num_prompt: int = field(init=False)
    slot: int | None = None
    hashes: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, as far as they were needed
    num_cached: int = 0  # prompt tokens that came from the prefix cache when it was first admitted
    banned: frozenset[int] = frozenset()  # what the mask in its slot bans beside allowed_token_ids
    failures: int = 0  # steps with this sequence that the device failed
    preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: str = ""
    num_read: int = 0  # output tokens that its text has, or will never have
    cumulative_logprob: float = 0.0
    logprobs: list[tuple] = field(default_factory=list)  # per output token: logprob, rank, top ids, top logprobs
    prompt_logprobs: list[tuple] = field(default_factory=list)  # per prompt position from the first one asked for
    pooled: np.ndarray | None = None  # float64 [hidden]: the sum of the prompt's hidden states that were asked for ...
    num_pooled: int = 0  # ... and how many these are
    weight_versions: tuple[tuple[int, int], ...] = ()  # first output token of a span, its version
    _table: SlotTable | None = None  # of its slot
    _tokens: np.ndarray = field(init=False)

    def __post_init__(self):
        self.params, self.num_prompt = self.request.params, len(self.request.prompt_token_ids)
        self._tokens = np.array(self.request.prompt_token_ids, np.int32)

    def enter(self, table: SlotTable, slot: int, num_computed: int) -> None:
        """Runs in this slot from now on; its pages hold `num_computed` tokens already."""
        request, count = self.request, len(self._tokens)
        table.tokens[slot, :count] = self._tokens
        table.num_tokens[slot], table.num_drawn[slot] = count, self.num_needed
        table.num_computed[slot] = num_computed
        table.end[slot] = self.num_prompt + request.max_tokens
        for counts in (table.flights, table.uploaded, table.last_token_time):
            counts[slot] = 0
        table.mode[slot] = MODES.index(request.mode)
        table.needs_last_token[slot] = request.needs_last_token
        table.edits_logits[slot] = request.edits_logits
        table.asks_prompt[slot] = self.next_prompt_logprob is not None
        table.followed[slot] = request.needs_text or self.params.logprobs is not None
        table.attended[slot] = table.live[slot] = True
        table.sequence[slot] = self
        self.slot, self._table = slot, table

    def leave(self) -> None:
        """Runs no more and takes its tokens along; the slot may have to drain."""
        if self._table is not None:
            table, slot = self._table, self.slot
            self._tokens, table.live[slot] = self.tokens.copy(), False
            if last := float(table.last_token_time[slot]):
                self.request.last_token_time = max(last, self.request.last_token_time or last)
        self._table, self.slot, self.hashes = None, None, []

    def start_over(self, version: int) -> None:
        """Waits with its prompt only, as if it had never run, for weights of this version."""
        assert self._table is None
        self._tokens = self._tokens[: self.num_prompt].copy()
        self.num_read, self.text, self.cumulative_logprob = 0, "", 0.0
        self.logprobs, self.prompt_logprobs, self.weight_versions = [], [], ((0, version),)
        self.pooled, self.num_pooled = None, 0

    def go_on(self, version: int) -> None:
        """Keeps its tokens; further ones are drawn from weights of this version."""
        # Without those that drew nothing: two updates may come with no token between them.
        drawn = (span for span in self.weight_versions if span[0] < self.num_output)
        self.weight_versions = (*drawn, (self.num_output, version))

    @property
    def tokens(self) -> np.ndarray:
        """int32: prompt, then output; not to be written to."""
        table = self._table
        return self._tokens if table is None else table.tokens[self.slot, : table.num_tokens[self.slot]]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) if self._table is None else int(self._table.num_tokens[self.slot])

    @property
    def num_needed(self) -> int:
        """Tokens to compute before the next one: all, but for the last one when nothing is to follow it."""
        return self.num_tokens - (self.request.max_tokens == 0)

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    def output(self, start: int = 0) -> list[int]:
        """The output's token ids from the start-th on."""
        return self.tokens[self.num_prompt + start :].tolist()

    def read(self, stopped: bool) -> list[int]:
        """The output's token ids that its text does not have yet; a stop token at its end may have to stay out."""
        ids = self.tokens[self.num_prompt + self.num_read :].tolist()
        self.num_read += len(ids)
        return ids[:-1] if stopped and not self.params.include_stop_str_in_output else ids

    def keep_output(self, count: int) -> None:
        """Drops what it drew beyond its first `count` tokens."""
        assert self._table is not None
        self._table.num_tokens[self.slot] = self.num_prompt + count

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def rank(self) -> tuple:
        """Who goes first: a smaller rank. Fixed at arrival, so an old request overtakes every newer one in time."""
        return (*self.request.rank, self.index)

    def pool(self, hidden: np.ndarray, first: int, count: int) -> None:
        """Takes the sum of `count` hidden states, float32 [hidden], from position `first` on."""
        assert first + 1 == self.next_prompt_logprob
        self.pooled = hidden.astype(np.float64) + (0 if self.pooled is None else self.pooled)
        self.num_pooled += count

    @property
    def next_prompt_logprob(self) -> int | None:
        """The first prompt position whose log-probability is still to be computed; None when there is none.

        Where hidden states are pooled instead: the position behind the next one of these.
        """
        if self.params.prompt_logprobs is None or self.index or (self.params.pooling == "cls" and self.num_pooled):
            return None
        position = max(1, self.params.prompt_logprobs_start) + len(self.prompt_logprobs) + self.num_pooled
        return position if position < self.num_prompt else None


@dataclass(eq=False)
class Request:
    """What a caller asked for: a prompt, parameters, and the sequences that answer it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Seq[int]
    params: SamplingParams
    eos_token_ids: Seq[int] = ()
    priority: int = 0
    rank: tuple = ()
    seed: int = 0
    max_tokens: int = 0  # params.max_tokens within max_model_len
    stop_token_ids: frozenset[int] = frozenset()  # those that end it once min_tokens are there
    arrival_time: float = field(default_factory=time.time)
    deadline: float | None = None  # time.monotonic()
    queued_time: float | None = None
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    cache_salt: bytes = b""
    bad_word_ids: Seq[list[int]] = ()
    needs_everything: bool = False  # the program with penalties, masks, biases and log-probabilities
    edits_logits: bool = False  # of these, all but log-probabilities: its slot holds counts, a mask, biases
    watched: bool = True  # its owner hears of every step that gave it something, not only of its end
    needs_last_token: bool = False  # a rule on its next token depends on the last one: no step ahead
    shard: int = 0  # of the data axis, where it runs
    sequences: Seq[Sequence] = ()
    error: Exception | None = None

    @property
    def mode(self) -> Mode:
        """The cheapest sampling program that will do."""
        return "everything" if self.needs_everything else "greedy" if self.params.greedy else "sampled"

    @property
    def needs_text(self) -> bool:
        """Is its text to be made while it runs? Otherwise once, at its end."""
        return self.watched or bool(self.params.stop)

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)


def allowed_mask(allowed: Seq[int] | None, banned: Seq[int], vocab_size: int) -> np.ndarray:
    """uint32 [ceil(vocab / 32)]: bit t % 32 of word t // 32 is set when token t may be drawn."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    if allowed is None:
        bits[:vocab_size] = 1
    else:
        bits[list(allowed)] = 1
    bits[list(banned)] = 0
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
