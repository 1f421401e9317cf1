"""Scheduled rows -> padded, bucketed NumPy arrays."""

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxengine.engine.sequence import Sequence, allowed_mask
from jaxengine.engine.slots import Rows, SlotTable, spread
from jaxengine.step import MODES, Bucket, LogitWrite, MaskWrite, PromptSpan, SlotWrite, StepInputs, packed_size, unpack


def bucket_sizes(smallest: int, largest: int, step: int) -> tuple[int, ...]:
    """Powers of two times `smallest` up to `step`, then multiples of that, up to and including `largest`."""
    sizes = []
    while smallest < min(step, largest):
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, *range(step, largest, step), largest)


@dataclass(frozen=True)
class Buckets:
    """The sizes that programs are compiled for: rows for decode steps and heads, steps of a decode program, tokens for
    mixed steps.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    block_q: int  # query tokens in a block of the extend kernel
    page_size: int
    groups: int
    max_num_seqs: int  # slots of a shard
    steps: tuple[int, ...] = (1,)
    microbatch: int = 256  # tokens of a mixed step that a stage of a pipeline has at a time

    def decode(self, rows: int, steps: int = 1) -> Bucket:
        rows = self.rows[bisect_left(self.rows, rows)]
        return Bucket(rows, rows, 0, self.groups, rows * -(-steps // self.page_size), steps)

    def mixed(self, tokens: int) -> Bucket:
        tokens = self.tokens[bisect_left(self.tokens, tokens)]
        rows = min(tokens, self.max_num_seqs)
        blocks = tokens // self.block_q + min(rows, max(1, tokens // 2))
        return Bucket(tokens, rows, blocks, self.groups, tokens // self.page_size + 2 * rows)

    def head(self, rows: int) -> Bucket:
        rows = self.rows[bisect_left(self.rows, rows)]
        return Bucket(0, rows, 0, self.groups, 0)


def build_batch(rows: Rows, table: SlotTable, buckets: Buckets, vocab_size: int) -> tuple[Rows, StepInputs]:
    """The step's inputs, and its rows in the order in which the outputs come: rows of one token first."""
    longest = rows.count.max()
    if longest > 1:
        rows = rows[np.argsort(rows.slots // buckets.max_num_seqs * 2 + (rows.count > 1), kind="stable")]
    sampling = rows.slots[rows.samples]
    mode = MODES[table.mode[sampling].max(initial=0)]
    parts = table.split(rows)
    spans = [_prompt_spans(*part) for part in parts]
    singles = longest == 1 or rows.steps > 1
    decode = len(sampling) == len(rows) and singles and mode != "everything" and not any(spans)
    fresh, edits = (table.uploaded == 0)[rows.slots], table.edits_logits[rows.slots]
    writes: dict[str, Any] = {
        "slot_writes": [_slot_write(table, slot) for slot in rows.slots[fresh].tolist()],
        "logit_writes": [_logit_write(table, slot, vocab_size) for slot in rows.slots[fresh & edits].tolist()],
        "mask_writes": _mask_writes(rows.slots[rows.samples & edits & ~fresh].tolist(), table, vocab_size),
    }
    if decode:
        bucket = buckets.decode(max(len(own) for own, _ in parts), rows.steps)
        packed = _join([_pack_decode(*part, bucket, buckets) for part in parts])
        return rows, StepInputs("decode", bucket, packed, mode, **writes, order=_order(parts, bucket))
    bucket = buckets.mixed(max(int(own.count.sum()) for own, _ in parts))
    packed = _join([_pack_mixed(*part, bucket, buckets) for part in parts])
    head = buckets.head(max(int(own.samples.sum()) for own, _ in parts)) if len(sampling) else None
    if any(span.pooled for own in spans for span in own):
        writes["pooled_rows"] = _join([_pooled_rows(own, bucket) for own in spans])
    if any(not span.pooled for own in spans for span in own):
        asked = [_prompt_asked(own, part, bucket) for own, (_, part) in zip(spans, parts, strict=True)]
        writes["prompt_asked"] = _join(asked)
    return rows, StepInputs(
        "mixed", bucket, packed, mode, head,
        _join([_pack_head(own, head, buckets.max_num_seqs) for own, _ in parts]) if head else None,
        prompt_spans=_through_shards(spans, bucket, buckets.max_num_seqs),
        whole_vocab=mode == "everything" and any(s.params.logprobs == -1 for s in table.sequence[sampling]),
        order=_order(parts, head) if head else None,
        **writes,
    )  # fmt: skip


def _join(parts: Seq[np.ndarray]) -> np.ndarray:
    """The arrays of all shards, one after another in the last dimension."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def _order(parts: Seq[tuple[Rows, SlotTable]], bucket: Bucket) -> np.ndarray | None:
    if len(parts) == 1:
        return None
    first, count = np.arange(len(parts)) * bucket.rows, [np.count_nonzero(own.samples) for own, _ in parts]
    return spread(first, np.array(count))[0]


def _through_shards(spans: Seq[Seq[PromptSpan]], bucket: Bucket, slots: int) -> list[PromptSpan]:
    """All spans, their places counted through all shards."""
    if len(spans) == 1:
        return list(spans[0])
    return [
        replace(
            span,
            slot=span.slot + shard * slots,
            token=span.token + shard * bucket.tokens,
            begin=span.begin + shard * (bucket.rows if span.pooled else bucket.tokens),
        )
        for shard, own in enumerate(spans)
        for span in own
    ]


def _pack_decode(rows: Rows, table: SlotTable, bucket: Bucket, buckets: Buckets) -> np.ndarray:
    packed = np.zeros(packed_size("decode", bucket), np.int32)
    fields, count = unpack("decode", bucket, packed), len(rows)
    fields["slots"][:] = buckets.max_num_seqs
    fields["tokens"][:count] = table.known(rows.slots, rows.start)
    fields["slots"][:count] = rows.slots
    fields["lengths"][:count], fields["counts"][:count] = rows.start + 1, rows.count
    _page_updates(rows, table, fields["page_updates"], buckets.max_num_seqs)
    return packed


def _pack_mixed(rows: Rows, table: SlotTable, bucket: Bucket, buckets: Buckets) -> np.ndarray:
    packed = np.zeros(packed_size("mixed", bucket), np.int32)
    fields = unpack("mixed", bucket, packed)
    fields["token_row"][:] = fields["block_row"][:] = -1
    fields["slots"][:] = buckets.max_num_seqs
    count, end = len(rows), np.cumsum(rows.count)
    positions, row = spread(rows.start, rows.count)
    fields["tokens"][: len(row)] = table.known(rows.slots[row], positions)
    fields["positions"][: len(row)], fields["token_row"][: len(row)] = positions, row
    fields["slots"][:count], fields["lengths"][:count] = rows.slots, rows.start + rows.count
    fields["q_start"][:count], fields["q_len"][:count] = end - rows.count, rows.count
    blocks = np.where(rows.count > 1, -(-rows.count // buckets.block_q), 0)
    number, row = spread(np.zeros(count, int), blocks)
    # From those that see many keys to those that see few, as paged_extend likes it.
    order = np.argsort(-(rows.start[row] + number * buckets.block_q), kind="stable")
    number, row = number[order], row[order]
    fields["block_row"][: len(row)] = row
    fields["block_start"][: len(row)] = (end - rows.count)[row] + number * buckets.block_q
    fields["logit_index"][: np.count_nonzero(rows.samples)] = end[rows.samples] - 1
    _page_updates(rows, table, fields["page_updates"], buckets.max_num_seqs)
    return packed


def _pack_head(rows: Rows, bucket: Bucket, null_slot: int) -> np.ndarray:
    packed = np.zeros(packed_size("head", bucket), np.int32)
    fields, sampling = unpack("head", bucket, packed), rows[rows.samples]
    fields["slots"][:] = null_slot
    fields["slots"][: len(sampling)] = sampling.slots
    fields["positions"][: len(sampling)] = sampling.start + sampling.count
    return packed


def _page_updates(rows: Rows, table: SlotTable, updates: np.ndarray, null_slot: int) -> None:
    """The columns of each row's page table that the device does not have yet; padding goes to the null slot."""
    updates[:, :, 0] = null_slot
    slots = rows.slots[(table.uploaded < table.columns)[rows.slots]]
    uploaded, columns = table.uploaded[slots], table.columns[slots]
    column, row = spread(uploaded, columns - uploaded)
    updates[:, : len(row), 0], updates[:, : len(row), 1] = slots[row], column
    updates[:, : len(row), 2] = table.pages[:, slots[row], column]
    table.uploaded[slots] = columns


def _slot_write(table: SlotTable, slot: int) -> SlotWrite:
    """The pages that a fresh slot starts with; `_page_updates` has nothing to add for them."""
    sequence: Sequence = table.sequence[slot]
    params, seed = sequence.params, sequence.request.seed & (2**64 - 1)
    words = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
    table.uploaded[slot] = table.columns[slot]
    return SlotWrite(
        slot,
        (params.top_k, int(words[0]), int(words[1]), sequence.index, int(sequence.request.edits_logits)),
        (params.temperature, params.top_p, params.min_p, params.presence_penalty, params.frequency_penalty,
         params.repetition_penalty),
        table.pages[:, slot, : table.columns[slot]].tolist(),
    )  # fmt: skip


def _logit_write(table: SlotTable, slot: int, vocab_size: int) -> LogitWrite:
    sequence: Sequence = table.sequence[slot]
    mask, sequence.banned = _mask(sequence, table.in_flight(slot), vocab_size)
    return LogitWrite(slot, sequence.tokens, sequence.num_prompt, mask, sequence.params.logit_bias or {})


def _mask_writes(slots: Seq[int], table: SlotTable, vocab_size: int) -> list[MaskWrite]:
    """Masks that differ from what the slot has: a bad word's beginning was drawn, or min_tokens are reached."""
    writes = []
    for slot in slots:
        sequence, in_flight = table.sequence[slot], table.in_flight(slot)
        if banned_tokens(sequence, in_flight) != sequence.banned:
            mask, sequence.banned = _mask(sequence, in_flight, vocab_size)
            writes.append(MaskWrite(slot, mask))
    return writes


def _mask(sequence: Sequence, in_flight: int, vocab_size: int) -> tuple[np.ndarray, frozenset[int]]:
    banned = banned_tokens(sequence, in_flight)
    return allowed_mask(sequence.params.allowed_token_ids, sorted(banned), vocab_size), banned


def banned_tokens(sequence: Sequence, in_flight: int) -> frozenset[int]:
    """Tokens that the sequence's next draw may not be: ends before min_tokens, and ends of bad words."""
    request = sequence.request
    banned: set[int] = set()
    if sequence.num_output + in_flight - 1 < sequence.params.min_tokens:  # this step's draw is in in_flight
        banned |= request.stop_token_ids
    for word in request.bad_word_ids:
        prefix = word[:-1]
        if not prefix or sequence.tokens[-len(prefix) :].tolist() == prefix:
            banned.add(word[-1])
    return frozenset(banned)


def _prompt_spans(rows: Rows, table: SlotTable) -> list[PromptSpan]:
    """The hidden states of this step that are asked for, or their successors' log-probabilities, and still missing."""
    spans: list[PromptSpan] = []
    begin, pooled, first = 0, 0, np.cumsum(rows.count) - rows.count
    for i in table.asks_prompt[rows.slots].nonzero()[0].tolist():
        slot, start, end = int(rows.slots[i]), int(rows.start[i]), int(rows.start[i] + rows.count[i])
        sequence: Sequence = table.sequence[slot]
        position = sequence.next_prompt_logprob
        if position is None or start >= sequence.num_prompt - 1 or end < position:
            continue
        state = max(position - 1, start)
        count = min(end, sequence.num_prompt - 1) - state
        token, pooling = int(first[i]) + state - start, sequence.params.pooling
        if pooling is None:
            spans.append(PromptSpan(slot, state, token, begin, count, sequence.params.prompt_logprobs or 0))
            begin += count
        elif pooling != "cls" or state == 0:
            spans.append(PromptSpan(slot, state, token, pooled, 1 if pooling == "cls" else count, pooled=True))
            pooled += 1
    return spans


def _pooled_rows(spans: Seq[PromptSpan], bucket: Bucket) -> np.ndarray:
    rows = np.full(bucket.tokens, -1, np.int32)
    for span in spans:
        if span.pooled:
            rows[span.token : span.token + span.count] = span.begin
    return rows


def _prompt_asked(spans: Seq[PromptSpan], table: SlotTable, bucket: Bucket) -> np.ndarray:
    asked = np.zeros((2, bucket.tokens), np.int32)
    asked[0] = -1
    for span in spans:
        if span.pooled:
            continue
        columns = slice(span.begin, span.begin + span.count)
        asked[0, columns] = np.arange(span.token, span.token + span.count)
        asked[1, columns] = table.tokens[span.slot, span.position + 1 : span.position + 1 + span.count]
    return asked
