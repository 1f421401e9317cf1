"""Who runs next, with how many tokens, on which pages: a pure function of its own state and the arrivals."""

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from jaxengine.engine.page_pool import PagePool, page_hash
from jaxengine.engine.sequence import Request, Sequence
from jaxengine.errors import ConfigError
from jaxengine.kv_cache import CacheGroup

MAX_DEFERRED = 64  # waiting sequences that one step finds to share a prefix that is being computed: each is hashed


@dataclass(eq=False, slots=True)
class Row:
    """`count` tokens of a sequence from `start` on; `samples` when they reach its end, so that a new token is drawn."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


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
        enable_prefix_caching: bool = True,
        priority_aging_steps: int = 256,
    ):
        if max_num_seqs > max_num_batched_tokens:
            raise ConfigError(
                f"{max_num_seqs=} must be at most {max_num_batched_tokens=}: each running sequence gets a token a step"
            )
        self.groups, self.num_pages, self.max_num_seqs = groups, num_pages, max_num_seqs
        self._windowed = [(g, group) for g, group in enumerate(groups) if group.window is not None]
        self.page_size, self.max_num_batched_tokens = page_size, max_num_batched_tokens
        self.enable_prefix_caching, self.priority_aging_steps = enable_prefix_caching, priority_aging_steps
        self.weight_version = 0  # who changes it calls `reset_prefix_cache` next
        self._steps = self._arrivals = 0
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0
        self.restart(())

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Forgets pages, slots and flights, whatever state they are in: these sequences wait, and nothing runs."""
        self.pools = [PagePool(count) for count in self.num_pages]
        self.running: list[Sequence] = []  # by rank
        self.draining: list[Sequence] = []  # finished, but named by a flight
        self.num_waiting = 0
        self._waiting: list[tuple[tuple, Sequence]] = []  # heap by rank; finished ones are passed over
        self._slots = list(range(self.max_num_seqs - 1, -1, -1))
        self._computing: dict[bytes, Sequence] = {}  # prompt pages that a running sequence is computing just now
        self._deferred: dict[bytes, list[Sequence]] = {}  # waiting, by the page they wait for, one of these
        for sequence in sequences:
            sequence.clear()
            self._wait(sequence)

    # -- arrivals and departures

    def add(self, request: Request) -> None:
        """Queues every sequence of the request. One unit of priority outweighs `priority_aging_steps` of waiting."""
        request.rank = (request.priority * self.priority_aging_steps + self._steps, self._arrivals)
        self._arrivals += 1
        for sequence in request.sequences:
            self._wait(sequence)

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
        self._stop_computing(sequence)
        self.running.remove(sequence)
        self.draining.append(sequence)
        self._free_if_landed(sequence)

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

    def schedule(self) -> list[Row]:
        """The rows of the next step; empty when nothing can run before a flight lands."""
        self._steps += 1
        rows: list[Row] = []
        budget = self.max_num_batched_tokens - sum(s.num_to_compute == 1 for s in self.running)
        for sequence in list(self.running):
            if sequence.slot is None or not self._may_step(sequence):
                continue
            count = sequence.num_to_compute
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                if not self._reserve(sequence, count):
                    return rows  # the lower ranks land first, then they can be preempted
                rows.append(self._advance(sequence, count))
        rows.extend(self._advance(*admitted) for admitted in self._admissions(budget))
        return rows

    def _may_step(self, sequence: Sequence) -> bool:
        request = sequence.request
        if len(sequence.tokens) + sequence.in_flight - sequence.num_prompt >= request.max_tokens:
            return False  # all its tokens are drawn
        return not (sequence.in_flight and request.needs_last_token)

    def _advance(self, sequence: Sequence, count: int) -> Row:
        row = Row(sequence, sequence.num_computed, count, count == sequence.num_to_compute)
        sequence.num_computed += count
        sequence.in_flight += row.samples
        sequence.flights += 1
        return row

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens, taken from the lowest ranks if need be; False: not before a flight lands."""
        while not self._allocate(sequence, count):
            victim = self.running[-1]
            if victim is sequence or victim.flights:
                return False
            self._preempt(victim)
        return True

    def _allocate(self, sequence: Sequence, count: int, spare: int = 0) -> bool:
        columns = -(-(sequence.num_computed + count) // self.page_size)
        missing = columns - len(sequence.pages[0])  # the same in every group: pages behind a window keep their column
        if missing <= 0:
            return True
        if any(missing + spare > pool.num_free for pool in self.pools):
            return False
        for pages, pool in zip(sequence.pages, self.pools, strict=True):
            pages.extend(pool.allocate(missing) or ())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with nothing; its tokens are kept and computed again."""
        self._stop_computing(sequence)
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pool.release(pages)
        assert sequence.slot is not None
        self._slots.append(sequence.slot)
        sequence.clear()

    # -- admission

    def _admissions(self, budget: int) -> Iterator[tuple[Sequence, int]]:
        deferred = 0
        while self._waiting and self._slots and budget > 0 and deferred < MAX_DEFERRED:
            _, sequence = self._waiting[0]
            if sequence.finished:
                heapq.heappop(self._waiting)
                continue
            if any(pool.num_free <= len(self.running) for pool in self.pools):
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
            yield sequence, count

    def _take(self, sequence: Sequence, hit: int, budget: int) -> int:
        """Shares the first `hit` pages and allocates the rest of the first chunk; 0 when there is no room."""
        shared = [self._hit_pages(group, g, sequence, hit) for g, group in enumerate(self.groups)]
        for pool, pages in zip(self.pools, shared, strict=True):
            pool.share(pages)
        sequence.pages, sequence.num_computed = shared, hit * self.page_size
        count = min(sequence.num_to_compute, budget)
        if not self._allocate(sequence, count, spare=len(self.running)):  # room for a page each: less preemption
            for pool, pages in zip(self.pools, shared, strict=True):
                pool.release(pages)
            sequence.pages, sequence.num_computed = [], 0
            return 0
        sequence.slot, sequence.fresh_slot = self._slots.pop(), True
        sequence.uploaded = [0] * len(self.groups)
        sequence.num_committed, sequence.num_published = sequence.num_computed, hit
        if sequence.preemptions == 0:
            sequence.num_cached = sequence.num_computed
        if self.enable_prefix_caching:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.num_computed
        for content in sequence.hashes[hit : sequence.num_prompt // self.page_size]:
            self._computing.setdefault(content, sequence)
        insort(self.running, sequence, key=attrgetter("rank"))
        return count

    # -- the prefix cache

    def _cached_pages(self, sequence: Sequence) -> tuple[int, int]:
        """How many leading pages lie in the cache, in every group that a next token would look at; how many may."""
        if not self._shares_pages(sequence):
            return 0, 0
        limit = (len(sequence.tokens) - 1) // self.page_size  # the last token must be computed: it has the logits
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
        for i in range(len(sequence.hashes), count):
            parent = sequence.hashes[-1] if sequence.hashes else bytes(16)
            tokens = sequence.tokens[i * self.page_size : (i + 1) * self.page_size]
            sequence.hashes.append(page_hash(parent, tokens, extra))

    def _stop_computing(self, sequence: Sequence) -> None:
        for content in sequence.hashes[sequence.num_published : sequence.num_prompt // self.page_size]:
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

    def land(self, row: Row) -> None:
        """A step with this row has landed: publishes its full pages, gives back those behind the window."""
        sequence = row.sequence
        sequence.flights -= 1
        if sequence.finished:
            self._free_if_landed(sequence)
            return
        sequence.num_committed = row.start + row.count
        full = sequence.num_committed // self.page_size
        if full > sequence.num_published and self._shares_pages(sequence):
            self._hash(sequence, full)
            for i in range(sequence.num_published, full):
                for pool, pages in zip(self.pools, sequence.pages, strict=True):
                    if pages[i]:
                        pool.publish(pages[i], sequence.hashes[i])
                self._computed(sequence, sequence.hashes[i])
            sequence.num_published = full
        for g, group in self._windowed:
            pages = sequence.pages[g]
            for i in reversed(range(self._first_visible_page(group, sequence.num_committed))):
                if pages[i] == 0:
                    break
                self.pools[g].release([pages[i]])
                pages[i] = 0

    def _free_if_landed(self, sequence: Sequence) -> None:
        if sequence.flights == 0:
            self.draining.remove(sequence)
            self._give_back(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError when a page, a slot or a sequence is lost, held twice, or counted wrongly."""
        holders = self.running + self.draining
        for g, pool in enumerate(self.pools):
            pool.check_integrity(page for sequence in holders for page in sequence.pages[g])
        assert sorted([*self._slots, *(s.slot for s in holders if s.slot is not None)]) == list(
            range(self.max_num_seqs)
        )
        assert self.running == sorted(self.running, key=attrgetter("rank"))
        assert not any(s.finished for s in self.running) and all(s.finished and s.flights for s in self.draining)
        assert all(content in s.hashes and s in self.running for content, s in self._computing.items())
        assert self._deferred.keys() <= self._computing.keys()
        waiting = [s for _, s in self._waiting] + [s for deferred in self._deferred.values() for s in deferred]
        assert len(set(waiting)) == len(waiting) and not any(s.slot is not None or s.pages for s in waiting)
        assert self.num_waiting == sum(not s.finished for s in waiting), "a waiting sequence is lost"
