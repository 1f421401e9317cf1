"""The speed of attention's and experts' kernels on a GPU, as shares of what it reads and multiplies in the same run.

Each call runs an op several times in one program, each time on other pages than the last (more than the L2 holds) and
on the result of the one before. A sample is many calls queued; the figure is the median of the samples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from jaxengine.benchmark.device import matmul_rate, normal, read_rate, seconds
from jaxengine.errors import UnsupportedError
from pallas_kernels import paged_decode_mosaic as decode_mosaic
from pallas_kernels import paged_extend_mosaic as extend_mosaic
from pallas_kernels.paged_decode import TuningConfig as DecodeTuning
from pallas_kernels.paged_extend import TuningConfig as ExtendTuning
from pallas_kernels.paged_tile import on_mosaic_card, takes_float8
from pallas_kernels.skinny_matmul import gated_tuning, split_tuning

Result = dict[str, Any]


class Heads(NamedTuple):
    """Of one layer."""

    query: int
    kv: int
    dim: int
    cache: str = "bfloat16"  # dtype of the pools

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""
        return 2 * self.kv * self.dim * jnp.dtype(self.cache).itemsize


class Experts(NamedTuple):
    """Of one layer."""

    number: int
    per_token: int
    hidden: int
    inner: int


# What a card reads (bytes/s) and multiplies (operations/s) through JAX. A run that does not reach it was disturbed.
KNOWN_LIMITS = {"H200": (4.44e12, 790e12)}
TOLERANCE = 0.03
PAGE, BLOCK_Q, L2_BYTES = 16, 64, 60e6
OPS = 16  # in one program, at least
FLOPS_PER_BYTE = 180  # from which multiplying takes a Hopper card longer than reading
LLAMA_8B = Heads(32, 8, 128)
LLAMA_8B_FP8 = LLAMA_8B._replace(cache="float8_e4m3fn")


def skewed(long: int, rows: int, total: int) -> tuple[int, ...]:
    """Lengths of `rows` rows, one of them `long` and the others equal but for one, `total` keys together."""
    each, more = divmod(total - long, rows - 1)
    return (long, *(each + (i < more) for i in range(rows - 1)))


BALANCED, SKEWED = "decode 128 x 1024", "decode 16384 and 127 x 903"
# The keys of each row. Those of the first two are as many, so any difference is how the work is shared out.
DECODE: dict[str, tuple[Sequence[int], Heads]] = {
    BALANCED: ([1024] * 128, LLAMA_8B),
    SKEWED: (skewed(16384, 128, 128 * 1024), LLAMA_8B),
    "decode 32 x 2048": ([2048] * 32, LLAMA_8B),
    "decode 8 x 32768": ([32768] * 8, LLAMA_8B),
    "decode 1 x 8192": ([8192], LLAMA_8B),
    "decode 128 x 1024, dim 64": ([1024] * 128, Heads(32, 8, 64)),
    "decode 128 x 1024, dim 256": ([1024] * 128, Heads(16, 8, 256)),
    f"{BALANCED}, fp8": ([1024] * 128, LLAMA_8B_FP8),
    "decode 32 x 2048, fp8": ([2048] * 32, LLAMA_8B_FP8),
    "decode 8 x 32768, fp8": ([32768] * 8, LLAMA_8B_FP8),
    "decode 128 x 1024, dim 64, fp8": ([1024] * 128, LLAMA_8B_FP8._replace(dim=64)),
}
EXTEND = (2048, 4096, 8192, 16384)  # new tokens of one row
WRITE = (128, 8192)  # tokens
QWEN3_30B, MIXTRAL_8X7B = Experts(128, 8, 2048, 768), Experts(8, 2, 4096, 14336)
# Tokens of a step, each with random experts.
EXPERTS: dict[str, tuple[int, Experts]] = {
    f"{name} experts, {tokens} tokens": (tokens, experts)
    for name, experts in (("Qwen3-30B", QWEN3_30B), ("Mixtral", MIXTRAL_8X7B))
    for tokens in (2, 32, 256, 8192)
}
# Products of few rows: rows, in, out.
SPLIT = ((64, 2048, 2048), (64, 8192, 2048), (64, 3072, 1024), (64, 14336, 4096))
GATED = ((64, 2048, 2 * 8192), (64, 4096, 2 * 14336))


def run(on_case: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Every case: seconds and rates of this card, and for each op its time, share of the limit, error and ratios.

    `on_case(done, total)` reports progress. Raises UnsupportedError without a GPU: the kernels are made for one.
    """
    if jax.default_backend() != "gpu":
        raise UnsupportedError(f"the kernels run on an NVIDIA GPU, jax found a {jax.default_backend()}")
    read, matmul, float8 = read_rate(), matmul_rate(), takes_float8(jax.devices()[0])
    cases: list[Callable[[], list[Result]]] = [
        partial(time_decode, name, lengths, heads)
        for name, (lengths, heads) in DECODE.items()
        if float8 or heads.cache == "bfloat16"
    ]
    cases += [partial(time_extend, tokens) for tokens in EXTEND]
    cases += [partial(time_extend, EXTEND[-2], LLAMA_8B_FP8, ", fp8")] if float8 else []
    cases += [partial(time_write, tokens) for tokens in WRITE]
    cases += [partial(time_experts, name, *case) for name, case in EXPERTS.items()]
    cases += [partial(time_split, *case) for case in SPLIT] + [partial(time_gated, *case) for case in GATED]
    results = []
    for done, case in enumerate(cases, 1):
        results += case()
        on_case(done, len(cases))
    return summarize(jax.devices()[0].device_kind, read, matmul, results)


