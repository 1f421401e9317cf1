"""The host-device contract: what one step uploads, and what it brings back.

On a mesh with a data axis every array of a step is that of each shard, one after another, in the dimension of rows or
tokens. Slots of `SlotWrite`, `LogitWrite`, `MaskWrite` and places of `PromptSpan` are counted through all shards;
within the arrays they are the shard's own.

All integers of a step travel as one packed int32 array. Its fields are declared once, below; a new field is one line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

Mode = Literal["greedy", "sampled", "everything"]
MODES: tuple[Mode, ...] = get_args(Mode)  # each can do all that those before it can


@dataclass(frozen=True)
class Bucket:
    """The static sizes of one program: every array in it is padded to these."""

    tokens: int
    rows: int
    blocks: int  # of query tokens, for chunks of more than one token
    groups: int  # of the KV cache
    page_updates: int  # per group
    steps: int = 1  # decode: tokens that the program computes of each row, one after another


# name -> shape. `tokens` = -1 takes the last token of the row's slot; a row of length 0 is padding.
DECODE: Mapping[str, Callable[[Bucket], tuple[int, ...]]] = {
    "tokens": lambda b: (b.rows,),
    "slots": lambda b: (b.rows,),
    "lengths": lambda b: (b.rows,),  # tokens in the cache after the first of the program's steps
    "counts": lambda b: (b.rows,),  # steps that the row takes part in, from the first one on
    "page_updates": lambda b: (b.groups, b.page_updates, 3),  # slot, column, page
}
MIXED: Mapping[str, Callable[[Bucket], tuple[int, ...]]] = {
    "tokens": lambda b: (b.tokens,),
    "positions": lambda b: (b.tokens,),
    "token_row": lambda b: (b.tokens,),  # -1: padding
    "slots": lambda b: (b.rows,),
    "lengths": lambda b: (b.rows,),
    "q_start": lambda b: (b.rows,),  # rows of one token come first: row i is token i
    "q_len": lambda b: (b.rows,),
    "block_row": lambda b: (b.blocks,),  # -1: no block
    "block_start": lambda b: (b.blocks,),
    "logit_index": lambda b: (b.rows,),  # the token whose hidden state is the i-th row of the head
    "page_updates": lambda b: (b.groups, b.page_updates, 3),
}
HEAD: Mapping[str, Callable[[Bucket], tuple[int, ...]]] = {
    "slots": lambda b: (b.rows,),
    "positions": lambda b: (b.rows,),  # absolute position of the token that is drawn
}
# What a slot holds beside its page table and its last token; uploaded when a request is admitted.
SLOT_INTS = ("top_k", "seed_low", "seed_high", "sample_index", "edits_logits")
SLOT_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@cache
def _layout(kind: str, bucket: Bucket) -> tuple[tuple[tuple[str, int, int, tuple[int, ...]], ...], int]:
    rows, start = [], 0
    for name, shape_of in {"decode": DECODE, "mixed": MIXED, "head": HEAD}[kind].items():
        shape = shape_of(bucket)
        size = int(np.prod(shape))
        rows.append((name, start, start + size, shape))
        start += size
    return tuple(rows), start


def packed_size(kind: str, bucket: Bucket) -> int:
    return _layout(kind, bucket)[1]


def unpack(kind: str, bucket: Bucket, packed: Any) -> dict[str, Any]:
    """Views of `packed` (NumPy or traced) by field name; NumPy views may be written to, which is how it is packed."""
    return {name: packed[a:b].reshape(shape) for name, a, b, shape in _layout(kind, bucket)[0]}


@dataclass(frozen=True)
class SlotWrite:
    """What is uploaded when a request takes a slot."""

    slot: int
    ints: Sequence[int]  # SLOT_INTS
    floats: Sequence[float]  # SLOT_FLOATS
    pages: Sequence[Sequence[int]]  # per cache group


@dataclass(frozen=True)
class LogitWrite:
    """What the `everything` program needs of a slot: penalties' counts, allowed tokens, biases."""

    slot: int
    tokens: np.ndarray  # int32: prompt, then output
    num_prompt: int
    mask: np.ndarray  # uint32 [ceil(vocab / 32)], a bit for each allowed token
    bias: Mapping[int, float]


@dataclass(frozen=True)
class MaskWrite:
    """New allowed tokens for a slot."""

    slot: int
    mask: np.ndarray


@dataclass(frozen=True)
class PromptSpan:
    """Consecutive prompt tokens of a row, of whose successors the log-probabilities are asked for.

    `pooled`: the sum of their hidden states is, instead.
    """

    slot: int
    position: int  # of the first one, in its sequence
    token: int  # its place in the step
    begin: int  # its place among all that are asked for; pooled: the span's among pooled ones
    count: int
    best: int = 0  # how many of the best tokens are asked for in each place; -1: the whole vocabulary
    pooled: bool = False


@dataclass(frozen=True)
class StepInputs:
    """One step, as plain NumPy: all that the runner is given."""

    kind: Literal["decode", "mixed"]
    bucket: Bucket
    packed: np.ndarray
    mode: Mode
    head_bucket: Bucket | None = None  # None: nothing is sampled (mixed), or the head is in the program (decode)
    head_packed: np.ndarray | None = None
    slot_writes: Sequence[SlotWrite] = ()
    logit_writes: Sequence[LogitWrite] = ()
    mask_writes: Sequence[MaskWrite] = ()
    prompt_asked: np.ndarray | None = None  # int32 [2, tokens]: a token's place in the step (or -1), its successor
    pooled_rows: np.ndarray | None = None  # int32 [tokens]: the pooled span that a token belongs to, or -1
    prompt_spans: Sequence[PromptSpan] = ()  # what these two hold, row by row
    whole_vocab: bool = False  # log-probabilities of the whole vocabulary for each sampled row
    # int [rows that sample]: which row of the programs' results is theirs, of several shards; None: the first ones
    order: np.ndarray | None = None


@dataclass(frozen=True)
class StepOutputs:
    """What a step brings back, NumPy; row i is the i-th row that sampled."""

    tokens: np.ndarray  # int32 [rows, K]; of a row that took part in fewer steps the first ones count
    logprob: np.ndarray | None = None  # float32 [rows]
    rank: np.ndarray | None = None
    top_ids: np.ndarray | None = None  # int32 [rows, k]
    top_logprobs: np.ndarray | None = None
    vocab_logprobs: np.ndarray | None = None  # float32 [rows, vocab]
    prompt: tuple[np.ndarray, ...] | None = None  # logprob, rank, top ids, top logprobs of what was asked for
    prompt_vocab: Sequence[np.ndarray] = field(default_factory=tuple)  # per `whole` span, float32 [count, vocab]
    pooled: np.ndarray | None = None  # float32 [rows, hidden]: sums of hidden states, per pooled span
