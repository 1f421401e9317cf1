"""How memory is divided: weights, temporaries of a step, and pages of KV cache with what is left."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.errors import MemoryPlanError
from jaxengine.kv_cache import CacheGroup

logger = logging.getLogger(__name__)
GIB = 2**30
CPU_CACHE_BYTES = GIB  # on a CPU, whose memory others want too: this, or a quarter of what is free
ROUNDING = 2**26  # of what is free on a GPU
DEFAULT_FRACTION = 0.75  # of a GPU that jax takes when XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step, in rows and tokens."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    prompt_chunk: int = 128  # prompt tokens whose logits exist at a time


def temporary_bytes(model: ModelConfig, sizes: Sizes, dtype: str, attention: str) -> int:
    """An upper bound, from shapes, for what one program needs beside its arguments and results."""
    tokens, rows, vocab = sizes.max_num_batched_tokens, sizes.max_num_seqs, model.vocab_size
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    item = jnp.dtype(dtype).itemsize
    inner, wide = 4 * model.intermediate_size if model.has_mlp else 0, max(item, 4)
    layer = 0
    if experts := model.experts:  # each token's rows, sorted and multiplied, and where it stands among all experts
        rows_of_experts = 3 * model.hidden_size + experts.count + 2 * experts.intermediate_size
        if experts.bias:  # the products apart, and each row's biases
            rows_of_experts += model.hidden_size + 3 * experts.intermediate_size
        inner = max(inner, experts.per_token * rows_of_experts)
        if attention != "triton":  # copies an expert's kernels
            layer = 3 * model.hidden_size * experts.intermediate_size * wide
    layer += tokens * (4 * model.hidden_size + 3 * heads + inner) * wide
    sampler = 8 * rows * vocab * 4  # logits, distances, weights, noise, and their masks
    logits = 6 if item == 4 else 4  # arrays of a chunk's logits, as counted on an H200
    scoring = logits * sizes.prompt_chunk * vocab * 4
    partial = 528 * 2 * model.num_heads * model.head_dim * 4  # split-KV results, see pallas_kernels.paged_decode
    gathered = 0
    if attention == "reference":  # each row's whole cache, and the scores of every token against it
        length = -(-sizes.max_model_len // sizes.page_size) * sizes.page_size
        gathered = 4 * length * (4 * rows * model.num_kv_heads * model.head_dim + 4 * tokens * model.num_heads)
    tables = rows * (sizes.max_model_len // sizes.page_size + 1) * 4 * 2
    return 64 * 2**20 + max(layer + partial + gathered + tables, sampler, scoring)


def compiling_bytes(model: ModelConfig, sizes: Sizes, dtype: str) -> int:
    """An upper bound for what XLA takes of a GPU while it compiles a program: it times products on copies of operands.

    What it does not get it waits for, ten seconds each time, and steps that run meanwhile may fail.
    """
    tokens, rows, item = sizes.max_num_batched_tokens, max(128, sizes.max_num_seqs), jnp.dtype(dtype).itemsize
    hidden, inner, queries = model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim
    products = [(tokens, hidden, queries + 2 * model.num_kv_heads * model.head_dim), (tokens, queries, hidden),
                (rows, hidden, model.vocab_size)]  # fmt: skip
    products += [(tokens, hidden, 2 * inner), (tokens, inner, hidden)] if model.has_mlp else []
    # Two results in float32: a candidate's and what it is compared with.
    return 64 * 2**20 + max(item * (m * k + k * n) + 2 * 4 * m * n for m, k, n in products)


def plan_pages(
    config: EngineConfig,
    model: ModelConfig,
    groups: Sequence[CacheGroup],
    sizes: Sizes,
    cache_dtype: str,
    reserved: int,
    devices: Sequence[jax.Device],
) -> tuple[int, ...]:
    """Pages for each cache group, the null page included. Call it once the weights are on the devices.

    Every device has its share of each page. `reserved`: bytes of each that pages must leave to programs, on a GPU.
    Raises MemoryPlanError when not even a page of each group fits.
    """
    page_bytes = [group.page_bytes(sizes.page_size, cache_dtype) for group in groups]
    wanted = [sizes.max_num_seqs * _pages_of_one(group, sizes) + 1 for group in groups]
    slots = (sizes.max_num_seqs + 1) * (
        2 * model.vocab_size + 4 * len(groups) * (sizes.max_model_len // sizes.page_size)
    )
    if config.kv_cache_memory_bytes is not None:
        budget, source = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    else:
        budget, source = _free_bytes(config, devices, reserved + slots)
    needed = sum(2 * size for size in page_bytes)
    if budget < needed:
        raise MemoryPlanError(
            f"{max(0, budget):,} bytes are left for the KV cache ({source}), "
            f"one page and the null page need {needed:,}: "
            + ("raise it" if source == "kv_cache_memory_bytes" else
               "close() an engine that is no longer used, lower max_num_seqs or max_num_batched_tokens, or give jax "
               "more memory (XLA_PYTHON_CLIENT_MEM_FRACTION)")
        )  # fmt: skip
    share = (budget - needed) / max(1, sum((count - 2) * size for count, size in zip(wanted, page_bytes)))
    if devices[0].platform == "cpu" or config.kv_cache_memory_bytes is not None:
        share = min(share, 1.0)  # more than every row could fill
    pages = [2 + int(share * (count - 2)) for count in wanted]
    if config.attention == "triton":
        pages = [_numbered(count, group, sizes, cache_dtype) for count, group in zip(pages, groups)]
    size = sum(count * page for count, page in zip(pages, page_bytes))
    logger.info("KV cache: %s pages of %d tokens, %.2f GiB", pages, sizes.page_size, size / GIB)
    return tuple(pages)


def _numbered(count: int, group: CacheGroup, sizes: Sizes, cache_dtype: str) -> int:
    """So many pages, or fewer where a layer's pool would have a size that Triton's kernels refuse: single bytes of 2 to
    4 GiB, see pallas_kernels.triton_tile.check_offsets.
    """
    page = group.kv_heads * sizes.page_size * group.head_dim
    if jnp.dtype(cache_dtype).itemsize > 1 or not 2**31 < count * page <= 2**32:
        return count
    most, unused = 2**31 // page, 2 * len(group.layers) * (count * page - 2**31)
    logger.warning("attention='triton' takes no layer's pool of bytes of 2 to 4 GiB: %d pages instead of %d, %.1f GiB "
                   "stay unused", most, count, unused / GIB)  # fmt: skip
    return most


def _pages_of_one(group: CacheGroup, sizes: Sizes) -> int:
    """Pages that one sequence can hold at most."""
    tokens = sizes.max_model_len
    if group.window is not None:
        tokens = min(tokens, group.window + sizes.max_num_batched_tokens)
    return -(-tokens // sizes.page_size) + (group.window is not None)


def _free_host_bytes() -> int:
    """What programs could take, the operating system's file cache included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return 4 * CPU_CACHE_BYTES