def summarize(device_kind: str, read: float, matmul: float, results: list[Result]) -> Result:
    """The results with shares and ratios. `void`: the rates are not those known of this card; None: none are known."""
    known = next((limits for name, limits in KNOWN_LIMITS.items() if name in device_kind), None)
    void = None
    if known is not None:
        void = any(abs(rate / limit - 1) > TOLERANCE for rate, limit in zip((read, matmul), known))
    shared = [r | {"share": r["bytes_per_s"] / read if "bytes" in r else r["flops_per_s"] / matmul} for r in results]
    time = {result["op"]: result["us"] for result in results}
    pairs = [(f"{SKEWED}{kernel}", f"{BALANCED}{kernel}") for kernel in ("", " by Mosaic")]
    pairs += [(f"{BALANCED}, fp8{kernel}", f"{BALANCED}{kernel}") for kernel in ("", " by Mosaic")]
    pairs += [(f"extend by Mosaic {EXTEND[-2]}, fp8", f"extend by Mosaic {EXTEND[-2]}")]
    pairs += [
        (f"{name} {tokens}", f"cudnn {tokens}")
        for name in ("extend by Triton", "extend by Mosaic")
        for tokens in EXTEND
    ]
    ratios = {f"{ours} / {other}": time[ours] / time[other] for ours, other in pairs if ours in time}
    return {"device": device_kind, "jax": jax.__version__, "read_bytes_per_s": read, "matmul_flops": matmul,
            "known_limits": known, "void": void, "ratios": ratios, "results": shared}  # fmt: skip


def table(result: Result) -> str:
    """What `run` gave, for people."""
    known = result["known_limits"]
    lines = [f"{result['device']}, jax {result['jax']}: reads {result['read_bytes_per_s'] / 1e12:.2f} TB/s, "
             f"multiplies {result['matmul_flops'] / 1e12:.0f} TFLOP/s"]  # fmt: skip
    if known is None:
        lines.append("No known limit of this card is on record: whether the run was disturbed cannot be told.")
    elif result["void"]:
        lines.append(f"This run is VOID: expected {known[0] / 1e12:.2f} TB/s and {known[1] / 1e12:.0f} TFLOP/s "
                     f"within {TOLERANCE:.0%}.")  # fmt: skip
    lines.append(f"{'op':<36}{'us':>10}{'spread':>8}{'rate':>16}{'share':>7}{'error':>9}")
    for r in result["results"]:
        rate, unit = (r["bytes_per_s"], "TB/s") if "bytes" in r else (r["flops_per_s"], "TFLOP/s")
        lines.append(f"{r['op']:<36}{r['us']:10.1f}{r['spread']:8.1%}{rate / 1e12:9.2f} {unit:<6}"
                     f"{r['share']:7.2f}{r['error']:9.1e}")  # fmt: skip
    lines += [f"{name:<72}{ratio:6.2f}" for name, ratio in result["ratios"].items()]
    return "\n".join(lines)


