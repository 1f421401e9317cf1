"""The runner's compiled programs on tiny models: their memory, no copies of the cache, a second start."""

from dataclasses import replace

import pytest

from jaxengine import LLM, SamplingParams
from tests.compilation_cache import check_second_process_compiles_nothing
from tests.programs import check_memory, check_no_pool_copies, compile_undonated, pool_copies
from tests.tiny_llm import OPTIONS, model_folder


@pytest.fixture(
    scope="module",
    params=[("llama", "fp8", "xla"),
            *(pytest.param(param, marks=pytest.mark.full) for param in (
                ("llama", "auto", "xla"), ("llama", "fp8", "reference"), ("windows", "auto", "xla"),
                ("experts", "auto", "xla"), ("sinks", "auto", "xla")))],
    ids=str,
)  # fmt: skip
def runner(request):
    kind, cache, attention = request.param
    options = OPTIONS | {"kv_cache_dtype": cache, "attention": attention}
    with LLM(model_folder(kind), warmup=True, steps_per_call=3, **options) as llm:
        yield llm._runner


def test_each_program_stays_within_the_planned_memory(runner):
    check_memory(runner)


def test_a_program_that_needs_more_is_an_error_in_tests(runner, monkeypatch):
    monkeypatch.setattr(runner, "temporary_bytes", 0)
    name, *key = next(key for key in runner._programs if key[0] == "mixed")
    monkeypatch.delitem(runner._programs, (name, *key))
    with pytest.raises(AssertionError, match=r"program mixed .* needs \d+ bytes of temporary memory, 0 were planned"):
        runner._program(name, tuple(key))


def test_a_step_copies_no_pool(runner):
    check_no_pool_copies(runner)


def test_a_copied_pool_is_found(runner):
    copies = pool_copies(compile_undonated(runner, "decode"), runner._cache)
    assert len(copies) == 2 * runner.model.num_layers


def test_a_second_process_compiles_nothing(tmp_path):
    check_second_process_compiles_nothing(model_folder(), tmp_path, "xla", stored=False, **OPTIONS)


def test_the_decode_step_is_compiled_beside_the_first_prompts():
    params = SamplingParams(temperature=0, max_tokens=1)
    with LLM(model_folder(), steps_per_call=2, **OPTIONS) as llm:
        llm.generate([[5, 6, 7]], params, use_tqdm=False)
        assert [key[0] for key in llm._runner._compiler.waiting] == ["decode", "decode"]
        assert not any(key[0] == "decode" for key in llm._runner._programs)
        llm.generate([[5, 6, 7]], replace(params, max_tokens=4), use_tqdm=False)
        assert not llm._runner._compiler.waiting
        assert sorted(key[0] for key in llm._runner._programs) == ["decode", "decode", "head", "mixed", "write_slots"]
