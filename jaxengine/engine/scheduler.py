"""Who runs next, with how many tokens, on which pages: a pure function of its own state and the arrivals."""

import heapq
from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from jaxengine.engine.page_pool import PagePool, page_hash
from jaxengine.engine.sequence import Request, Sequence
from jaxengine.engine.slots import Rows, SlotTable, spread
from jaxengine.errors import ConfigError
from jaxengine.kv_cache import CacheGroup
from jaxengine.step import MODES

MAX_DEFERRED = 64  # waiting sequences that one step finds to share a prefix that is being computed: each is hashed


@dataclass(frozen=True, slots=True)
class Demand:
    """What running sequences could compute in the next step, by rank."""

    slots: np.ndarray
    count: np.ndarray  # tokens of each
    room: np.ndarray  # tokens that its pages have place for
    chunks: np.ndarray  # the places of those that compute several known tokens
    budget: int  # tokens that are left to who is admitted
    several: np.ndarray | None  # tokens of each if it draws them in one call; None: that must not be


def worth_several(demands: Seq[Demand], steps: int) -> bool:
    """Do all of them allow that so many tokens are drawn in one call, and does one have so many left?"""
    several = [demand.several for demand in demands if demand.several is not None]
    return len(several) == len(demands) and max(count.max(initial=0) for count in several) >= max(2, steps)


