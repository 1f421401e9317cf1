"""How decode by Mosaic deals out its work (each unit once, to all streams as many) and puts parts together."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_decode_streams import Stream, combine, deal

STREAMS = 5
UNITS = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 300))
deal_jitted = jax.jit(deal, static_argnums=(2, 3, 4))
combine_jitted = jax.jit(combine)


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


@given(
    st.sampled_from([1, 2, 9]).flatmap(lambda rows: st.lists(UNITS, min_size=rows, max_size=rows)),
    st.sampled_from([1, 3]),
    st.integers(0, 2**16),
)
def test_parts_are_put_together(units, kv_heads, seed):
    """Weights and values of every unit are drawn; a stream leaves what its units sum to, and NaN where it has none."""
    rng, of_item, dim = np.random.default_rng(seed), 3, 4
    score = rng.normal(0, 40, (len(units), kv_heads, max(units), of_item))  # in powers of two
    value = rng.normal(size=(*score.shape, dim))

    def attended(row, head, begin, end):
        log = score[row, head, begin:end]
        total = np.log2(np.exp2(log - log.max(axis=0)).sum(axis=0)) + log.max(axis=0)
        return (np.exp2(log - total)[:, :, None] * value[row, head, begin:end]).sum(axis=0), total

    found, work = segments(units, kv_heads, True)
    out = np.full((len(units) * kv_heads, of_item, dim), np.nan, np.float32)
    partial_out, log_total = (np.full((2 * STREAMS, *shape), np.nan, np.float32) for shape in ((of_item, dim), (16,)))
    for number, row, head, begin, end in found:
        values, total = attended(row, head, begin, end)
        item = row * kv_heads + head
        if (begin, end) == (0, units[row]):
            out[item] = values
            continue
        slot, place = 2 * number + (begin == 0), item * of_item % 8
        partial_out[slot], log_total[slot, place : place + of_item] = values, total
    expected = out.copy().reshape(len(units), kv_heads, of_item, dim)
    for row, head in {(row, head) for _, row, head, *_ in found}:
        expected[row, head] = attended(row, head, 0, units[row])[0]
    together = combine_jitted(work, partial_out, log_total, out.reshape(-1, dim))
    np.testing.assert_allclose(together, expected.reshape(-1, dim), atol=1e-4)
