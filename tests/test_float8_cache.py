"""An engine whose KV cache holds floats of 8 bits: what it rounds, and that nothing else changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import LLM, ConfigError, EngineConfig, SamplingParams
from jaxengine.weights import open_checkpoint
from tests.models.harness import PagedModel
from tests.pallas_kernels.cases import naive_stored
from tests.tiny_llm import (
    MAX_LENGTH,
    OPTIONS,
    VOCAB,
    canonical_params,
    check_integrity,
    dense_logprobs,
    model_folder,
    restrict,
)

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, length).tolist() for i, length in enumerate((60, 5, 33, 1, 47))]


@pytest.fixture(scope="module")
def llm():
    with LLM(model_folder(), kv_cache_dtype="fp8", **OPTIONS) as llm:
        yield llm


def tokens(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def rounded(dtype):
    return lambda x: naive_stored(x.astype(np.float32), jnp.dtype(dtype)).astype(np.float64)


@pytest.mark.parametrize(
    "name, dtype",
    [("fp8", E4M3), ("fp8_e4m3", E4M3), ("fp8_e5m2", E5M2), (E4M3, E4M3), (jnp.float8_e5m2, E5M2), ("half", "float16"),
     (jnp.dtype(E4M3), E4M3), ("auto", "auto")],
)  # fmt: skip
def test_names(name, dtype):
    assert EngineConfig(kv_cache_dtype=name).kv_cache_dtype == dtype


def test_other_names_are_refused():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int8' is not one of auto, .*fp8_e5m2"):
        EngineConfig(kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"dtype='fp8' is not one of auto, half, float, float16, bfloat16, float32$"):
        EngineConfig(dtype="fp8")


@pytest.mark.parametrize("name, dtype", [("fp8", E4M3), ("fp8_e5m2", E5M2)])
def test_log_probabilities_are_those_of_a_model_whose_keys_and_values_are_rounded(name, dtype):
    asked = [ids for ids in PROMPTS if len(ids) > 1]
    with LLM(model_folder(), kv_cache_dtype=name, **OPTIONS) as llm:
        found = llm.logprobs(asked)
    errors, effect = [], []
    for ids, got in zip(asked, found):
        expected = dense_logprobs(ids, rounded(dtype))
        errors.append(np.abs(got - expected).max())
        effect.append(np.abs(expected - dense_logprobs(ids)).max())
    assert min(effect) > 1e-2
    # In one of them a value may lie so near the middle of two that float32 and float64 round it differently.
    assert sorted(errors)[-2] < 1e-4 and max(errors) < 1


def test_in_bfloat16_log_probabilities_lie_about_those_of_rounded_keys_and_values():
    """What bfloat16 rounds otherwise may move a value to the next float of 8 bits, an eighth away at most: so
    the error is larger than without such a cache, but smaller than that of not rounding at all, and without a drift.
    """
    asked = [ids for ids in PROMPTS if len(ids) > 1]
    exact, plain = (
        np.concatenate([dense_logprobs(ids, held) for ids in asked]) for held in (rounded(E4M3), lambda x: x)
    )
    with LLM(model_folder(), dtype="bfloat16", kv_cache_dtype="fp8", **OPTIONS) as llm:
        found = np.concatenate(llm.logprobs(asked))
    error = np.abs(found - exact).mean()
    assert error < 0.7 * np.abs(found - plain).mean(), (error, np.abs(found - plain).mean())
    assert abs((found - exact).mean()) < 0.05


def test_xla_gives_the_tokens_of_the_reference(llm):
    assert llm._runner._cache.k[0].dtype == jnp.uint8 and llm.config.kv_cache_dtype == E4M3
    with LLM(model_folder(), kv_cache_dtype=jnp.float8_e4m3fn, attention="reference", **OPTIONS) as other:
        assert tokens(other) == tokens(llm)
    with LLM(model_folder(), **OPTIONS) as other:
        assert tokens(other) != tokens(llm)


def test_prefix_cache_chunks_and_preemption_change_nothing(llm):
    llm.reset_prefix_cache()
    first = tokens(llm)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert outputs[0].num_cached_tokens == 56
    assert [output.outputs[0].token_ids for output in outputs] == first
    before = llm.get_metrics()["num_preemptions"]
    restrict(llm, pages=14, max_num_batched_tokens=16)
    assert tokens(llm) == first
    assert llm.get_metrics()["num_preemptions"] > before
    check_integrity(llm)
    restrict(llm)


def test_it_sleeps_and_takes_other_weights(llm):
    first = tokens(llm)
    llm.sleep(level=1)
    llm.wake_up()
    assert tokens(llm) == first
    llm.update_weights({path: -x if "o_proj" in path else x for path, x in canonical_params().items()})
    assert tokens(llm) != first
    llm.update_weights(canonical_params())
    assert tokens(llm) == first


def test_a_prompt_in_chunks_leaves_what_a_whole_one_does():
    model = PagedModel(open_checkpoint(model_folder()).config, canonical_params(), MAX_LENGTH, rows=1, cache_dtype=E4M3)
    ids = PROMPTS[0]
    model.extend({0: ids})
    whole = [np.asarray(pool).view(np.uint8) for pool in (*model.cache.k, *model.cache.v)]
    model.reset()
    for start, end in ((0, 7), (7, 8), (8, 40), (40, 60)):
        model.extend({0: ids[start:end]})
    chunks = [np.asarray(pool).view(np.uint8) for pool in (*model.cache.k, *model.cache.v)]
    different = [(x != y).mean() for x, y in zip(whole, chunks)]
    assert different[0] == different[2] == 0  # the first layer's: there is no attention before it
    assert max(different) < 1e-4
