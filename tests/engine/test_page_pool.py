"""Pages: reference counts, names, least-recently-used eviction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine.page_pool import PagePool, page_hash


def test_the_null_page_is_never_given():
    pool = PagePool(4)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert pool.allocate(1) is None and pool.usage == 1


def test_what_does_not_fit_changes_nothing():
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_eviction_takes_what_was_let_go_longest_ago_and_ends_before_beginnings():
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(2)
    for i, page in enumerate([*first, *second]):
        pool.publish([page], [bytes([i])])
    pool.release(first)
    pool.release(second)
    assert pool.num_free == 4
    assert pool.allocate(1) == [first[1]]
    assert pool.find(b"\1") is None and pool.find(b"\0") == first[0]
    pool.share([first[0]])  # used again: the next to go is the end of the second
    assert pool.allocate(1) == [second[1]]
    pool.check_integrity([*first, second[1]])


def test_free_pages_go_before_cached_ones():
    pool = PagePool(3)
    a, b = pool.allocate(2)
    pool.publish([a], [b"a"])
    pool.release([a])
    pool.release([b])
    assert pool.allocate(1) == [b] and pool.find(b"a") == a


def test_the_first_page_with_a_content_keeps_the_name():
    pool = PagePool(3)
    a, b = pool.allocate(2)
    pool.publish([0, a, b], [b"null", b"x", b"x"])
    assert pool.find(b"x") == a and pool.find(b"null") is None
    pool.release([b])
    pool.check_integrity([a])
    assert pool.allocate(1) == [b]


def test_forgetting_frees_cached_pages_and_unnames_used_ones():
    pool = PagePool(3)
    a, b = pool.allocate(2)
    pool.publish([a], [b"a"])
    pool.publish([b], [b"b"])
    pool.release([a])
    pool.forget_cached()
    assert pool.find(b"a") is None and pool.find(b"b") is None
    pool.check_integrity([b])
    pool.release([b])
    pool.check_integrity([])


def test_releasing_too_often_and_lost_pages_are_noticed():
    pool = PagePool(3)
    (page,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([page, page])
    pool.release([page])
    with pytest.raises(AssertionError, match=f"page {page} released"):
        pool.release([page])


def test_a_hash_depends_on_parent_tokens_and_extra():
    base = (bytes(16), bytes([1, 2]), b"e")
    others = [
        (b"\1" * 16, bytes([1, 2]), b"e"),
        (bytes(16), bytes([1, 3]), b"e"),
        (bytes(16), bytes([1, 2]), b"f"),
        (bytes(16), bytes([2, 1]), b"e"),
    ]
    assert len({page_hash(*arguments) for arguments in [base, *others]}) == 5
    assert page_hash(*base) == page_hash(*base)


@given(st.integers(1, 8), st.lists(st.tuples(st.sampled_from("atrps"), st.integers(0, 7)), max_size=60))
def test_any_sequence_of_operations_keeps_the_books(size, operations):
    pool, held, names = PagePool(size + 1), [], 0
    for operation, n in operations:
        if operation == "a":
            free = pool.num_free
            pages = pool.allocate(n)
            assert (pages is None) == (n > free)
            held += pages or []
        elif operation == "r" and held:
            pool.release([held.pop(n % len(held))])
        elif operation == "p" and held:
            names += 1
            pool.publish([held[n % len(held)]], [bytes([names % 5])])
        elif operation == "s" and (page := pool.find(bytes([n % 5]))) is not None:
            pool.share([page, 0])
            held.append(page)
        elif operation == "t" and n == 0:
            pool.forget_cached()
        pool.check_integrity(held)
