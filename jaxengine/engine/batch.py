"""Scheduled rows -> padded, bucketed NumPy arrays."""

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxengine.engine.scheduler import Row
from jaxengine.engine.sequence import Sequence, allowed_mask
from jaxengine.step import Bucket, LogitWrite, MaskWrite, Mode, SlotWrite, StepInputs, packed_size, unpack


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """Bucket sizes up to and including `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


@dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for: rows for decode steps and heads, tokens for mixed steps."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    block_q: int  # query tokens in a block of the extend kernel
    page_size: int
    groups: int
    max_num_seqs: int

    def decode(self, rows: int) -> Bucket:
        rows = self.rows[bisect_left(self.rows, rows)]
        return Bucket(rows, rows, 0, self.groups, rows)

    def mixed(self, tokens: int) -> Bucket:
        tokens = self.tokens[bisect_left(self.tokens, tokens)]
        rows = min(tokens, self.max_num_seqs)
        blocks = tokens // self.block_q + min(rows, max(1, tokens // 2))
        return Bucket(tokens, rows, blocks, self.groups, tokens // self.page_size + 2 * rows)

    def head(self, rows: int) -> Bucket:
        rows = self.rows[bisect_left(self.rows, rows)]
        return Bucket(0, rows, 0, self.groups, 0)


def build_batch(rows: Seq[Row], buckets: Buckets, vocab_size: int) -> tuple[list[Row], StepInputs]:
    """The step's inputs, and its rows in the order in which the outputs come: rows of one token first."""
    rows = sorted(rows, key=lambda row: row.count > 1)
    sampling = [row.sequence for row in rows if row.samples]
    mode: Mode = "greedy"
    if any(s.request.needs_everything for s in sampling):
        mode = "everything"
    elif any(not s.params.greedy for s in sampling):
        mode = "sampled"
    wants_prompt = [row for row in rows if _wants_prompt_logprobs(row)]
    decode = len(sampling) == len(rows) and rows[-1].count == 1 and mode != "everything" and not wants_prompt
    fresh = [row.sequence for row in rows if row.sequence.fresh_slot]
    writes: dict[str, Any] = {
        "slot_writes": [_slot_write(sequence) for sequence in fresh],
        "logit_writes": [_logit_write(s, vocab_size) for s in fresh if s.request.edits_logits],
        "mask_writes": _mask_writes(rows, vocab_size),
    }
    for sequence in fresh:
        sequence.fresh_slot = False
    if decode:
        bucket = buckets.decode(len(rows))
        return rows, StepInputs("decode", bucket, _pack_decode(rows, bucket, buckets.max_num_seqs), mode, **writes)
    bucket = buckets.mixed(sum(row.count for row in rows))
    packed, targets = _pack_mixed(rows, bucket, buckets)
    whole = {row for row in wants_prompt if row.sequence.params.prompt_logprobs == -1}
    spans = [span for row, span in _spans(rows) if row in whole]
    head = buckets.head(len(sampling)) if sampling else None
    return rows, StepInputs(
        "mixed", bucket, packed, mode, head, _pack_head(rows, head, buckets.max_num_seqs) if head else None,
        prompt_targets=targets if wants_prompt else None,
        prompt_vocab_spans=spans,
        whole_vocab=any(s.params.logprobs == -1 for s in sampling),
        **writes,
    )  # fmt: skip


def _token(row: Row, position: int) -> int:
    tokens = row.sequence.tokens
    return tokens[position] if position < len(tokens) else -1  # still on the device: the slot's last token


def _spans(rows: Seq[Row]) -> Iterator[tuple[Row, tuple[int, int]]]:
    start = 0
    for row in rows:
        yield row, (start, start + row.count)
        start += row.count


def _pack_decode(rows: Seq[Row], bucket: Bucket, null_slot: int) -> np.ndarray:
    packed = np.zeros(packed_size("decode", bucket), np.int32)
    fields, count = unpack("decode", bucket, packed), len(rows)
    fields["slots"][:] = null_slot
    fields["tokens"][:count] = [_token(row, row.start) for row in rows]
    fields["slots"][:count] = [row.sequence.slot for row in rows]
    fields["lengths"][:count] = [row.start + 1 for row in rows]
    _page_updates(rows, fields["page_updates"], null_slot)
    return packed