def paged_inputs(lengths: Sequence[int], heads: Heads) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """K and V pools and enough page tables, disjoint and in random order, for their bytes to exceed the L2 thrice.

    Tables are int32 [rows, pages of the longest row], the null page behind a shorter row's own.
    """
    counts = [-(-length // PAGE) for length in lengths]
    pages = sum(counts)
    copies = 1 + int(3 * L2_BYTES // (pages * PAGE * heads.token_bytes))
    shape = copies * pages + 1, heads.kv, PAGE, heads.dim
    k_pages, v_pages = (normal(seed, *shape).astype(heads.cache) for seed in (1, 2))
    own = np.arange(max(counts)) < np.array(counts)[:, None]
    tables = []
    for order in np.random.default_rng(0).permutation(copies * pages).reshape(copies, pages):
        table = np.zeros(own.shape, np.int32)
        table[own] = order + 1
        tables.append(jnp.asarray(table))
    return k_pages, v_pages, tables


def time_decode(name: str, row_lengths: Sequence[int], heads: Heads) -> list[Result]:
    """One new token a row; row r has row_lengths[r] keys: Triton's kernel, Mosaic's on Hopper."""
    k_pages, v_pages, tables = paged_inputs(row_lengths, heads)
    lengths = jnp.asarray(row_lengths, jnp.int32)
    scale = heads.dim**-0.5
    q = normal(3, len(row_lengths), 1, heads.query, heads.dim)
    # A few rows at a time: the reference gathers all keys of the longest row for each.
    parts = [slice(i, i + 8) for i in range(0, len(row_lengths), 8)]
    reference = partial(kernels.paged_decode_reference, scale=scale)
    expected = [reference(q[part], k_pages, v_pages, tables[0][part], lengths[part]) for part in parts]
    repeated = tables * max(1, OPS // len(tables))

    @partial(jax.jit, static_argnames="tuning")
    def chain(q, k_pages, v_pages, tables, lengths, tuning):
        for table in tables:
            q = kernels.paged_decode(q, k_pages, v_pages, table, lengths, scale=scale, tuning=tuning)
        return q

    tunings: dict[str, Any] = {name: DecodeTuning.from_shapes(q, k_pages)}
    if on_mosaic_card() and decode_mosaic.supports(q, k_pages, v_pages, scale):
        tunings[f"{name} by Mosaic"] = decode_mosaic.TuningConfig.from_shapes(q, k_pages)
    size, results = sum(row_lengths) * heads.token_bytes, []
    for op, tuning in tunings.items():
        call = partial(chain, q, k_pages, v_pages, lengths=lengths, tuning=tuning)
        difference = error(call(tables=tables[:1]), jnp.concatenate(expected))
        time_s, spread = seconds(partial(call, tables=repeated), len(repeated))
        results.append({"op": op, "us": time_s * 1e6, "spread": spread, "bytes": size,
                        "bytes_per_s": size / time_s, "error": difference})  # fmt: skip
    return results


def time_extend(tokens: int, heads: Heads = LLAMA_8B, suffix: str = "") -> list[Result]:
    """One row of new tokens only: Triton's kernel, Mosaic's on Hopper, cuDNN's attention on dense keys and values."""
    k_pages, v_pages, tables = paged_inputs([tokens], heads)
    tables = tables[:4]
    starts = jnp.arange(0, tokens, BLOCK_Q, dtype=jnp.int32)[::-1]
    one = partial(jnp.full, (1,), dtype=jnp.int32)
    index = jnp.zeros_like(starts), starts, one(0), one(tokens), one(tokens)
    scale = heads.dim**-0.5
    q = normal(3, tokens, heads.query, heads.dim)
    dense = [
        tuple(pool[table[0]].swapaxes(1, 2).reshape(1, tokens, heads.kv, heads.dim).astype(q.dtype)
              for pool in (k_pages, v_pages))
        for table in tables
    ]  # fmt: skip
    attention = partial(jax.nn.dot_product_attention, is_causal=True, scale=scale, implementation="cudnn")

    @partial(jax.jit, static_argnames="tuning")
    def paged(q, k_pages, v_pages, tables, index, tuning=None):
        for table in tables:
            q = kernels.paged_extend(q, k_pages, v_pages, table, *index, block_q=BLOCK_Q, scale=scale, tuning=tuning)
        return q

    @jax.jit
    def cudnn(q, dense):
        for k, v in dense:
            q = attention(q, k, v)
        return q

    extend = partial(paged, q, k_pages, v_pages, index=index)
    calls: dict[str, Callable] = {
        "extend by Triton": partial(extend, tuning=ExtendTuning.from_shapes(q, k_pages, BLOCK_Q)),
        "cudnn": lambda tables: cudnn(q[None], dense[: len(tables)])[0],
    }
    if on_mosaic_card() and extend_mosaic.supports(q, k_pages, v_pages, scale):
        calls["extend by Mosaic"] = partial(extend, tuning=extend_mosaic.TuningConfig.from_shapes(q, k_pages))
    expected = calls["cudnn"](tables=tables[:1])
    flops = 2 * 2 * heads.query * heads.dim * tokens * (tokens + 1) / 2
    results = []
    for name, call in calls.items():
        difference = error(call(tables=tables[:1]), expected)
        time_s, spread = seconds(partial(call, tables=tables), len(tables))
        results.append({"op": f"{name} {tokens}{suffix}", "us": time_s * 1e6, "spread": spread, "flops": flops,
                        "flops_per_s": flops / time_s, "error": difference})  # fmt: skip
    return results


def time_write(tokens: int, heads: Heads = LLAMA_8B, pages: int = 2**16) -> list[Result]:
    """Bytes are counted twice: the new keys and values are read and written."""
    pools = [normal(seed, pages, heads.kv, PAGE, heads.dim) for seed in (1, 2)]
    k, v = normal(3, tokens, heads.kv, heads.dim), normal(4, tokens, heads.kv, heads.dim)
    slots = PAGE + np.random.default_rng(0).permutation((pages - 1) * PAGE)[: OPS * tokens].reshape(OPS, tokens)
    page, offset = jnp.asarray(slots // PAGE, jnp.int32), jnp.asarray(slots % PAGE, jnp.int32)

    @partial(jax.jit, donate_argnums=(0, 1))
    def chain(k_pages, v_pages, k, v, page, offset):
        for i in range(OPS):
            k_pages, v_pages = kernels.kv_write(k_pages, v_pages, k, v, page[i], offset[i])
        return k_pages, v_pages

    def call() -> list[jax.Array]:
        pools[:] = chain(*pools, k, v, page, offset)
        return pools

    time_s, spread = seconds(call, OPS)
    written = pools[0][page[-1], :, offset[-1]]
    size = tokens * heads.kv * heads.dim * 2 * 4
    return [{"op": f"kv_write {tokens}", "us": time_s * 1e6, "spread": spread, "bytes": size,
             "bytes_per_s": size / time_s, "error": error(written, k)}]  # fmt: skip


def time_experts(name: str, tokens: int, shape: Experts) -> list[Result]:
    """Both grouped products of a layer, on rows that are sorted already; each op of a program has its own routing.

    Bound by reading the kernels of the experts that are hit, or by multiplying: whichever takes the card longer.
    """
    rng = np.random.default_rng(0)
    chosen = [np.argsort(rng.random((tokens, shape.number)), axis=1)[:, : shape.per_token] for _ in range(OPS)]
    sizes = [np.bincount(each.ravel(), minlength=shape.number).astype(np.int32) for each in chosen]
    into, back = (shape.number, shape.hidden, shape.inner), (shape.number, shape.inner, shape.hidden)
    gate, up = (normal(seed, *into) / shape.hidden**0.5 for seed in (1, 2))
    down = normal(3, *back) * 2 / shape.inner**0.5  # what comes out is about as large as what goes in
    x = normal(4, tokens * shape.per_token, shape.hidden)

    def layer(suffix, x, gate, up, down, sizes):
        gated, plain = (getattr(kernels, f"grouped_{kind}matmul{suffix}") for kind in ("gated_", ""))
        return plain(gated(x, gate, up, sizes, jax.nn.silu), down, sizes)

    difference = error(*(layer(suffix, x, gate, up, down, sizes[0]) for suffix in ("", "_reference")))

    @jax.jit
    def chain(x, gate, up, down, sizes):
        for each in sizes:
            x = layer("", x, gate, up, down, each)
        return x

    time_s, spread = seconds(lambda: chain(x, gate, up, down, sizes), OPS)
    one = 3 * shape.hidden * shape.inner
    hit, flops = float(np.mean([(each > 0).sum() for each in sizes])), 2 * one * x.shape[0]
    result = {"op": name, "us": time_s * 1e6, "spread": spread, "error": difference}
    if flops / (2 * one * hit) > FLOPS_PER_BYTE:
        return [result | {"flops": flops, "flops_per_s": flops / time_s}]
    return [result | {"bytes": 2 * one * hit, "bytes_per_s": 2 * one * hit / time_s}]


def time_split(rows: int, size: int, columns: int) -> list[Result]:
    """A product in parts on Hopper, and XLA's."""
    kinds: dict[str, Callable] = {"XLA": jnp.dot}
    if on_mosaic_card() and split_tuning(*_structs(rows, size, columns)):
        kinds = {"in parts": kernels.split_matmul} | kinds
    return _time_products(f"{rows} x {size} x {columns}", rows, size, columns, kinds)


def time_gated(rows: int, size: int, columns: int) -> list[Result]:
    """Gate and up side by side with the activation: in one kernel on Hopper, and XLA's product with a kernel behind."""

    def one(x, kernel):
        return kernels.gated_matmul(x, kernel, jax.nn.silu)

    def two(x, kernel):
        return kernels.gated_activation(jnp.dot(x, kernel), jax.nn.silu)

    kinds: dict[str, Callable] = {"XLA": two}
    if on_mosaic_card() and gated_tuning(*_structs(rows, size, columns)):
        kinds = {"one": one} | kinds
    return _time_products(f"{rows} x {size} x {columns}, gated", rows, size, columns, kinds)


def _structs(rows: int, size: int, columns: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((rows, size), jnp.bfloat16), jax.ShapeDtypeStruct((size, columns), jnp.bfloat16)


def _time_products(name: str, rows: int, size: int, columns: int, kinds: dict[str, Callable]) -> list[Result]:
    """Each with a residual sum and norm behind it, whose bytes do not count. `kinds`: XLA's says what is right."""
    bytes_read = 2 * size * columns
    count = max(OPS, 1 + int(3 * L2_BYTES // bytes_read))
    weights = [normal(i, size, columns) / size**0.5 for i in range(count)]
    inputs = [normal(count + i, rows, size) for i in range(count)]  # one would have XLA join the products

    def chain(kind, inputs, weights):
        stream = jnp.zeros_like(jax.eval_shape(kinds["XLA"], inputs[0], weights[0]))
        for x, kernel in zip(inputs, weights):
            stream, _ = kernels.add_rms_norm(stream, kind(x, kernel), jnp.ones_like(stream[0]), eps=1e-5)
        return stream

    expected, results = jax.jit(partial(chain, kinds["XLA"]))(inputs[:1], weights[:1]), []
    for kind, product in kinds.items():
        # Decode steps of 64 rows and more have cuBLAS's, which are quicker there.
        run = jax.jit(partial(chain, product), compiler_options={"xla_gpu_enable_triton_gemm": False})
        time_s, spread = seconds(partial(run, inputs, weights), count)
        difference = error(run(inputs[:1], weights[:1]), expected)
        results.append({"op": f"{name}, {kind}", "us": time_s * 1e6, "spread": spread, "bytes": bytes_read,
                        "bytes_per_s": bytes_read / time_s, "error": difference})  # fmt: skip
    return results


def error(out: jax.Array, expected: jax.Array) -> float:
    """Relative to the norm of `expected`."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
