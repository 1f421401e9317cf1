"""What a step writes to the slots on the device, packed for one upload a call."""

import jax.numpy as jnp
import numpy as np

from jaxengine.engine.device_slots import SLOT_BATCH, packed_slots, write_slots
from jaxengine.step import SLOT_FLOATS, SLOT_INTS, SlotWrite

SHARDS, SLOTS, GROUPS, COLUMNS = 2, 50, 2, 7  # slots of a shard, its null slot not counted


def test_every_write_arrives_at_its_shard_and_no_other_slot_changes():
    rng = np.random.default_rng(0)
    slots = [*rng.permutation(SLOTS)[: SLOT_BATCH + 3].tolist(), SLOTS + 4, SLOTS + 49]
    writes = [
        SlotWrite(slot, tuple(rng.integers(-9, 9, len(SLOT_INTS)).tolist()), tuple(rng.random(len(SLOT_FLOATS))),
                  [rng.integers(1, 99, 1 + slot % COLUMNS).tolist() for _ in range(GROUPS)])
        for slot in slots
    ]  # fmt: skip
    calls = list(packed_slots(writes, SHARDS, SLOTS, GROUPS, COLUMNS))
    assert len(calls) == 2, "one does not hold the first shard's"
    for shard in range(SHARDS):
        before = jnp.full((GROUPS, SLOTS + 1, COLUMNS), -1), jnp.full((SLOTS + 1, len(SLOT_INTS)), -1)
        found = *before, jnp.full((SLOTS + 1, len(SLOT_FLOATS)), -1.0)
        want = [np.array(array) for array in found]
        for packed in calls:
            found = write_slots(*found, packed.reshape(SHARDS, SLOT_BATCH, -1)[shard])
        for write in writes:
            if write.slot // SLOTS == shard:
                slot = write.slot % SLOTS
                for table, pages in zip(want[0], write.pages):
                    table[slot] = [*pages, *[0] * (COLUMNS - len(pages))]
                want[1][slot], want[2][slot] = write.ints, write.floats
        for got, expected in zip(found, want):
            np.testing.assert_array_equal(got.swapaxes(0, -2)[:SLOTS], expected.swapaxes(0, -2)[:SLOTS])
