"""Stages of fresh processes, the first with an empty compilation cache."""

import os

import pytest

from jaxengine.benchmark import startup
from jaxengine.errors import EngineError
from tests.tiny_llm import OPTIONS, model_folder


def test_a_process_is_timed_to_its_first_token():
    options = OPTIONS | {"model": str(model_folder()), "load_format": "dummy"}
    times = startup.start(options | {"compilation_cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}, input_len=5)
    assert list(times) == [*startup.STAGES, "all"]
    assert min(times.values()) > 0
    assert sum(times[stage] for stage in startup.STAGES) == pytest.approx(times["all"])


def test_a_process_that_fails_says_why():
    with pytest.raises(EngineError, match=r"failed: .*there is no folder or file /no/such"):
        startup.start({"model": "/no/such"}, input_len=5)


def test_the_first_cache_is_empty_and_the_others_are_full(monkeypatch):
    seen, done = [], []

    def start(options, input_len):
        cache = options["compilation_cache"]
        seen.append((options["page_size"], input_len, os.listdir(cache)))
        with open(f"{cache}/{len(seen)}", "w"):
            pass
        return dict.fromkeys([*startup.STAGES, "all"], float(len(seen)))

    monkeypatch.setattr(startup, "start", start)
    result = startup.run({"page_size": 16}, 8, runs=3, on_run=lambda *step: done.append(step))
    assert [(page_size, length, len(files)) for page_size, length, files in seen] == [(16, 8, i) for i in range(4)]
    assert done == [(i, 4) for i in range(1, 5)]
    assert (result["cold"]["all"], result["warm"]["all"], len(result["warm_runs"])) == (1.0, 3.0, 3)
    assert startup.table(result).splitlines()[-1].split() == ["all", "1.00", "3.00"]
