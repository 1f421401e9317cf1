"""What `import jaxengine` gives: these names, at once, and nothing else."""

import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxengine

NAMES = {
    "AsyncLLM",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "JaxEngineError",
    "LLM",
    "Logprob",
    "MemoryPlanError",
    "ModelNotFoundError",
    "ParamRule",
    "ParityReport",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "UnsupportedError",
    "UnsupportedModelError",
    "WeightsDeletedError",
    "__version__",
    "parity_report",
}


def test_the_exported_names():
    assert set(jaxengine.__all__) == NAMES
    assert set(dir(jaxengine)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_each_name_is_there_and_documented(name):
    found = getattr(jaxengine, name)
    assert found.__name__ == name
    assert found.__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        jaxengine.Nonsense  # noqa: B018


def test_every_error_is_exported():
    errors = importlib.import_module("jaxengine.errors")
    assert {name for name, value in vars(errors).items() if isinstance(value, type)} <= NAMES


def test_import_is_instant():
    code = "import sys, jaxengine; print(sorted({'jax', 'flax', 'numpy', 'transformers', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_version():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert jaxengine.__version__ == project["version"]


@pytest.mark.parametrize(
    "module",
    [
        "jaxengine",
        "jaxengine.llm",
        "jaxengine.text_methods",
        "jaxengine.async_llm",
        "jaxengine.config",
        "jaxengine.request",
        "jaxengine.handoff.parity",
    ],
)
def test_docstring_examples(module, shipped_model):
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert failed == 0
