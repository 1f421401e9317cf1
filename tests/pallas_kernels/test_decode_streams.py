"""How decode by Mosaic deals out its work: each unit once, to all streams as many, and parts where they are sought."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_decode_streams import Stream, deal

STREAMS = 5
UNITS = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 300))
deal_jitted = jax.jit(deal, static_argnums=(2, 3, 4))


def segments(units, kv_heads: int, cut: bool):
    """(stream, row, head, first unit, unit behind the last) as the kernel goes through them, and the work list."""
    units = jnp.asarray(units, jnp.int32)
    work = deal_jitted(units * 16, units, kv_heads, STREAMS, cut)
    order, found = np.asarray(work.order), []
    for number, fields in enumerate(np.asarray(work.streams)):
        stream = Stream(*map(int, fields))
        if stream.segments:
            assert stream.row == order[stream.item % stream.live] and stream.length == units[stream.row] * 16
        for i in range(stream.segments):
            row, head = order[(stream.item + i) % stream.live], (stream.item + i) // stream.live
            begin = stream.begin if i == 0 else 0
            end = min(stream.end, units[row]) if i == stream.segments - 1 else int(units[row])
            found.append((number, int(row), int(head), begin, int(end)))
    return found, work


@given(
    st.sampled_from([1, 2, 9]).flatmap(lambda rows: st.lists(UNITS, min_size=rows, max_size=rows)),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_each_unit_once_and_all_streams_alike(units, kv_heads, cut):
    found, work = segments(units, kv_heads, cut)
    dealt = [(row, head, unit) for _, row, head, begin, end in found for unit in range(begin, end)]
    assert sorted(dealt) == [(r, h, t) for r, n in enumerate(units) for h in range(kv_heads) for t in range(n)]
    share = defaultdict(int)
    for number, *_, begin, end in found:
        assert begin < end
        share[number] += end - begin if cut else 1
    shares = [share[number] for number in range(STREAMS)]
    assert max(shares) - min(shares) <= 1
    empty = np.asarray(work.order)[int(work.streams[0, Stream._fields.index("live")]) :]
    assert sorted(empty) == [row for row, count in enumerate(units) if count == 0]

    # The item's parts are of consecutive streams; its first part is the only one that begins with its first unit.
    parts = defaultdict(list)
    for number, row, head, begin, _ in found:
        parts[row, head].append((number, begin == 0))
    for (row, head), which in parts.items():
        first = int(work.first_stream[row, head])
        assert which == [(first + i, i == 0) for i in range(int(work.parts[row, head]))]
        assert cut or len(which) == 1
