"""Decode steps of few rows by one kernel a layer (Hopper): the kernel against its twin, and whole engines with it."""

import json
from functools import partial
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from jaxengine import LLM, SamplingParams
from pallas_kernels.paged_tile import on_mosaic_card
from tests.pallas_kernels.cases import decode_layer_inputs, relative_error
from tests.programs import pool_copies

HOPPER = jax.default_backend() == "gpu" and on_mosaic_card()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs Hopper")]
LLAMA_1B = {"hidden": 2048, "heads": 32, "kv_heads": 8, "dim": 64, "inner": 8192}
QWEN3_600M = {"hidden": 1024, "heads": 16, "kv_heads": 8, "dim": 128, "inner": 3072, "normed": True}
ODD = {"hidden": 1920, "heads": 20, "kv_heads": 5, "dim": 64, "inner": 2560, "page_size": 8, "normed": True}
APART = {"hidden": 2048, "heads": 32, "kv_heads": 32, "dim": 64, "inner": 2048, "page_size": 64}  # two items a program
SHARED = {"hidden": 2048, "heads": 64, "kv_heads": 1, "dim": 64, "inner": 2048, "page_size": 32}
LENGTHS = [(257,), (5, 0, 300, 64, 65, 1000, 1, 129), (1000,) * 8, (17, 3000)]
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 2000, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = 24
full = partial(pytest.param, marks=pytest.mark.full)
PROMPTS = [[(7 * i + 3 * j) % 2000 for j in range(length)] for i, length in enumerate((5, 40, 130, 200, 7, 60))]


def two_layers(layer, qkv, stream, k_pages, v_pages, *others):
    layer, (*rest, counters) = partial(layer, eps=1e-5, scale=0.1), others
    first, after, k_pages, v_pages, counters = layer(qkv, stream, k_pages, v_pages, *rest, counters)
    second, last, k_pages, v_pages, _ = layer(first, after, k_pages, v_pages, *rest, counters)
    return (first, after, second, last), (k_pages, v_pages)


@pytest.mark.parametrize("shape", [LLAMA_1B, ODD, APART, *map(full, (QWEN3_600M, SHARED))], ids=str)
def test_the_kernel_gives_what_its_twin_gives(shape):
    run, twin = (jax.jit(partial(two_layers, f)) for f in (kernels.decode_layer, kernels.decode_layer_reference))
    for seed, lengths in enumerate(LENGTHS):
        args = decode_layer_inputs(**shape, lengths=lengths, longest=3000, seed=seed)
        (found, pools), (again, _) = run(*args), run(*args)
        want, want_pools = twin(*jax.device_put(args, jax.devices("cpu")[0]))
        live = np.asarray(args[6]) > 0
        for got, same, expected in zip(found, again, want):
            got, same, expected = (np.asarray(x, np.float32)[live] for x in (got, same, expected))
            assert relative_error(got, expected) < 1e-2, lengths
            np.testing.assert_array_equal(got, same)
        for got, expected, before in zip(pools, want_pools, args[2:4]):
            assert relative_error(got, expected) < 1e-3 < relative_error(got, before)


@pytest.mark.parametrize("shape", [APART, full(QWEN3_600M)], ids=str)
def test_what_is_not_a_rows_own_reaches_it_in_no_way(shape):
    """NaN in rows without a token, on the null page, and on every page from the new key on."""
    run = jax.jit(partial(two_layers, kernels.decode_layer))
    for lengths in LENGTHS:
        args = decode_layer_inputs(**shape, lengths=lengths, longest=max(lengths))
        qkv, stream, *pools, _, table, length, page, offset, _, _, _ = args
        live, size = np.asarray(length) > 0, pools[0].shape[2]
        spare = np.ones((len(pools[0]), size), bool)
        for columns, keys in zip(np.asarray(table), np.asarray(length) - 1):
            spare[columns[np.arange(keys) // size], np.arange(keys) % size] = False
        qkv, stream = jnp.where(live[:, None, None], qkv, jnp.nan), jnp.where(live[:, None], stream, jnp.nan)
        pools = [jnp.where(spare[:, None, :, None], jnp.nan, pool) for pool in pools]
        found, written = run(qkv, stream, *pools, *args[4:])
        for got, want in zip(found, run(*args)[0]):
            assert np.isfinite(np.asarray(want, np.float32)[live]).all()
            np.testing.assert_array_equal(np.asarray(got, np.float32)[live], np.asarray(want, np.float32)[live])
        places = np.asarray(page)[live], slice(None), np.asarray(offset)[live]
        for before, after in zip(pools, written):
            assert np.isfinite(np.asarray(after[places], np.float32)).all()
            want = before.at[places].set(after[places])
            np.testing.assert_array_equal(np.asarray(after, np.float32), np.asarray(want, np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("wide")
    (found / "config.json").write_text(json.dumps(CONFIG))
    return found


def opened(folder, **options):
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512, "kv_cache_memory_bytes": 2**27}
    return LLM(folder, load_format="dummy", **(sizes | options))


def answers(folder, steps, **options):
    """Prompts and greedy tokens after them, all together and one alone."""
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    with opened(folder, attention="triton", steps_per_call=steps, **options) as llm:
        outputs = [o for asked in (PROMPTS, PROMPTS[2:3]) for o in llm.generate(asked, greedy, use_tqdm=False)]
        decode = [program for key, program in llm._runner._programs.items() if key[0] == "decode"]
        assert len(decode) >= 2 and all("decode_layer" in program.as_text() for program in decode)
        for program in decode:
            assert not pool_copies(program, llm._runner._cache)
            assert program.memory_analysis().temp_size_in_bytes <= llm._runner.temporary_bytes
    return [output.prompt_token_ids + list(output.outputs[0].token_ids) for output in outputs]


def check_tokens(folder, whole):
    """They are the reference's best ones, or nearly so, as rounding may choose between two; of a wrong layer they would
    be any.
    """
    scores = SamplingParams(max_tokens=0, prompt_logprobs=1, detokenize=False)
    with opened(folder, attention="reference") as llm:
        outputs = llm.generate(whole, scores, use_tqdm=False)
    found = [output.prompt_logprobs for output in outputs]
    gaps = np.concatenate([(each.top_logprobs[:, 0] - each.logprobs)[-TOKENS:] for each in found])
    assert gaps.shape == (TOKENS * len(whole),) and (gaps >= 0).all()
    print(f"below the best in the mean {gaps.mean():.4f}, at most {gaps.max():.4f}")
    assert gaps.mean() < 0.02 and gaps.max() < 0.3


def test_tokens_are_the_references_best_ones(folder):
    check_tokens(folder, answers(folder, steps=1) + answers(folder, steps=4))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("axis", ["data_parallel_size", "pipeline_parallel_size"])
def test_devices_that_do_not_split_layers(folder, axis):
    check_tokens(folder, answers(folder, steps=4, **{axis: 2}))


@pytest.mark.full
def test_two_engines_take_turns(folder):
    """A kernel needs all its programs at once: halves of two would wait for one another for ever."""
    greedy = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    with opened(folder, attention="triton") as one, opened(folder, attention="triton") as other:
        found = {}

        def work(llm):
            found[llm] = llm.generate(PROMPTS, greedy, use_tqdm=False)

        threads = [Thread(target=work, args=(llm,), daemon=True) for llm in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [len(o.outputs[0].token_ids) for llm in (one, other) for o in found[llm]] == [200] * 12