def _pack_mixed(rows: Seq[Row], bucket: Bucket, buckets: Buckets) -> tuple[np.ndarray, np.ndarray]:
    packed = np.zeros(packed_size("mixed", bucket), np.int32)
    fields, targets = unpack("mixed", bucket, packed), np.zeros(bucket.tokens, np.int32)
    fields["token_row"][:] = fields["block_row"][:] = -1
    fields["slots"][:] = buckets.max_num_seqs
    block = sampled = 0
    for i, (row, (start, end)) in enumerate(_spans(rows)):
        known = row.sequence.tokens[row.start : row.start + row.count]
        fields["tokens"][start:end] = known or -1
        fields["positions"][start:end] = np.arange(row.start, row.start + row.count)
        fields["token_row"][start:end] = i
        fields["slots"][i], fields["lengths"][i] = row.sequence.slot, row.start + row.count
        fields["q_start"][i], fields["q_len"][i] = start, row.count
        if row.count > 1:
            starts = np.arange(start, end, buckets.block_q)
            fields["block_row"][block : block + len(starts)] = i
            fields["block_start"][block : block + len(starts)] = starts
            block += len(starts)
        if row.samples:
            fields["logit_index"][sampled] = end - 1
            sampled += 1
        if _wants_prompt_logprobs(row):
            following = row.sequence.tokens[row.start + 1 : row.start + row.count + 1]
            targets[start : start + len(following)] = following
    _page_updates(rows, fields["page_updates"], buckets.max_num_seqs)
    return packed, targets


def _pack_head(rows: Seq[Row], bucket: Bucket, null_slot: int) -> np.ndarray:
    packed = np.zeros(packed_size("head", bucket), np.int32)
    fields, sampling = unpack("head", bucket, packed), [row for row in rows if row.samples]
    fields["slots"][:] = null_slot
    fields["slots"][: len(sampling)] = [row.sequence.slot for row in sampling]
    fields["positions"][: len(sampling)] = [row.start + row.count for row in sampling]
    return packed


def _page_updates(rows: Seq[Row], updates: np.ndarray, null_slot: int) -> None:
    """The columns of each row's page table that the device does not have yet; padding goes to the null slot."""
    updates[:, :, 0] = null_slot
    for g in range(len(updates)):
        entries = []
        for row in rows:
            sequence = row.sequence
            pages, start = sequence.pages[g], sequence.uploaded[g]
            if start < len(pages):
                entries += [(sequence.slot, column, pages[column]) for column in range(start, len(pages))]
                sequence.uploaded[g] = len(pages)
        if entries:
            updates[g, : len(entries)] = entries


def _slot_write(sequence: Sequence) -> SlotWrite:
    """The pages that a fresh slot starts with; `_page_updates` has nothing to add for them."""
    params, seed = sequence.params, sequence.request.seed & (2**64 - 1)
    sequence.uploaded = [len(pages) for pages in sequence.pages]
    words = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
    return SlotWrite(
        sequence.slot,  # type: ignore[arg-type]
        (params.top_k, int(words[0]), int(words[1]), sequence.index, int(sequence.request.edits_logits)),
        (params.temperature, params.top_p, params.min_p, params.presence_penalty, params.frequency_penalty,
         params.repetition_penalty),
        [list(pages) for pages in sequence.pages],
    )  # fmt: skip


def _logit_write(sequence: Sequence, vocab_size: int) -> LogitWrite:
    mask, sequence.banned = _mask(sequence, vocab_size)
    tokens = np.asarray(sequence.tokens, np.int32)
    return LogitWrite(sequence.slot, tokens, sequence.num_prompt, mask, sequence.params.logit_bias or {})  # type: ignore[arg-type]


def _mask_writes(rows: Seq[Row], vocab_size: int) -> list[MaskWrite]:
    """Masks that differ from what the slot has: a bad word's beginning was drawn, or min_tokens are reached."""
    writes = []
    for row in rows:
        sequence = row.sequence
        if row.samples and not sequence.fresh_slot and sequence.request.edits_logits:
            banned = banned_tokens(sequence)
            if banned != sequence.banned:
                mask, sequence.banned = _mask(sequence, vocab_size)
                writes.append(MaskWrite(sequence.slot, mask))  # type: ignore[arg-type]
    return writes


def _mask(sequence: Sequence, vocab_size: int) -> tuple[np.ndarray, frozenset[int]]:
    banned = banned_tokens(sequence)
    return allowed_mask(sequence.params.allowed_token_ids, sorted(banned), vocab_size), banned


def banned_tokens(sequence: Sequence) -> frozenset[int]:
    """Tokens that the sequence's next draw may not be: ends before min_tokens, and ends of bad words."""
    request = sequence.request
    banned: set[int] = set()
    if sequence.num_output + sequence.in_flight - 1 < sequence.params.min_tokens:  # this step's draw is in in_flight
        banned |= request.stop_token_ids
    for word in request.bad_word_ids:
        prefix = word[:-1]
        if not prefix or sequence.tokens[-len(prefix) :] == prefix:
            banned.add(word[-1])
    return frozenset(banned)


def _wants_prompt_logprobs(row: Row) -> bool:
    """Does this row compute a hidden state whose successor's log-probability is asked for and still missing?"""
    position = row.sequence.next_prompt_logprob
    return position is not None and row.start < row.sequence.num_prompt - 1 and row.start + row.count >= position
