"""What the host knows of running sequences, in arrays by device slot: a step costs no Python for each row."""

from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass, replace

import numpy as np


@dataclass(eq=False, slots=True)
class Rows:
    """Rows of a step: `count` tokens of each slot from `start` on; `samples` when they reach the sequence's end.

    With several `steps` each row draws as many tokens as it computes, one after another.
    """

    slots: np.ndarray  # int [rows]
    start: np.ndarray
    count: np.ndarray
    samples: np.ndarray  # bool [rows]
    steps: int = 1

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: np.ndarray) -> "Rows":
        return Rows(self.slots[index], self.start[index], self.count[index], self.samples[index], self.steps)

    def moved(self, slots: int) -> "Rows":
        """The same of slots whose numbers are so much larger."""
        return replace(self, slots=self.slots + slots)

    @staticmethod
    def join(parts: Seq["Rows"]) -> "Rows":
        """Those of all parts, one after another; in all of them `steps` are the same."""
        arrays = zip(*((part.slots, part.start, part.count, part.samples) for part in parts), strict=True)
        slots, start, count, samples = map(np.concatenate, arrays)
        return Rows(slots, start, count, samples, parts[0].steps)


class SlotTable:
    """A slot belongs to one sequence until no flight names it any more.

    tokens     [ prompt ............ | output ..... ]
    drawn      ------------------------------------------>|  those that the host has not seen yet included
    computed   -------------------------------------->|      in the pages once every flight has landed

    Where nothing is to be drawn, the prompt's last token counts as the next one, which is known: it is not computed.

    Pages of all cache groups have the same columns; page 0 lies behind a window, given back.

    Of several `shards` of a data axis each has as many slots: it sees them in a table of its own over the same memory.
    """

    def __init__(self, num_slots: int, num_groups: int, max_model_len: int, page_size: int, shards: int = 1):
        def zeros(dtype: type = np.int64) -> np.ndarray:
            return np.zeros(num_slots, dtype)

        self.free = list(range(num_slots - 1, -1, -1))
        self.sequence = np.full(num_slots, None, object)
        self.live = zeros(bool)  # its sequence runs; a slot that is neither live nor free drains
        # Memory is touched where it is used only.
        self.tokens = np.zeros((num_slots, max_model_len + 1), np.int32)  # the last: a target only
        self.pages = np.zeros((num_groups, num_slots, -(-max_model_len // page_size)), np.int32)
        self.num_tokens, self.num_drawn, self.num_computed = zeros(), zeros(), zeros()
        self.end = zeros()  # tokens of prompt and output when it has all of them
        self.flights = zeros()  # steps that name the slot and have not landed
        self.columns = zeros()  # of the page table that have their page
        self.uploaded = zeros()  # of them on the device; 0: nothing of the slot is there yet
        self.num_published = zeros()  # pages that were offered to the prefix cache
        self.last_token_time = zeros(float)  # 0: no token since it runs
        self.mode = zeros()  # the program it needs when it samples, by its place among step.MODES
        self.needs_last_token = zeros(bool)
        self.edits_logits = zeros(bool)
        self.asks_prompt = zeros(bool)  # log-probabilities of its prompt are still missing
        self.followed = zeros(bool)  # somebody waits for each of its tokens: Python looks at them all
        # Python looks at its next token: it is followed, or this is the first since it runs.
        self.attended = zeros(bool)
        size = num_slots // shards
        self.shards = [self._part(shard * size, size) for shard in range(shards)] if shards > 1 else []

    def _part(self, first: int, count: int) -> "SlotTable":
        part = copy(self)
        part.free, part.shards = list(range(count - 1, -1, -1)), []
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                setattr(part, name, array[..., first : first + count, :] if name == "pages" else array[first:][:count])
        return part

    def split(self, rows: Rows) -> list[tuple[Rows, "SlotTable"]]:
        """Rows in the order of their shards: those of each, which counts slots from 0, and its table."""
        if not self.shards:
            return [(rows, self)]
        size = len(self.live) // len(self.shards)
        edges = np.searchsorted(rows.slots // size, np.arange(len(self.shards) + 1))
        return [
            (rows[np.arange(edges[i], edges[i + 1])].moved(-i * size), shard) for i, shard in enumerate(self.shards)
        ]

    def append(self, slots: np.ndarray, tokens: np.ndarray, counts: np.ndarray, now: float) -> None:
        """The first counts[i] of tokens[i] were in flight for slots[i] and are known now."""
        place, owner = spread(self.num_tokens[slots], counts)
        self.tokens[slots[owner], place] = tokens[np.arange(tokens.shape[1]) < counts[:, None]]
        self.num_tokens[slots] += counts
        self.last_token_time[slots] = now

    def in_flight(self, slot: int) -> int:
        """Tokens that were drawn, or will be by a step on its way, and that the host has not seen."""
        return max(0, int(self.num_drawn[slot] - self.num_tokens[slot]))

    def known(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The tokens at these positions; -1: still on the device, the slot's last token."""
        tokens = self.tokens[slots, positions]
        tokens[positions >= self.num_tokens[slots]] = -1
        return tokens


def spread(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers first[i] ... first[i] + count[i] - 1 of every i, one after another, and the i of each."""
    owner = np.arange(len(count)).repeat(count)
    return np.arange(len(owner)) + (first - count.cumsum() + count)[owner], owner
