"""What the device keeps of each slot from step to step, and how it is written. The last slot is for padding.

Programs see one shard of the data axis; each shard has a last slot of its own.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxengine.sampling import SamplingFields, count_row
from jaxengine.step import SLOT_INTS


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


def update_tables(tables: jax.Array, updates: jax.Array) -> jax.Array:
    """tables [groups, slots, columns]; updates [groups, n, 3] of (slot, column, page); padding hits the null slot."""
    groups = jnp.arange(len(tables))[:, None]
    return tables.at[groups, updates[:, :, 0], updates[:, :, 1]].set(updates[:, :, 2], mode="drop")


def write_slots(
    tables, ints, floats, slots, new_tables, new_ints, new_floats
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
