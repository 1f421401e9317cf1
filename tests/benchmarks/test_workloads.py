"""The request sets are a contract with what measures other engines: these figures must never change."""

import json
from hashlib import sha256

import pytest

from benchmarks.workloads import SHAPES, WORKLOADS, floor_seconds, requests

DIGESTS = {
    "bs1": "8295f2c0d712", "bs8": "5e657b522806", "bs64": "f92f691c66a4", "fixed256": "e5b497afb0a9",
    "decode": "638c364f7981", "prefill": "3a5fd1668df0", "nano": "199c6f016a1b", "mixed1k": "6301e6eee158",
    "cpu1": "fe2856d4127b", "cpu8": "8a4cf475bd9d", "cpumix": "aab014953ed6", "tiny": "faa49be1e17b",
}  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_never_change(name):
    made = requests(name, 32000)
    assert sha256(json.dumps(made).encode()).hexdigest()[:12] == DIGESTS[name]


def test_lengths_lie_in_their_ranges():
    for name, work in WORKLOADS.items():
        prompts, outputs = requests(name, 100, seed=1)
        assert len(prompts) == len(outputs) == work.count
        assert all(work.prompt[0] <= len(p) <= work.prompt[1] and max(p) < 100 for p in prompts)
        assert all(work.output[0] <= n <= work.output[1] for n in outputs)


def test_the_floor_counts_bytes_and_operations():
    shape = SHAPES["llama8b"]
    assert shape.parameters_read == pytest.approx(7.5e9, rel=0.01)  # 8.03e9 without the input embedding
    assert shape.kv_bytes() == 131072
    # One request of 10 prompt and 3 output tokens: a prefill, two decode steps, 11 + 12 tokens of KV.
    floor = floor_seconds(shape, [[0] * 10], [3], bandwidth=1.0, flops=1.0)
    assert floor == 10 * 2 * shape.parameters_read + 2 * 2 * shape.parameters_read + 23 * 131072
    assert floor_seconds(shape, [[0] * 10], [3], bandwidth=1.0, flops=1.0, devices=4) == floor / 4
    assert SHAPES["llama70b"].parameters_read == pytest.approx(69.5e9, rel=0.001)  # 70.55e9 likewise


def test_outputs_may_be_shorter():
    prompts, outputs = requests("bs64", 100)
    assert requests("bs64:7", 100) == (prompts, [7] * 64) and set(outputs) == {256}
