"""The engine with kernels against the engine with `reference`: the shipped model, and tiny ones with odd shapes."""

import itertools

import jax
import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from tests import tiny_llm

pytestmark = pytest.mark.gpu
KERNELS = "triton"
EVERYWHERE = ("add_rms_norm", "gated_activation", "rope_write")  # kernels of every step
TINY = ("windows", "experts", "sinks")
TIE = 1e-4  # of two logits: between them rounding may choose
SMALL = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 256, "kv_cache_memory_bytes": 2**28}
BEGINNINGS = (
    "import", "def add(a, b):\n", "class Node:\n", "for i in range(", "    return self.", "# ", '"""Parse ',
    "from collections import", "try:\n", "with open(", "if __name__ ==", "raise ValueError(", "async def ", "x = [",
)  # fmt: skip


def prompts(llm, count=32):
    """Token ids of many lengths: some decode while others come in chunks, some share pages with others."""
    texts = [a + b * n for (a, b), n in zip(itertools.product(BEGINNINGS, BEGINNINGS), itertools.cycle((0, 1, 3, 7)))]
    return [(ids * 40)[: 1 + 13 * i % 180] if i % 3 else ids for i, ids in enumerate(llm.encode(texts)[:count])]


def generate(folder, dtype, attention, tokens=48, **options):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    with LLM(folder, dtype=dtype, attention=attention, **(SMALL | options)) as llm:
        assert llm._runner.attention == attention
        own = folder in map(tiny_llm.model_folder, TINY)
        asked = [[7 + i] * (1 + 5 * i) for i in range(32)] if own else prompts(llm)
        outputs = llm.generate(asked, params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def assert_same_until_tie(ours, theirs):
    ties = 0
    for a, b in zip(ours, theirs, strict=True):
        if list(a.token_ids) == list(b.token_ids):
            continue
        step = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y)
        first, second = b.logprobs.top_logprobs[step]
        assert first - second <= TIE, f"token {step}: {a.token_ids[step]} instead of {b.token_ids[step]}"
        ties += 1
    assert ties <= len(ours) // 8


@pytest.mark.parametrize("kind", ["shipped", *(pytest.param(kind, marks=pytest.mark.full) for kind in TINY)])
def test_kernels_give_the_tokens_of_the_reference_in_float32(kind, shipped_model):
    folder = shipped_model if kind == "shipped" else tiny_llm.model_folder(kind)
    assert_same_until_tie(
        generate(folder, "float32", KERNELS), generate(folder, "float32", "reference", steps_per_call=1)
    )


def prompt_logprobs(folder, dtype, attention, cache):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(folder, dtype=dtype, attention=attention, kv_cache_dtype=cache, **SMALL) as llm:
        outputs = llm.generate(prompts(llm), params, use_tqdm=False)
    return np.concatenate([output.prompt_logprobs.logprobs for output in outputs if len(output.prompt_token_ids) > 1])


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_teacher_forced_log_probabilities_in_bfloat16(shipped_model, cache):
    kernels, reference = (prompt_logprobs(shipped_model, "bfloat16", which, cache) for which in (KERNELS, "reference"))
    exact = prompt_logprobs(shipped_model, "float32", "reference", cache)
    assert len(kernels) > 1000
    errors = {"kernels": kernels - exact, "reference": reference - exact, "between them": kernels - reference}
    for name, difference in errors.items():
        size = np.abs(difference)
        # Shown by `make gpu-test PYTEST_ARGS=-s`, for benchmarks/README.md.
        print(
            f"bfloat16, cache {cache}, {name}: mean {difference.mean():.1e}, of absolutes {size.mean():.1e}, "
            f"largest {size.max():.1e}"
        )
    # What bfloat16 rounds moves keys and values to another float of 8 bits: then the reference too is off from float32.
    bounded = errors if cache == "auto" else {"between them": errors["between them"]}
    assert max(abs(difference.mean()) for difference in bounded.values()) <= 5e-3
    # Each single one is rounded by bfloat16; the kernels' no worse than the reference's.
    assert np.abs(errors["kernels"]).mean() <= 1.1 * np.abs(errors["reference"]).mean()


def test_the_step_calls_the_kernels(shipped_model):
    with LLM(shipped_model, attention=KERNELS, **SMALL) as llm:
        keys = dict(llm._runner._all_keys())
        texts = {
            name: llm._runner._lower(name, keys[name], llm._runner._arguments(name, keys[name])).as_text()
            for name in ("decode", "mixed")
        }
    for name, kernels in {"decode": ("paged_decode", *EVERYWHERE), "mixed": ("paged_extend", *EVERYWHERE)}.items():
        for kernel in kernels:
            assert kernel in texts[name]


def test_close_gives_the_memory_back(shipped_model):
    device = jax.devices()[0]
    before = device.memory_stats()["bytes_in_use"]
    llm = LLM(shipped_model, attention=KERNELS, **SMALL)
    llm.generate("import", SamplingParams(max_tokens=4), use_tqdm=False)
    held = device.memory_stats()["bytes_in_use"]
    llm.close()
    assert held - before > 2**24  # 11 MB of weights, and the cache
    assert device.memory_stats()["bytes_in_use"] - before < 2**20