def _free_bytes(config: EngineConfig, devices: Sequence[jax.Device], reserved: int) -> tuple[int, str]:
    """What pages may take of each device, and where that figure comes from."""
    found: list[Mapping[str, Any] | None] = [device.memory_stats() for device in devices]
    if devices[0].platform == "cpu" or not all(found):  # devices of a host share its memory
        return min(CPU_CACHE_BYTES, _free_host_bytes() // 4) // len(devices), "a quarter of the free memory"
    stats = [each for each in found if each]
    limit, used = min(each["bytes_limit"] for each in stats), max(each["bytes_in_use"] for each in stats)
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", DEFAULT_FRACTION))
    asked = int(limit / fraction * config.gpu_memory_utilization)
    if asked > limit:
        logger.info(
            "gpu_memory_utilization=%g asks for %.1f GiB, jax has %.1f GiB: set XLA_PYTHON_CLIENT_MEM_FRACTION=%g "
            "before jax starts to have them all", config.gpu_memory_utilization, asked / GIB, limit / GIB,
            config.gpu_memory_utilization,
        )  # fmt: skip
    # Rounded, since a few bytes more in use would give pools of another shape, which no compilation cache knows.
    return (min(limit, asked) - used - reserved) // ROUNDING * ROUNDING, f"{used / GIB:.2f} GiB are in use"
