"""Cases for the kernels: a pairwise cover of their options, random inputs, and a naive twin of each op in NumPy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LayerWeights
from pallas_kernels.decode_layer_plan import COUNTERS


def pairwise(options: dict[str, Sequence], seed: int = 0) -> list[dict]:
    """Few choices that hold every pair of values of two options at least once (greedy; the same for the same seed)."""
    rng = np.random.default_rng(seed)
    names = list(options)
    missing = {((a, x), (b, y)) for a, b in combinations(names, 2) for x, y in product(options[a], options[b])}
    choices = []
    while missing:
        best, best_new, pairs = {}, set(), sorted(missing, key=repr)
        for _ in range(30):
            # Start from a missing pair, then give each other option the value that covers the most.
            choice = dict(pairs[rng.integers(len(pairs))])
            for i in rng.permutation(len(names)):
                name = names[i]
                if name not in choice:
                    values = [options[name][j] for j in rng.permutation(len(options[name]))]
                    choice[name] = max(values, key=lambda value: len(_pairs({**choice, name: value}, names) & missing))
            new = _pairs(choice, names) & missing
            if len(new) > len(best_new):
                best, best_new = choice, new
        choices.append({name: best[name] for name in names})
        missing -= best_new
    return choices


def _pairs(choice: dict, names: list[str]) -> set:
    present = [(name, choice[name]) for name in names if name in choice]
    return set(combinations(present, 2))


@dataclass(frozen=True)
class Case:
    """Shapes and options; `lengths` are the rows' lengths, new tokens included."""

    head_dim: int = 64
    group: int = 1
    page_size: int = 16
    dtype: str = "float32"
    cache: str | None = None  # dtype of the pools; None: the same
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_heads: int = 2
    queries: int = 1  # per row, decode only
    lengths: tuple[int, ...] = (0, 1, 40, 70)
    new_tokens: tuple[int, ...] = ()  # per row, extend only
    block_q: int = 16  # extend only

    def __str__(self) -> str:
        return (f"d{self.head_dim}-g{self.group}-p{self.page_size}-{self.dtype}-{self.cache}-w{self.window}"
                f"-c{self.softcap}-s{self.sinks:d}-q{self.queries}-k{self.kv_heads}-n{max(self.lengths)}")  # fmt: skip

    @property
    def options(self) -> dict:
        # A softcap is only felt by scores of its size: twice the usual scale. A sink weighs as much as dozens of keys.
        sinks = 6 + 2 * np.random.default_rng(0).standard_normal(self.kv_heads * self.group)
        return {"scale": 2 / math.sqrt(self.head_dim), "window": self.window, "softcap": self.softcap,
                "sinks": sinks.astype(jnp.dtype(self.dtype)) if self.sinks else None}  # fmt: skip


