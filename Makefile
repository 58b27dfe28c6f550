# `make serve` and `make test` need nothing but Python 3.11 or newer and a C++ compiler.
# PYTHON=python3.12 chooses the interpreter, VENV=dir another environment, WORKERS=4 tests in four processes; MODEL, PORT
# and ARGS go to `ropeway serve`.
SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
MODEL ?= bundled
PORT ?= 8000
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.ropeway-installed
DEVELOP := $(VENV)/.ropeway-develop
BUILT := $(VENV)/.ropeway-kernels
LITELLM := $(VENV)/litellm/.installed
KERNEL_SOURCES := $(wildcard src/ropeway/runtime/kernels/*.py src/ropeway/runtime/kernels/cpu/*)

# Both ways of installing write to one environment.
.NOTPARALLEL:
.PHONY: help serve test test-gpu lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name what; do printf '%-14s %s\n' "$$name" "$$what"; done

serve: $(BUILT) ## set everything up, then serve the bundled model on http://127.0.0.1:8000
	@exec $(BIN)/ropeway serve $(MODEL) --port $(PORT) $(ARGS)

test: $(DEVELOP) $(LITELLM) $(BUILT) ## run the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-gpu: $(DEVELOP) $(BUILT) ## run what computes on a GPU there; without one only the kernels, in Triton's interpreter
	$(BIN)/python -m pytest tests/gpu_kernels tests/gpu tests/unit/runtime/test_runner.py $(ARGS)

lint: $(DEVELOP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(DEVELOP) $(BUILT) ## static against continuous batching on this machine, with a picture of the seats
	$(BIN)/ropeway bench batching $(ARGS)

evidence: $(DEVELOP) $(BUILT) ## measure what batching and its parts gain on this machine, and write docs/evidence (minutes)
	$(BIN)/python benchmarks/evidence $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Ropeway needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# Installing for development includes what serving needs, so it marks both as done.
$(DEVELOP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Ropeway with its development tools into $(VENV) (once; a few minutes)"
	@$(PIP) -e '.[dev]'
	@touch $(INSTALLED) $@

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Ropeway into $(VENV) (once; a few minutes)"
	@$(PIP) -e .
	@touch $@

# LiteLLM wants another version of the openai package than the one that is tested here: it gets a directory of its own.
$(LITELLM): constraints.txt | $(DEVELOP)
	@rm -rf $(@D)
	@$(PIP) --target $(@D) 'litellm[mcp]'
	@touch $@

$(BUILT): $(KERNEL_SOURCES) | $(INSTALLED)
	@$(BIN)/python -m ropeway.runtime.kernels.build
	@touch $@
