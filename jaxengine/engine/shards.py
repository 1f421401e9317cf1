"""One scheduler for each shard of the mesh's data axis, stepped together: to the engine they are one."""

from collections.abc import Sequence as Seq

from jaxengine.engine.scheduler import Scheduler, worth_several
from jaxengine.engine.sequence import Request, Sequence
from jaxengine.engine.slots import Rows, SlotTable

MAX_HOMES = 2**16  # pages of prompts whose shard is remembered


def together(schedulers: Seq[Scheduler]) -> "Scheduler | Shards":
    """What an engine needs of fresh schedulers that are made alike; a single one has no need of this module."""
    return schedulers[0] if len(schedulers) == 1 else Shards(schedulers)


class Shards:
    """A request is given to one shard when it arrives, and stays there with all its completions.

    Each shard has pages, slots and a prefix cache of its own. Slots are numbered through all shards, one after another.
    """

    def __init__(self, shards: Seq[Scheduler]):
        self.shards = shards
        self._homes: dict[bytes, int] = {}  # pages by hash: the shard that was last given a prompt with it, newest last
        self.restart(())

    def restart(self, sequences: Seq[Sequence]) -> None:
        """See Scheduler.restart."""
        one = self.shards[0]
        self.slots = SlotTable(
            len(self.shards) * one.max_num_seqs, len(one.groups), one.max_model_len, one.page_size, len(self.shards)
        )
        for i, (shard, slots) in enumerate(zip(self.shards, self.slots.shards, strict=True)):
            shard.restart([sequence for sequence in sequences if sequence.request.shard == i], slots)
        self._load = [0] * len(self.shards)  # tokens of prompts and outputs that have not ended
        for sequence in sequences:
            self._load[sequence.request.shard] += _size(sequence)

    # -- arrivals and departures

    def add(self, request: Request) -> None:
        request.shard = self._home(request.sequences[0])
        self._load[request.shard] += sum(map(_size, request.sequences))
        self.shards[request.shard].add(request)

    def _home(self, sequence: Sequence) -> int:
        """The shard with the longest prefix of the prompt, unless it is a full step behind; else the least loaded."""
        pages, least = self.shards[0].prompt_pages(sequence), min(self._load)
        homes = (self._homes[content] for content in reversed(pages) if content in self._homes)
        home = next(homes, None)
        if home is None or self._load[home] - least > self.shards[0].max_num_batched_tokens:
            home = self._load.index(least)
        for content in reversed(pages):  # a beginning is forgotten after what follows it
            self._homes.pop(content, None)
            self._homes[content] = home
        while len(self._homes) > MAX_HOMES:
            del self._homes[next(iter(self._homes))]
        return home

    def finish(self, sequence: Sequence, reason: str, stop: int | str | None = None) -> None:
        if not sequence.finished:
            self._load[sequence.request.shard] -= _size(sequence)
        self.shards[sequence.request.shard].finish(sequence, reason, stop)

    def hold(self) -> None:
        for shard in self.shards:
            shard.hold()

    def release(self) -> None:
        for shard in self.shards:
            shard.release()

    def change_weights(self, version: int) -> None:
        for shard in self.shards:
            shard.change_weights(version)
        self._homes.clear()

    @property
    def weight_version(self) -> int:
        return self.shards[0].weight_version

    @property
    def has_work(self) -> bool:
        return any(shard.has_work for shard in self.shards)

    def too_small(self, request: Request) -> tuple[int, int] | None:
        return self.shards[0].too_small(request)

    def reset_prefix_cache(self) -> None:
        for shard in self.shards:
            shard.reset_prefix_cache()
        self._homes.clear()

    # -- one step

    def schedule(self) -> Rows:
        """The rows of the next step, those of the first shard first. All shards run one program: if one of them has
        more to do than to draw, none draws several tokens."""
        demands = [shard.demand() for shard in self.shards]
        several = worth_several(demands, self.shards[0].steps_per_call)
        rows = [shard.grant(demand, several) for shard, demand in zip(self.shards, demands, strict=True)]
        return Rows.join([part.moved(i * self.shards[0].max_num_seqs) for i, part in enumerate(rows)])

    def land(self, rows: Rows) -> None:
        for shard, (own, _) in zip(self.shards, self.slots.split(rows), strict=True):
            shard.land(own)

    def check_integrity(self) -> None:
        """Raises AssertionError as Scheduler.check_integrity does, and for a load that is counted wrongly."""
        for i, (shard, load) in enumerate(zip(self.shards, self._load, strict=True)):
            shard.check_integrity()
            unfinished = [sequence for sequence in [*shard.running, *shard.waiting()] if not sequence.finished]
            assert all(sequence.request.shard == i for sequence in unfinished)
            assert load == sum(map(_size, unfinished)), "a shard's load"


def _size(sequence: Sequence) -> int:
    """Tokens that it may take, computed ones too: a number that never changes."""
    return sequence.num_prompt + sequence.request.max_tokens
