"""Rows into arrays: buckets that always suffice, masks, the order of rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine.batch import Buckets, banned_tokens, bucket_sizes, build_batch
from jaxengine.engine.sequence import Sequence, allowed_mask
from jaxengine.engine.slots import Rows, SlotTable
from jaxengine.step import PromptSpan, unpack
from tests.fakes import make_request


def placed(sequence, slot, pages, uploaded=None, page_size=4):
    """A table of its own for the sequence, with these pages in one group; of them the device has all, or so many."""
    table = SlotTable(slot + 1, 1, 64, page_size)
    place(table, sequence, slot, pages, uploaded)
    return table


def place(table, sequence, slot, pages, uploaded=None):
    sequence.enter(table, slot, 0)
    table.pages[0, slot, : len(pages)] = pages
    table.columns[slot] = len(pages)
    table.uploaded[slot] = len(pages) if uploaded is None else uploaded


def rows_of(*rows):
    return Rows(*(np.array(column) for column in zip(*rows)))


def test_bucket_sizes():
    assert bucket_sizes(1, 8, 32) == (1, 2, 4, 8)
    assert bucket_sizes(16, 100, 512) == (16, 32, 64, 100)
    assert bucket_sizes(4, 4, 32) == (4,)
    assert bucket_sizes(2, 32, 32) == (2, 4, 8, 16, 32)
    assert bucket_sizes(2, 128, 32) == (2, 4, 8, 16, 32, 64, 96, 128)
    assert bucket_sizes(64, 1100, 512) == (64, 128, 256, 512, 1024, 1100)


@given(st.data())
def test_a_bucket_has_room_for_all_that_its_rows_may_bring(data):
    """Blocks of the extend kernel, and page table columns: the most that so many tokens in so many rows can need."""
    budget = data.draw(st.integers(1, 200))
    max_num_seqs = data.draw(st.integers(1, min(budget, 64)))
    block_q, page_size = data.draw(st.sampled_from([1, 4, 16])), data.draw(st.sampled_from([1, 4, 16]))
    sizes = bucket_sizes(1, max_num_seqs, 32), bucket_sizes(min(4, budget), budget, 512)
    buckets = Buckets(*sizes, block_q, page_size, 1, max_num_seqs)
    table = SlotTable(max_num_seqs, 1, 256, page_size)
    left, rows, added = budget, [], 0
    for _ in range(data.draw(st.integers(1, max_num_seqs))):
        if left == 0:
            break
        count = data.draw(st.integers(1, left) | st.just(1) | st.just(min(left, block_q + 1)))
        start, left = data.draw(st.integers(0, 40)), left - count
        had, has = -(-start // page_size), -(-(start + count) // page_size)
        place(table, Sequence(make_request(0, [1] * (start + count + 1)), 0), len(rows), range(1, has + 1), had)
        rows.append((len(rows), start, count, data.draw(st.booleans())))
        added += has - had if had else 0  # what a fresh slot has comes with its slot write
    ordered, inputs = build_batch(rows_of(*rows), table, buckets, 8)
    assert sorted(zip(ordered.slots, ordered.start, ordered.count, ordered.samples)) == rows
    counts = ordered.count.tolist()
    assert [c > 1 for c in counts] == sorted(c > 1 for c in counts)
    fields = unpack(inputs.kind, inputs.bucket, inputs.packed)
    assert (fields["page_updates"][0, :, 0] < max_num_seqs).sum() == added
    if inputs.kind == "mixed":
        assert (fields["block_row"] >= 0).sum() == sum(-(-c // block_q) for c in counts if c > 1)
        assert (fields["token_row"] >= 0).sum() == sum(counts) <= inputs.bucket.tokens
    else:
        assert ordered.samples.all() and set(counts) == {1}
    assert [write.slot for write in inputs.slot_writes] == [slot for slot in ordered.slots if rows[slot][1] == 0]
    assert (table.uploaded == table.columns).all()


@pytest.mark.parametrize(
    ("params", "samples", "kind", "mode"),
    [
        ({}, True, "decode", "greedy"),
        ({"temperature": 1.0}, True, "decode", "sampled"),
        ({"logprobs": 0}, True, "mixed", "everything"),
        ({"repetition_penalty": 2.0}, True, "mixed", "everything"),
        ({}, False, "mixed", "greedy"),
        ({"prompt_logprobs": 0}, True, "decode", "greedy"),
    ],
)
def test_the_program_is_chosen_by_what_the_rows_need(params, samples, kind, mode):
    buckets = Buckets((1, 2), (4, 8), 4, 4, 1, 2)
    sequence = Sequence(make_request(0, [1, 2, 3], **params), 0)
    sequence.prompt_logprobs = [()] * 2
    table = placed(sequence, 0, [1])
    _, inputs = build_batch(rows_of((0, 2, 1, samples)), table, buckets, 8)
    assert (inputs.kind, inputs.mode) == (kind, mode)
    assert (inputs.head_bucket is None) == (kind == "decode" or not samples)


def test_prompt_logprobs_are_computed_from_their_start_only():
    buckets = Buckets((1, 2), (4, 8), 4, 4, 1, 2)
    sequence = Sequence(make_request(0, [5, 6, 7, 8, 9], prompt_logprobs=-1, prompt_logprobs_start=4), 0)
    table = placed(sequence, 0, [1, 2])
    _, inputs = build_batch(rows_of((0, 0, 3, False)), table, buckets, 16)
    assert inputs.prompt_asked is None and list(inputs.prompt_spans) == []
    _, inputs = build_batch(rows_of((0, 3, 2, True)), table, buckets, 16)
    assert inputs.prompt_asked.tolist() == [[0, -1, -1, -1], [9, 0, 0, 0]]
    assert inputs.prompt_spans == [PromptSpan(slot=0, position=3, token=0, begin=0, count=1, best=-1)]


def test_masks_hold_a_bit_for_each_token_that_may_be_drawn():
    def bits(mask):
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    assert bits(allowed_mask(None, [3], 40)) == [t for t in range(40) if t != 3]
    assert bits(allowed_mask([1, 33, 39], [33], 40)) == [1, 39]
    assert allowed_mask(None, [], 40).shape == (2,) and allowed_mask(None, [], 40).dtype == np.uint32


def test_ends_are_banned_until_min_tokens_although_tokens_are_in_flight():
    sequence = Sequence(make_request(0, [1], min_tokens=2, eos=(7,), bad_words=[[4], [1, 5]]), 0)
    assert banned_tokens(sequence, 1) == {7, 4, 5}  # the draw that is being built is in flight
    assert 7 in banned_tokens(sequence, 2)
    assert 7 not in banned_tokens(sequence, 3)
    table = placed(sequence, 0, [])
    table.append(np.array([0]), np.array([[2]]), np.array([1]), now=1.0)
    assert banned_tokens(sequence, 3) == {4}


def test_a_seed_of_64_bits_reaches_its_slot():
    from jaxengine.engine.batch import _slot_write

    request = make_request(0, [1], seed=2**64 - 2)
    table = placed(Sequence(request, 3), 2, [4, 5], uploaded=0)
    write = _slot_write(table, 2)
    held = SimpleNamespace(**dict(zip(("top_k", "low", "high", "index", "edits"), write.ints)))
    assert (held.low, held.high, held.index, held.edits) == (-2, -1, 3, 0)
    assert write.pages == [[4, 5]] and table.uploaded[2] == 2
