"""The runner's compiled programs on tiny models: their memory, no copies of the cache, a second start."""

import pytest

from jaxengine import LLM
from tests.compilation_cache import check_second_process_compiles_nothing
from tests.programs import check_memory, check_no_pool_copies, compile_undonated, pool_copies
from tests.tiny_llm import OPTIONS, model_folder


@pytest.fixture(scope="module", params=["llama", pytest.param("windows", marks=pytest.mark.full)])
def runner(request):
    with LLM(model_folder(request.param), warmup=True, **OPTIONS) as llm:
        yield llm._runner


def test_each_program_stays_within_the_planned_memory(runner):
    check_memory(runner)


def test_a_program_that_needs_more_is_an_error_in_tests(runner, monkeypatch):
    monkeypatch.setattr(runner, "temporary_bytes", 0)
    key, program = next(item for item in runner._programs.items() if item[0][0] == "mixed")
    with pytest.raises(AssertionError, match=r"program mixed .* needs \d+ bytes of temporary memory, 0 were planned"):
        runner._keep(key[0], key[1:], program)


def test_a_step_copies_no_pool(runner):
    check_no_pool_copies(runner)


def test_a_copied_pool_is_found(runner):
    copies = pool_copies(compile_undonated(runner, "decode"), runner._cache)
    assert len(copies) == 2 * runner.model.num_layers


def test_a_second_process_compiles_nothing(tmp_path):
    check_second_process_compiles_nothing(model_folder(), tmp_path, "xla", **OPTIONS)