def decode_inputs(case: Case, seed: int = 0) -> tuple:
    """Arguments of paged_decode as NumPy arrays of the case's dtype, in random page order.

    Slots beyond a row's length hold NaN, and table entries that a row does not need name a page of NaN.
    """
    rng, dtype, cache = np.random.default_rng(seed), jnp.dtype(case.dtype), jnp.dtype(case.cache or case.dtype)
    rows, page_size = len(case.lengths), case.page_size
    width = max(1, -(-max(case.lengths) // page_size)) + 1
    pages = [-(-length // page_size) for length in case.lengths]
    pool_shape = (sum(pages) + 2, case.kv_heads, page_size, case.head_dim)
    poisoned = pool_shape[0] - 1
    k, v = (rng.standard_normal(pool_shape).astype(cache) for _ in range(2))
    order = iter(rng.permutation(sum(pages)) + 1)
    table = np.full((rows, width), poisoned, np.int32)
    for row, length in enumerate(case.lengths):
        table[row, : pages[row]] = [next(order) for _ in range(pages[row])]
        if length % page_size:
            for pool in (k, v):
                pool[table[row, length // page_size], :, length % page_size :] = np.nan
        if case.window is not None:
            new = case.new_tokens[row] if case.new_tokens else case.queries
            table[row, : max(0, length - new + 1 - case.window) // page_size] = poisoned
    for pool in (k, v):
        pool[poisoned] = np.nan
    q = rng.standard_normal((rows, case.queries, case.kv_heads * case.group, case.head_dim)).astype(dtype)
    return q, k, v, table, np.array(case.lengths, np.int32)


def extend_inputs(case: Case, seed: int = 0) -> tuple:
    """Arguments of paged_extend; rows of at most one new token are in no block, and an empty block ends the list."""
    _, k, v, table, lengths = decode_inputs(case, seed)
    rng, q_len = np.random.default_rng(seed + 1), np.array(case.new_tokens, np.int32)
    q_start = np.cumsum(q_len) - q_len
    blocks = [(row, start) for row, count in enumerate(q_len) if count > 1
              for start in range(q_start[row], q_start[row] + count, case.block_q)]  # fmt: skip
    block_row, block_start = np.array([*blocks, (-1, 0)], np.int32).T
    shape = (q_len.sum() + 3, case.kv_heads * case.group, case.head_dim)
    q = rng.standard_normal(shape).astype(jnp.dtype(case.dtype))
    return q, k, v, table, block_row, block_start, q_start.astype(np.int32), q_len, lengths


def naive_attention(
    q, k_pages, v_pages, table, position: int, *, scale, window=None, softcap=None, sinks=None
) -> np.ndarray:
    """One query token q [H, D] at `position` of a row with the page table `table` [W], in float64, key by key."""
    group, page_size = len(q) // k_pages.shape[1], k_pages.shape[2]
    out = np.zeros(q.shape)
    for head in range(len(q)):
        weights, values = [], []
        for key in range(0 if window is None else max(0, position - window + 1), position + 1):
            slot = table[key // page_size], head // group, key % page_size
            score = scale * float(q[head].astype(np.float64) @ k_pages[slot].astype(np.float64))
            weights.append(math.exp(score if softcap is None else softcap * math.tanh(score / softcap)))
            values.append(v_pages[slot].astype(np.float64))
        if weights:
            sink = 0 if sinks is None else math.exp(sinks[head])
            out[head] = np.array(weights) @ np.array(values) / (sum(weights) + sink)
    return out


def naive_decode(q, k_pages, v_pages, page_table, lengths, **options) -> np.ndarray:
    out = np.zeros(q.shape)
    for row, queries in enumerate(q):
        for j, query in enumerate(queries):
            position = int(lengths[row]) - len(queries) + j
            out[row, j] = naive_attention(query, k_pages, v_pages, page_table[row], position, **options)
    return out


def naive_extend(
    q, k_pages, v_pages, page_table, block_row, block_start, q_start, q_len, lengths, *, block_q, **options
) -> np.ndarray:
    out = np.zeros(q.shape)
    for row, start in zip(block_row, block_start):
        if row >= 0:
            for token in range(start, min(start + block_q, q_start[row] + q_len[row])):
                position = int(lengths[row] - q_len[row] + token - q_start[row])
                out[token] = naive_attention(q[token], k_pages, v_pages, page_table[row], position, **options)
    return out


def naive_write(k_pages, v_pages, k, v, page, offset) -> tuple[np.ndarray, np.ndarray]:
    k_pages, v_pages = k_pages.copy(), v_pages.copy()
    for token in range(len(page)):
        if page[token] != 0:
            k_pages[page[token], :, offset[token]] = naive_stored(k[token], k_pages.dtype)
            v_pages[page[token], :, offset[token]] = naive_stored(v[token], v_pages.dtype)
    return k_pages, v_pages


def naive_stored(values: np.ndarray, dtype) -> np.ndarray:
    """Rounded; what the dtype has no finite number for becomes its largest, if it has 8 bits."""
    if dtype.itemsize > 1:
        return values.astype(dtype)
    most = float(jnp.finfo(dtype).max)
    return values.astype(np.float32).clip(-most, most).astype(dtype)


def write_inputs(case: Case, tokens: int, seed: int = 0) -> tuple:
    """Arguments of kv_write: random slots, every third token dropped; pools of 8 bits get what they cannot hold."""
    rng, dtype, cache = np.random.default_rng(seed), jnp.dtype(case.dtype), jnp.dtype(case.cache or case.dtype)
    pool_shape = (2 + tokens // case.page_size, case.kv_heads, case.page_size, case.head_dim)
    k_pages, v_pages = (rng.standard_normal(pool_shape).astype(cache) for _ in range(2))
    k, v = (rng.standard_normal((tokens, case.kv_heads, case.head_dim)).astype(dtype) for _ in range(2))
    if cache.itemsize == 1:
        k[:, :, ::5] *= 1000
        v[:, :, ::7] *= 1000
        v[:, :, 1] = np.inf
        k[1:5, 0, 2:4] = np.nan
    slots = case.page_size + rng.choice((pool_shape[0] - 1) * case.page_size, tokens, replace=False)
    page, offset = (slots // case.page_size).astype(np.int32), (slots % case.page_size).astype(np.int32)
    page[::3] = 0
    return k_pages, v_pages, k, v, page, offset


def rope_write_inputs(case: Case, tokens: int, pairs: int, normed: bool, seed: int = 0) -> tuple:
    """Arguments of rope_write: random slots, every third token dropped; scales where `normed`."""
    k_pages, v_pages, *_, page, offset = write_inputs(case, tokens, seed)
    rng, dtype = np.random.default_rng(seed + 1), jnp.dtype(case.dtype)
    heads = case.kv_heads * (case.group + 2)
    qkv = (3 * rng.standard_normal((tokens, heads, case.head_dim))).astype(dtype)
    if k_pages.dtype.itemsize == 1:
        qkv[:, -2 * case.kv_heads :, ::5] *= 1000
    angles = rng.uniform(-np.pi, np.pi, (tokens, pairs))
    cos, sin = (1.2 * function(angles).astype(np.float32) for function in (np.cos, np.sin))
    scales = [rng.uniform(0.5, 2, case.head_dim).astype(dtype) for _ in range(2 * normed)]
    return k_pages, v_pages, qkv, cos, sin, page, offset, *scales


def naive_rope_write(
    k_pages, v_pages, qkv, cos, sin, page, offset, q_scale=None, k_scale=None, *, eps
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Head by head, pair by pair, in float64; nothing is rounded before the end."""
    kv_heads, pairs = k_pages.shape[1], cos.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    turned = qkv.astype(np.float64)
    for head in range(heads + kv_heads):
        scale = q_scale if head < heads else k_scale
        for x, c, s in zip(turned[:, head], cos.astype(np.float64), sin.astype(np.float64)):
            if scale is not None:
                x *= scale.astype(np.float64) / np.sqrt((x**2).mean() + eps)
            for i in range(pairs):
                x[i], x[i + pairs] = x[i] * c[i] - x[i + pairs] * s[i], x[i + pairs] * c[i] + x[i] * s[i]
    turned = turned.astype(qkv.dtype)
    k, v = turned[:, heads:-kv_heads], qkv[:, -kv_heads:]
    return turned[:, :heads], *naive_write(k_pages, v_pages, k, v, page, offset)


def grouped_inputs(sizes: Sequence[int], size_in: int, size_out: int, dtype: str, kernels: int, seed: int = 0) -> tuple:
    """Rows of groups of these sizes, five of NaN that no group has, the groups' kernels, and the sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(sizes) + 5, size_in)).astype(jnp.dtype(dtype))
    x[sum(sizes) :] = np.nan
    shape = (kernels, len(sizes), size_in, size_out)
    return x, *(rng.standard_normal(shape) / math.sqrt(size_in)).astype(jnp.dtype(dtype)), np.array(sizes, np.int32)


def naive_grouped(x, *kernels_and_sizes) -> np.ndarray:
    """Row by row, in float64: silu(x @ gate) * (x @ up), or x @ kernel; of the groups' rows only."""
    *kernels, sizes = kernels_and_sizes
    group = np.repeat(np.arange(len(sizes)), sizes)
    products = [
        np.array([row.astype(np.float64) @ kernel[g].astype(np.float64) for row, g in zip(x, group)])
        for kernel in kernels
    ]
    return products[0] if len(products) == 1 else products[0] / (1 + np.exp(-products[0])) * products[1]


def relative_error(out, expected) -> float:
    """Norm of the difference over the norm of `expected`, in float64; inf where either has a NaN."""
    out, expected = np.asarray(out).astype(np.float64), np.asarray(expected).astype(np.float64)
    if not (np.isfinite(out).all() and np.isfinite(expected).all()):
        return math.inf
    return float(np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30))


def decode_layer_inputs(
    *, hidden, heads, kv_heads, dim, inner, lengths, longest=0, normed=False, page_size=16, dtype="bfloat16", seed=0
):
    """Arguments of `decode_layer`: rows of these lengths, the rest of its rows without a token, and
    room for rows of `longest` keys.
    """
    rows, keys = 8, iter(jax.random.split(jax.random.key(seed), 16))

    def random(*shape, scale=1.0, dtype=dtype):
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    def gain(size):
        return 1 + random(size, scale=0.1)

    q, kv = heads * dim, kv_heads * dim
    shapes = (q, hidden), (hidden, 2 * inner), (inner, hidden), (hidden, q + 2 * kv)
    o, gate_up, down, next_qkv = (random(*shape, scale=shape[0] ** -0.5) for shape in shapes)
    weights = LayerWeights(o, gain(hidden), gate_up, down, gain(hidden), next_qkv)
    if normed:
        weights = weights._replace(q_scale=gain(dim), k_scale=gain(dim))
    columns = -(-max(longest, *lengths) // page_size)
    table = 1 + np.random.default_rng(seed).permutation(rows * columns).reshape(rows, columns).astype(np.int32)
    length = np.zeros(rows, np.int32)
    length[: len(lengths)] = lengths
    last = np.maximum(length - 1, 0)
    page = np.where(length > 0, table[np.arange(rows), last // page_size], 0)
    pools = [random(1 + rows * columns, kv_heads, page_size, dim) for _ in range(2)]
    angles = 6 * jax.random.uniform(next(keys), (rows, dim // 2))
    arrays = map(jnp.asarray, (table, length, page, last % page_size))
    return (random(rows, heads + 2 * kv_heads, dim), random(rows, hidden, dtype="float32"), *pools, weights, *arrays,
            jnp.cos(angles), jnp.sin(angles), jnp.zeros(COUNTERS, jnp.int32))  # fmt: skip
