"""Pages of one cache group: reference counts, prefix hashes, least-recently-used eviction.

A page is *used* (some sequence refers to it), *cached* (nobody does, but its content has a hash and may be used again)
or *free*. Allocation takes free pages first, then evicts the cached page that was let go longest ago.

            allocate                    release, unhashed
    free ────────────▶ used ──────────────────────────▶ free
                       ▲  │ release, hashed
                 share │  ▼
                      cached ── evicted by allocate ──▶ used
"""

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b


def page_hash(parent: bytes, tokens: bytes, extra: bytes) -> bytes:
    """The hash of a page's content (its token ids' bytes) and of all that came before it."""
    return blake2b(parent + extra + tokens, digest_size=16).digest()


class PagePool:
    """Page ids 1 to `num_pages - 1`; 0 is the null page and belongs to nobody."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold."""
        return 1 - self.num_free / max(1, self.num_pages - 1)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and nothing changes) when there are not so many."""
        if count > self.num_free:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def find(self, content: bytes) -> int | None:
        """The page with this hash, used or cached."""
        return self._page_of.get(content)

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page (a cached page becomes used); the null page is passed over."""
        for page in pages:
            if page:
                self._references[page] += 1
                self._cached.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each page; the last ones are evicted first: a prefix is worth more than its end."""
        for page in reversed(list(pages)):
            if not page:
                continue
            assert self._references[page] > 0, f"page {page} released more often than taken"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def publish(self, pages: Iterable[int], contents: Iterable[bytes]) -> None:
        """Names full pages' contents, so that others can share them; the first page with a content keeps the name. The
        null page is passed over.
        """
        page_of, hash_of = self._page_of, self._hash_of
        for page, content in zip(pages, contents, strict=True):
            if page and content not in page_of and page not in hash_of:
                page_of[content], hash_of[page] = page, content

    def forget_cached(self) -> None:
        """Drops every hash: no page written until now will be shared again."""
        self._hash_of.clear()
        self._page_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raises AssertionError unless `held` (every page of every sequence, repeated) is exactly what is counted."""
        counts = [0] * self.num_pages
        for page in held:
            counts[page] += page != 0
        assert counts == self._references, "reference counts differ from what the sequences hold"
        free, cached = set(self._free), set(self._cached)
        used = {page for page, count in enumerate(counts) if count}
        assert len(free) == len(self._free) and not (free & cached) and not (free & used) and not (cached & used)
        assert free | cached | used == set(range(1, self.num_pages)), "a page is lost"
        assert cached <= set(self._hash_of) and not (free & set(self._hash_of))
        assert self._page_of == {content: page for page, content in self._hash_of.items()}
