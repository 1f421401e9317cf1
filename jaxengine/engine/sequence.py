"""A request inside the engine: one sequence for each of its n completions."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from jaxengine.request import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """Token ids and how many of them are computed. There is no prefill or decode state.

    tokens     [ prompt ............ | output ..... ] + in_flight (sampled, not yet seen by the host)
    committed  ----------------------------->|          in the pages for certain
    computed   -------------------------------->|       in the pages once every flight has landed
    """

    request: Request
    index: int  # among the request's n
    tokens: list[int]
    params: SamplingParams = field(init=False)
    num_prompt: int = field(init=False)
    num_computed: int = 0
    num_committed: int = 0
    in_flight: int = 0  # tokens sampled by steps that the host has not seen yet
    flights: int = 0  # steps that name this sequence and have not landed
    slot: int | None = None
    pages: list[list[int]] = field(default_factory=list)  # per cache group; 0 = behind the window, given back
    uploaded: list[int] = field(default_factory=list)  # per cache group: columns of the table the device has
    hashes: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, as far as they were needed
    num_published: int = 0  # pages that were offered to the prefix cache
    num_cached: int = 0  # prompt tokens that came from the prefix cache when it was first admitted
    fresh_slot: bool = False  # admitted since the last step was built: the slot must be written
    banned: frozenset[int] = frozenset()  # what the mask in its slot bans beside allowed_token_ids
    failures: int = 0  # steps with this sequence that the device failed
    preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: str = ""
    cumulative_logprob: float = 0.0
    logprobs: list[tuple] = field(default_factory=list)  # per output token: logprob, rank, top ids, top logprobs
    prompt_logprobs: list[tuple] = field(default_factory=list)  # per prompt position from the first one asked for

    def __post_init__(self):
        self.params, self.num_prompt = self.request.params, len(self.request.prompt_token_ids)

    def clear(self) -> None:
        """Nothing of it is on the device any more; its tokens stay."""
        self.slot, self.pages, self.uploaded, self.hashes = None, [], [], []
        self.num_computed = self.num_committed = self.num_published = self.in_flight = self.flights = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        """Tokens that are not in the pages yet, those still in flight included."""
        return len(self.tokens) + self.in_flight - self.num_computed

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def rank(self) -> tuple:
        """Who goes first: a smaller rank. Fixed at arrival, so an old request overtakes every newer one in time."""
        return (*self.request.rank, self.index)

    @property
    def next_prompt_logprob(self) -> int | None:
        """The first prompt position whose log-probability is still to be computed; None when there is none."""
        if self.params.prompt_logprobs is None or self.index:
            return None
        position = max(1, self.params.prompt_logprobs_start) + len(self.prompt_logprobs)
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
    sequences: list[Sequence] = field(default_factory=list)
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        for sequence in self.sequences:  # a loop: half the time of all(), and asked for every row of every step
            if sequence.finish_reason is None:
                return False
        return True


def allowed_mask(allowed: Seq[int] | None, banned: Seq[int], vocab_size: int) -> np.ndarray:
    """uint32 [ceil(vocab / 32)]: bit t % 32 of word t // 32 is set when token t may be drawn."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    if allowed is None:
        bits[:vocab_size] = 1
    else:
        bits[list(allowed)] = 1
    bits[list(banned)] = 0
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