class Scheduler:
    """Continuous batching over paged memory.

    Running sequences go first, in the order of their rank, single tokens before chunks; then waiting ones are admitted.
    When pages run out the lowest rank gives up its own and starts again later (preemption by recompute); it is never
    taken from a step in flight: who needs its pages waits until that step has landed.
    """

    def __init__(
        self,
        groups: Seq[CacheGroup],
        num_pages: Seq[int],
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        priority_aging_steps: int = 256,
        steps_per_call: int = 1,
    ):
        if max_num_seqs > max_num_batched_tokens:
            raise ConfigError(
                f"{max_num_seqs=} must be at most {max_num_batched_tokens=}: each running sequence gets a token a step"
            )
        self.groups, self.num_pages, self.max_num_seqs = groups, num_pages, max_num_seqs
        self._windowed = [(g, group) for g, group in enumerate(groups) if group.window is not None]
        self.page_size, self.max_num_batched_tokens = page_size, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_prefix_caching, self.priority_aging_steps = enable_prefix_caching, priority_aging_steps
        self.steps_per_call = steps_per_call
        self.weight_version = 0
        self._held: list[Sequence] | None = None  # arrivals that wait for other weights; None: they need not
        self._steps = self._arrivals = 0
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0
        self.restart(())

    @property
    def shards(self) -> Seq["Scheduler"]:
        return (self,)

    def restart(self, sequences: Seq[Sequence], slots: SlotTable | None = None) -> None:
        """Forgets pages, slots and flights, whatever state they are in: these sequences wait, and nothing runs.

        slots: empty ones, where they are part of a larger table.
        """
        for sequence in sequences:
            sequence.leave()
        self.pools = [PagePool(count) for count in self.num_pages]
        self.slots = slots or SlotTable(self.max_num_seqs, len(self.groups), self.max_model_len, self.page_size)
        self.running: list[Sequence] = []  # by rank
        self.draining: set[int] = set()  # slots whose sequence is finished, but which a flight names
        self._ranked: np.ndarray | None = None  # the slots of `running`; None: they have changed
        self.num_waiting = 0
        self._waiting: list[tuple[tuple, Sequence]] = []  # heap by rank; finished ones are passed over
        self._computing: dict[bytes, Sequence] = {}  # prompt pages that a running sequence is computing just now
        self._deferred: dict[bytes, list[Sequence]] = {}  # waiting, by the page they wait for, one of these
        held = set(self._held or ())
        self.num_waiting += sum(sequence in held for sequence in sequences)
        for sequence in sequences:
            if sequence not in held:
                self._wait(sequence)

    # -- arrivals and departures

    def add(self, request: Request) -> None:
        """Queues every sequence of the request. One unit of priority outweighs `priority_aging_steps` of waiting."""
        assert len(request.prompt_token_ids) + (request.max_tokens or -1) <= self.max_model_len
        request.rank = (request.priority * self.priority_aging_steps + self._steps, self._arrivals)
        self._arrivals += 1
        for sequence in request.sequences:
            if self._held is None:
                self._wait(sequence)
            else:
                self.num_waiting += 1
                self._held.append(sequence)

    def _wait(self, sequence: Sequence) -> None:
        self.num_waiting += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def finish(self, sequence: Sequence, reason: str, stop: int | str | None = None) -> None:
        """Ends a sequence wherever it is; what it holds is free as soon as no flight names it."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop
        if sequence.slot is None:
            self.num_waiting -= 1
            return
        slot = self._leave(sequence)
        if self.slots.flights[slot]:
            self.draining.add(slot)
        else:
            self._free(slot)

    def hold(self) -> None:
        """Who arrives from now on is not admitted before `release`, or other weights."""
        self._held = []

    def release(self) -> None:
        held, self._held = self._held or [], None
        for sequence in held:
            if not sequence.finished:
                heapq.heappush(self._waiting, (sequence.rank, sequence))

    def change_weights(self, version: int) -> None:
        """No flight is on its way. What runs gives up its pages: none ever holds what two versions wrote."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.weight_version = version
        self.release()
        self.reset_prefix_cache()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.draining or self.num_waiting)

    def too_small(self, request: Request) -> tuple[int, int] | None:
        """None when the request can run alone; else the pages it needs in the first group with fewer, and those."""
        last = request.max_tokens + len(request.prompt_token_ids) - 1  # the last token is drawn, not computed
        for group, count in zip(self.groups, self.num_pages, strict=True):
            tokens = last if group.window is None else min(last, group.window + self.max_num_batched_tokens)
            pages = -(-tokens // self.page_size) + (group.window is not None and tokens < last)
            if pages > count - 1:
                return pages, count - 1
        return None

    # -- one step

    def schedule(self) -> Rows:
        """The rows of the next step; empty when nothing can run before a flight lands."""
        demand = self.demand()
        return self.grant(demand, worth_several([demand], self.steps_per_call))

    def demand(self) -> Demand:
        table, slots = self.slots, self._slots_by_rank()
        missing = (table.num_drawn - table.num_computed)[slots]  # tokens to compute, one at least
        room = (table.columns * self.page_size - table.num_computed)[slots]
        waits = table.needs_last_token & (table.num_drawn > table.num_tokens)
        count = missing.copy()
        count[(waits | (table.num_drawn >= table.end))[slots]] = 0
        chunks = (missing > 1).nonzero()[0]
        budget = self.max_num_batched_tokens - (len(slots) - len(chunks))
        for i in chunks:
            count[i] = min(missing[i], budget)
            budget -= int(count[i])
        several = None if len(chunks) or self.steps_per_call == 1 else self._several_steps(slots, count > 0, room)
        return Demand(slots, count, room, chunks, budget, several)

    def grant(self, demand: Demand, several: bool) -> Rows:
        """The rows of the next step, and the pages that they need. `several`: they draw `steps_per_call` tokens."""
        self._steps += 1
        slots, room, chunks, budget = demand.slots, demand.room, demand.chunks, demand.budget
        count = demand.several if several and demand.several is not None else demand.count
        number = self._reserve(slots, count - room)
        runs = count[:number].nonzero()[0]
        chosen, tokens = slots[runs], count[runs]
        if number == len(self.running):  # else the lower ranks land first, then they can be preempted
            for i in chunks[chunks >= number]:  # who is preempted now
                budget += int(count[i])
            if admitted := list(self._admissions(budget)):
                chosen = np.append(chosen, [slot for slot, _ in admitted])
                tokens = np.append(tokens, [count for _, count in admitted])
        return self._advance(chosen, tokens, self.steps_per_call if several else 1)

    def _several_steps(self, slots: np.ndarray, runs: np.ndarray, room: np.ndarray) -> np.ndarray | None:
        """Tokens of each slot when those that run draw `steps_per_call` ones, or all they have left, in one call.

        None where only a single step can be: somebody could be admitted, a row does more than draw, there are no pages.
        """
        table = self.slots
        left = (table.end - table.num_drawn)[slots]
        plain = (table.num_drawn >= table.num_tokens)[slots] & (table.mode < MODES.index("everything"))[slots]
        count = np.where(runs, np.minimum(left, self.steps_per_call), 0)
        admits = self.num_waiting > 0 and len(self.slots.free) > 0
        if admits or not plain[runs].all():
            return None
        pages = -(-np.maximum(count - room, 0) // self.page_size)
        return count if pages.sum() <= self._num_free else None

    def _slots_by_rank(self) -> np.ndarray:
        if self._ranked is None:
            self._ranked = np.array([sequence.slot for sequence in self.running], int)
        return self._ranked

    def _advance(self, slots: np.ndarray, count: np.ndarray, steps: int) -> Rows:
        table = self.slots
        start, drawn = table.num_computed[slots], table.num_drawn[slots]
        end = start + count
        complete = end >= drawn
        samples = complete & (drawn >= table.num_tokens[slots])  # else the next token is known
        table.num_computed[slots] = end
        table.num_drawn[slots] = np.where(complete, end + 1, drawn)
        table.flights[slots] += 1
        return Rows(slots, start, count, samples, steps)

    def _reserve(self, slots: np.ndarray, tokens: np.ndarray) -> int:
        """Pages for so many more tokens of the slots by rank, taken from the lowest ranks if need be.

        Returns how many of the slots may run: the others are preempted, or wait until a flight lands.
        """
        wanting = (tokens > 0).nonzero()[0]
        while len(wanting):
            columns = -(-tokens[wanting] // self.page_size)
            fitting = np.count_nonzero(columns.cumsum() <= self._num_free)
            self._allocate(slots[wanting[:fitting]], columns[:fitting])
            wanting = wanting[fitting:]
            if len(wanting):
                victim = self.running[-1]
                if wanting[0] == len(self.running) - 1 or self.slots.flights[victim.slot]:
                    return int(wanting[0])
                self._preempt(victim)
                wanting = wanting[wanting < len(self.running)]
        return len(self.running)

    @property
    def _num_free(self) -> int:
        return min(pool.num_free for pool in self.pools)

    def _allocate(self, slots: np.ndarray, columns: np.ndarray) -> None:
        column, owner = spread(self.slots.columns[slots], columns)
        for table, pool in zip(self.slots.pages, self.pools, strict=True):
            pages = pool.allocate(len(owner))
            assert pages is not None
            table[slots[owner], column] = pages
        self.slots.columns[slots] += columns

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with nothing; its tokens are kept and computed again."""
        self._free(self._leave(sequence))
        sequence.preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _leave(self, sequence: Sequence) -> int:
        slot = sequence.slot
        assert slot is not None
        self._stop_computing(sequence)
        self.running.remove(sequence)
        self._ranked = None
        sequence.leave()
        return slot

    def _free(self, slot: int) -> None:
        for pool, table in zip(self.pools, self.slots.pages, strict=True):
            pool.release(table[slot, : self.slots.columns[slot]].tolist())
        self.slots.columns[slot], self.slots.sequence[slot] = 0, None
        self.slots.free.append(slot)

    # -- admission

    def _admissions(self, budget: int) -> Iterator[tuple[int, int]]:
        """(slot, tokens to compute) of each."""
        deferred = 0
        while self._waiting and self.slots.free and budget > 0 and deferred < MAX_DEFERRED:
            _, sequence = self._waiting[0]
            if sequence.finished:
                heapq.heappop(self._waiting)
                continue
            if self._num_free <= len(self.running):
                break  # as `_take` would find, but before any page is looked up
            hit, limit = self._cached_pages(sequence)
            if awaited := self._computed_elsewhere(sequence, hit, limit):
                heapq.heappop(self._waiting)
                self._deferred.setdefault(awaited, []).append(sequence)
                deferred += 1
                continue
            count = self._take(sequence, hit, budget)
            if count == 0:
                break
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            budget -= count
            assert sequence.slot is not None
            yield sequence.slot, count

    def _take(self, sequence: Sequence, hit: int, budget: int) -> int:
        """Shares the first `hit` pages and allocates the rest of the first chunk; 0 when there is no room."""
        shared = [self._hit_pages(group, g, sequence, hit) for g, group in enumerate(self.groups)]
        for pool, pages in zip(self.pools, shared, strict=True):
            pool.share(pages)
        num_cached = hit * self.page_size
        count = min(sequence.num_needed - num_cached, budget)
        columns = -(-(num_cached + count) // self.page_size)
        if columns - hit + len(self.running) > self._num_free:  # room for a page each: less preemption
            for pool, pages in zip(self.pools, shared, strict=True):
                pool.release(pages)
            return 0
        assert count > 0, sequence
        table, slot = self.slots, self.slots.free.pop()
        for own, pages in zip(table.pages, shared, strict=True):
            own[slot, :hit] = pages
        table.columns[slot] = table.num_published[slot] = hit
        self._allocate(np.array([slot]), np.array([columns - hit]))
        sequence.enter(table, slot, num_cached)
        if sequence.preemptions == 0:
            sequence.num_cached = num_cached
        if self.enable_prefix_caching:
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += num_cached
        for content in sequence.hashes[hit : sequence.num_prompt // self.page_size]:
            self._computing.setdefault(content, sequence)
        insort(self.running, sequence, key=attrgetter("rank"))
        self._ranked = None
        return count

    # -- the prefix cache

    def prompt_pages(self, sequence: Sequence) -> Seq[bytes]:
        """The hashes of those pages of a waiting sequence that could be in the cache; none without a cache."""
        if self.enable_prefix_caching:
            self._hash(sequence, (sequence.num_needed - 1) // self.page_size)
        return sequence.hashes

    def _cached_pages(self, sequence: Sequence) -> tuple[int, int]:
        """How many leading pages lie in the cache, in every group that a next token would look at; how many may."""
        if not self._shares_pages(sequence):
            return 0, 0
        limit = (sequence.num_needed - 1) // self.page_size  # something must be left to compute: it has the logits
        self._hash(sequence, limit)
        if (position := sequence.next_prompt_logprob) is not None:
            limit = min(limit, (position - 1) // self.page_size)
        count = limit
        for group, pool in zip(self.groups, self.pools, strict=True):
            if group.window is None:
                count = next((i for i in range(count) if pool.find(sequence.hashes[i]) is None), count)
        while count and (gap := self._gap(sequence, count)) is not None:
            count = gap  # every longer prefix has the gap within its window too
        return count, limit

    def _gap(self, sequence: Sequence, count: int) -> int | None:
        """The last page that a token behind the first `count` pages would look at in vain, in groups with a window."""
        for g, group in self._windowed:
            for i in reversed(range(self._first_visible_page(group, count * self.page_size), count)):
                if self.pools[g].find(sequence.hashes[i]) is None:
                    return i
        return None

    def _hit_pages(self, group: CacheGroup, g: int, sequence: Sequence, count: int) -> list[int]:
        first = self._first_visible_page(group, count * self.page_size)
        found = [self.pools[g].find(content) for content in sequence.hashes[first:count]]
        return [0] * first + [page for page in found if page is not None]

    def _first_visible_page(self, group: CacheGroup, position: int) -> int:
        """The first page that a token at `position` attends to."""
        return 0 if group.window is None else max(0, position - group.window + 1) // self.page_size

    def _computed_elsewhere(self, sequence: Sequence, hit: int, limit: int) -> bytes | None:
        """The last of the pages behind the hit that others are computing just now."""
        awaited = None
        for content in sequence.hashes[hit:limit]:
            if content not in self._computing:
                break
            awaited = content
        return awaited

    def _shares_pages(self, sequence: Sequence) -> bool:
        return self.enable_prefix_caching or sequence.params.n > 1

    def _hash(self, sequence: Sequence, count: int) -> None:
        """Hashes the first `count` pages; the hash holds the weights' version and, without a cache, the request."""
        if len(sequence.hashes) >= count:
            return
        salt = b"" if self.enable_prefix_caching else sequence.request.request_id.encode()
        extra = self.weight_version.to_bytes(8, "little") + sequence.request.cache_salt + salt
        parent, first = sequence.hashes[-1] if sequence.hashes else bytes(16), len(sequence.hashes)
        tokens = sequence.tokens[first * self.page_size : count * self.page_size]
        content, size = tokens.tobytes(), self.page_size * tokens.itemsize
        for start in range(0, len(content), size):
            parent = page_hash(parent, content[start : start + size], extra)
            sequence.hashes.append(parent)

    def _stop_computing(self, sequence: Sequence) -> None:
        for content in sequence.hashes[self.slots.num_published[sequence.slot] : sequence.num_prompt // self.page_size]:
            self._computed(sequence, content)

    def _computed(self, sequence: Sequence, content: bytes) -> None:
        """The sequence has computed this page, or never will: who waited for it looks again."""
        if self._computing.get(content) is sequence:
            del self._computing[content]
            for waiter in self._deferred.pop(content, ()):
                heapq.heappush(self._waiting, (waiter.rank, waiter))

    def reset_prefix_cache(self) -> None:
        for pool in self.pools:
            pool.forget_cached()
        for _, sequence in self._waiting:
            sequence.hashes.clear()
        for sequences in self._deferred.values():
            for sequence in sequences:
                sequence.hashes.clear()

    # -- landing

    def land(self, rows: Rows) -> None:
        """A step has landed: publishes its rows' full pages, gives back those behind a window."""
        table, slots = self.slots, rows.slots
        # Without what was drawn after a stop token.
        committed = np.minimum(rows.start + rows.count, table.num_tokens[slots])
        table.flights[slots] -= 1
        live = table.live[slots]
        for slot in slots[~live].tolist():
            if table.flights[slot] == 0:
                self.draining.remove(slot)
                self._free(slot)
        filled = (live & (committed >= ((table.num_published + 1) * self.page_size)[slots])).nonzero()[0]
        for slot, end in zip(slots[filled].tolist(), (committed[filled] // self.page_size).tolist(), strict=True):
            self._publish(slot, end)
        for g, group in self._windowed:
            first, pages = np.maximum(committed - group.window + 1, 0) // self.page_size, table.pages[g]
            behind = (live & (first > 0) & (pages[slots, first - 1] > 0)).nonzero()[0]
            for slot, end in zip(slots[behind].tolist(), first[behind].tolist(), strict=True):
                given_back = pages[slot, :end].nonzero()[0]
                self.pools[g].release(pages[slot, given_back].tolist())
                pages[slot, given_back] = 0

    def _publish(self, slot: int, end: int) -> None:
        """Offers the slot's pages before this one to the prefix cache."""
        table, sequence = self.slots, self.slots.sequence[slot]
        first, table.num_published[slot] = table.num_published[slot], end
        if self._shares_pages(sequence):
            self._hash(sequence, end)
            contents = sequence.hashes[first:end]
            for pool, pages in zip(self.pools, table.pages[:, slot, first:end].tolist(), strict=True):
                pool.publish(pages, contents)
            for content in contents:
                self._computed(sequence, content)

    def waiting(self) -> list[Sequence]:
        """In no order; some may have ended."""
        deferred = [sequence for sequences in self._deferred.values() for sequence in sequences]
        return [sequence for _, sequence in self._waiting] + deferred + (self._held or [])

    def check_integrity(self) -> None:
        """Raises AssertionError when a page, a slot or a sequence is lost, held twice, or counted wrongly."""
        table, running = self.slots, self._slots_by_rank().tolist()
        held = [*running, *self.draining]
        for g, pool in enumerate(self.pools):
            pool.check_integrity(page for slot in held for page in table.pages[g, slot, : table.columns[slot]].tolist())
        assert sorted([*table.free, *held]) == list(range(self.max_num_seqs))
        assert self.running == sorted(self.running, key=attrgetter("rank"))
        assert running == [sequence.slot for sequence in self.running]
        assert all(table.sequence[s.slot] is s and not s.finished for s in self.running)
        assert all(table.sequence[slot].finished and table.flights[slot] for slot in self.draining)
        assert sorted(np.flatnonzero(table.live).tolist()) == sorted(running)
        for slot in running:
            assert table.num_computed[slot] <= table.columns[slot] * self.page_size
            assert table.num_computed[slot] < table.num_drawn[slot] <= table.end[slot]
            assert 0 <= table.in_flight(slot) <= table.flights[slot] * self.steps_per_call
        assert all(content in s.hashes and s in self.running for content, s in self._computing.items())
        assert self._deferred.keys() <= self._computing.keys()
        waiting = self.waiting()
        assert len(set(waiting)) == len(waiting) and not any(s.slot is not None for s in waiting)
        assert self.num_waiting == sum(not s.finished for s in waiting), "a waiting sequence is lost"
