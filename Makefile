# One command each for the things people do. `make train` and `make test` set everything up on a
# fresh machine: they make .venv, install into it, and do it again only when the sources of the
# compiled part or the metadata have changed (the package is installed editable).
#
#   PYTHON=...   the Python to make .venv with (any 3.10 to 3.14; found on PATH)
#   VENV=...     another folder for the environment
#   ARGS=...     arguments of `dualpipe train`, of pytest or of a benchmark

VENV ?= .venv
ARGS ?=
# Processes that run tests at the same time. The tests of several ranks start their own beside.
JOBS ?= 2

CPU_TIER := "not gpu and not multi_gpu"

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# What an installed package is made from, besides Python files, which are used where they are.
SOURCES := pyproject.toml setup.py dualpipe_ext/toolkit.py dualpipe_ext/env.py \
           $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/csrc -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

.DEFAULT_GOAL := help
# Half an environment is none.
.DELETE_ON_ERROR:
.PHONY: help train test lint format gpu-test sanitize gpu-bench bench doctor clean distclean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

train: $(VENV)/.installed  ## Train a small MoE model on what this machine has
	$(BIN)/dualpipe train $(ARGS)

test: $(VENV)/.installed-dev  ## Run every test that needs no GPU
	@# Two processes: Triton either interprets kernels or compiles them, decided when it is imported.
	@status=0; \
	$(BIN)/python -m pytest -n $(JOBS) -m $(CPU_TIER) $(ARGS) || status=1; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -m $(CPU_TIER) tests/kernels || status=1; \
	exit $$status

lint: $(VENV)/.installed-lint  ## Check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed-lint  ## Rewrite the files in that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

gpu-test:  ## Run the GPU tests with the torch of PYTHON; downloads nothing
	tools/gpu_test.sh

sanitize:  ## Run the CUDA core's tests under compute-sanitizer
	tools/gpu_test.sh sanitize

gpu-bench:  ## Run every benchmark on GPUs with the torch of PYTHON; rows go to build/gpu
	tools/gpu_test.sh bench

bench: $(VENV)/.installed  ## Run every benchmark; rows go to benchmarks/results
	@set -- benchmarks/*.py; \
	if [ ! -e "$$1" ]; then echo "this version has no benchmarks" >&2; exit 2; fi; \
	for script; do $(BIN)/python "$$script" $(ARGS) || exit 1; done

doctor: $(VENV)/.installed  ## Say what this machine can do
	$(BIN)/dualpipe doctor

clean:  ## Remove what was built; keeps the environment
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f dualpipe_ext/_C.*.so $(VENV)/.installed $(VENV)/.installed-dev
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)

$(BIN)/python:
	python=$$(tools/find_python.sh) && "$$python" -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP) -e .
	@touch $@

# Includes the plain installation, so that is not run again after it.
$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@

# The linters need only themselves; their pinned versions are read from pyproject.toml.
$(VENV)/.installed-lint: pyproject.toml | $(BIN)/python
	$(PIP) $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@
