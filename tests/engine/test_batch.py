"""Rows into arrays: buckets that always suffice, masks, the order of rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine.batch import Buckets, banned_tokens, build_batch, powers_of_two
from jaxengine.engine.scheduler import Row
from jaxengine.engine.sequence import Sequence, allowed_mask
from jaxengine.step import unpack
from tests.fakes import make_request


def test_bucket_sizes():
    assert powers_of_two(1, 8) == (1, 2, 4, 8)
    assert powers_of_two(16, 100) == (16, 32, 64, 100)
    assert powers_of_two(4, 4) == (4,)


@given(st.data())
def test_a_bucket_has_room_for_all_that_its_rows_may_bring(data):
    """Blocks of the extend kernel, and page table columns: the most that so many tokens in so many rows can need."""
    budget = data.draw(st.integers(1, 200))
    max_num_seqs = data.draw(st.integers(1, min(budget, 64)))
    block_q, page_size = data.draw(st.sampled_from([1, 4, 16])), data.draw(st.sampled_from([1, 4, 16]))
    buckets = Buckets(powers_of_two(1, max_num_seqs), powers_of_two(min(4, budget), budget), block_q, page_size, 1,
                      max_num_seqs)  # fmt: skip
    left, rows = budget, []
    for _ in range(data.draw(st.integers(1, max_num_seqs))):
        if left == 0:
            break
        count = data.draw(st.integers(1, left) | st.just(1) | st.just(min(left, block_q + 1)))
        start, left = data.draw(st.integers(0, 40)), left - count
        sequence = Sequence(make_request(0, [1] * (start + count)), 0, [1] * (start + count + 1))
        had = -(-start // page_size)
        sequence.slot, sequence.pages = len(rows), [list(range(1, -(-(start + count) // page_size) + 1))]
        sequence.uploaded = [had]
        rows.append(Row(sequence, start, count, data.draw(st.booleans())))
    added = sum(len(row.sequence.pages[0]) - row.sequence.uploaded[0] for row in rows)
    ordered, inputs = build_batch(rows, buckets, 8)
    assert sorted(map(id, ordered)) == sorted(map(id, rows))
    counts = [row.count for row in ordered]
    assert [c > 1 for c in counts] == sorted(c > 1 for c in counts)
    fields = unpack(inputs.kind, inputs.bucket, inputs.packed)
    assert (fields["page_updates"][0, :, 0] < max_num_seqs).sum() == added
    if inputs.kind == "mixed":
        assert (fields["block_row"] >= 0).sum() == sum(-(-c // block_q) for c in counts if c > 1)
        assert (fields["token_row"] >= 0).sum() == sum(counts) <= inputs.bucket.tokens
    else:
        assert all(row.samples and row.count == 1 for row in rows)
    assert all(row.sequence.uploaded == [len(row.sequence.pages[0])] for row in rows)


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
    sequence = Sequence(make_request(0, [1, 2, 3], **params), 0, [1, 2, 3])
    sequence.slot, sequence.pages, sequence.uploaded = 0, [[1]], [1]
    sequence.prompt_logprobs = [()] * 2
    _, inputs = build_batch([Row(sequence, 2, 1, samples)], buckets, 8)
    assert (inputs.kind, inputs.mode) == (kind, mode)
    assert (inputs.head_bucket is None) == (kind == "decode" or not samples)


def test_prompt_logprobs_are_computed_from_their_start_only():
    buckets = Buckets((1, 2), (4, 8), 4, 4, 1, 2)
    sequence = Sequence(
        make_request(0, [5, 6, 7, 8, 9], prompt_logprobs=-1, prompt_logprobs_start=4), 0, [5, 6, 7, 8, 9]
    )
    sequence.slot, sequence.pages, sequence.uploaded = 0, [[1, 2]], [2]
    _, inputs = build_batch([Row(sequence, 0, 3, False)], buckets, 16)
    assert inputs.prompt_targets is None and list(inputs.prompt_vocab_spans) == []
    _, inputs = build_batch([Row(sequence, 3, 2, True)], buckets, 16)
    assert inputs.prompt_targets[:2].tolist() == [9, 0] and list(inputs.prompt_vocab_spans) == [(0, 2)]


def test_masks_hold_a_bit_for_each_token_that_may_be_drawn():
    def bits(mask):
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    assert bits(allowed_mask(None, [3], 40)) == [t for t in range(40) if t != 3]
    assert bits(allowed_mask([1, 33, 39], [33], 40)) == [1, 39]
    assert allowed_mask(None, [], 40).shape == (2,) and allowed_mask(None, [], 40).dtype == np.uint32


def test_ends_are_banned_until_min_tokens_although_tokens_are_in_flight():
    sequence = Sequence(make_request(0, [1], min_tokens=2, eos=(7,), bad_words=[[4], [1, 5]]), 0, [1])
    sequence.in_flight = 1  # the draw that is being built
    assert banned_tokens(sequence) == {7, 4, 5}
    sequence.in_flight = 2
    assert 7 in banned_tokens(sequence)
    sequence.in_flight = 3
    assert 7 not in banned_tokens(sequence)
    sequence.tokens.append(2)
    assert banned_tokens(sequence) == {4}


def test_a_seed_of_64_bits_reaches_its_slot():
    from jaxengine.engine.batch import _slot_write

    request = make_request(0, [1], seed=2**64 - 2)
    sequence = Sequence(request, 3, [1], slot=2, pages=[[4, 5]])
    write = _slot_write(sequence)
    held = SimpleNamespace(**dict(zip(("top_k", "low", "high", "index", "edits"), write.ints)))
    assert (held.low, held.high, held.index, held.edits) == (-2, -1, 3, 0)
    assert write.pages == [[4, 5]] and sequence.uploaded == [2]
