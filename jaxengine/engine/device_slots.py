"""What the device keeps of each slot from step to step, and how it is written. The last slot is for padding.

Programs see one shard of the data axis; each shard has a last slot of its own.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.request import MAX_LOGIT_BIAS
from jaxengine.sampling import SamplingFields, count_row
from jaxengine.step import SLOT_FLOATS, SLOT_INTS, LogitWrite, SlotWrite

SLOT_BATCH = 16  # slots written by one call: more than most steps have new, and few where tables are long
FLOATS = 1 + len(SLOT_INTS)  # where a packed slot has its floats' bits, behind its number and its ints,
TABLES = FLOATS + len(SLOT_FLOATS)  # and its tables


class Slots(NamedTuple):
    """What every step reads of its rows' slots. Slot `max_num_seqs` is the null slot, for padding."""

    last_token: jax.Array  # int32 [slots]
    tables: jax.Array  # int32 [groups, slots, columns]
    ints: jax.Array  # int32 [slots, SLOT_INTS]
    floats: jax.Array  # float32 [slots, SLOT_FLOATS]


class LogitRules(NamedTuple):
    """What only the `everything` program reads of them."""

    counts: jax.Array  # int16 [slots, vocab], see sampling.count_tokens
    mask: jax.Array  # uint32 [slots, words]
    bias_ids: jax.Array  # int32 [slots, MAX_LOGIT_BIAS], -1 = none
    bias_values: jax.Array  # float32 [slots, MAX_LOGIT_BIAS]


def packed_slots(
    writes: Sequence[SlotWrite], shards: int, null_slot: int, groups: int, columns: int
) -> Iterator[np.ndarray]:
    """What calls of `write_slots` take for these, one upload each: int32 [SLOT_BATCH of each shard, all of a slot]."""
    own = [[write for write in writes if write.slot // null_slot == shard] for shard in range(shards)]
    for i in range(0, max(map(len, own)), SLOT_BATCH):
        packed = np.zeros((shards * SLOT_BATCH, TABLES + groups * columns), np.int32)
        tables = packed[:, TABLES:].reshape(-1, groups, columns)
        packed[:, 0] = null_slot
        for shard, of_shard in enumerate(own):
            for j, write in enumerate(of_shard[i : i + SLOT_BATCH], shard * SLOT_BATCH):
                packed[j, 0], packed[j, 1:FLOATS] = write.slot - shard * null_slot, write.ints
                packed[j, FLOATS:TABLES].view(np.float32)[:] = write.floats
                for g, pages in enumerate(write.pages):
                    tables[j, g, : len(pages)] = pages
        yield packed


def packed_rules(write: LogitWrite, slots: np.ndarray, max_tokens: int) -> tuple[np.ndarray, ...]:
    """What `write_rules` takes for this, of each shard's slot: sizes, tokens, mask, biases."""
    tokens = np.zeros(max_tokens, np.int32)
    tokens[: len(write.tokens)] = write.tokens
    ids, values = np.full(MAX_LOGIT_BIAS, -1, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
    ids[: len(write.bias)] = list(write.bias)
    values[: len(write.bias)] = list(write.bias.values())
    sizes = np.array([(slot, write.num_prompt, len(write.tokens)) for slot in slots], np.int32)
    return sizes.ravel(), tokens, write.mask, ids, values


def update_tables(tables: jax.Array, updates: jax.Array) -> jax.Array:
    """tables [groups, slots, columns]; updates [groups, n, 3] of (slot, column, page); padding hits the null slot."""
    groups = jnp.arange(len(tables))[:, None]
    return tables.at[groups, updates[:, :, 0], updates[:, :, 1]].set(updates[:, :, 2], mode="drop")


def write_slots(tables, ints, floats, packed) -> tuple[jax.Array, jax.Array, jax.Array]:
    slots, new_tables = packed[:, 0], packed[:, TABLES:].reshape(len(packed), len(tables), -1).swapaxes(0, 1)
    new_floats = jax.lax.bitcast_convert_type(packed[:, FLOATS:TABLES], jnp.float32)
    new_ints = packed[:, 1:FLOATS]
    return tables.at[:, slots].set(new_tables), ints.at[slots].set(new_ints), floats.at[slots].set(new_floats)


def write_mask(mask, slot, new_mask) -> jax.Array:
    return mask.at[slot[0]].set(new_mask)


def write_rules(rules: LogitRules, sizes, tokens, mask, bias_ids, bias_values) -> LogitRules:
    slot, num_prompt, num_tokens = sizes[0], sizes[1], sizes[2]
    return LogitRules(
        rules.counts.at[slot].set(count_row(tokens, num_prompt, num_tokens, rules.counts.shape[1])),
        rules.mask.at[slot].set(mask),
        rules.bias_ids.at[slot].set(bias_ids),
        rules.bias_values.at[slot].set(bias_values),
    )


def sampling_fields(ints, floats, positions, slots=None, rules=()) -> SamplingFields:
    """The rows' slots as the sampler wants them; without rules the arrays of the `everything` program are absent."""
    top_k, low, high, index, edits = (ints[:, i] for i in range(len(SLOT_INTS)))
    values = dict(zip(("temperature", "top_p", "min_p", "presence", "frequency", "repetition"), floats.T, strict=True))
    seed = jax.lax.bitcast_convert_type(jnp.stack([low, high], axis=1), jnp.uint32)
    fields = SamplingFields(top_k=top_k, seed=seed, sample_index=index, position=positions, **values)
    if not rules:
        return fields
    edited = (edits != 0)[:, None]  # a slot that edits nothing may hold its last owner's rules
    return dataclasses.replace(
        fields,
        counts=jnp.where(edited, rules.counts[slots], 0),
        mask=jnp.where(edited, rules.mask[slots], jnp.uint32(0xFFFFFFFF)),
        bias_ids=jnp.where(edited, rules.bias_ids[slots], -1),
        bias_values=rules.bias_values[slots],
    )
