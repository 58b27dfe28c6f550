# `make serve` and `make test` need nothing but Python 3.11 or newer; a C++ compiler makes what they compute faster.
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
UNAUDITED ?= 1

BIN := $(VENV)/bin
PIP := python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.ropeway-installed
DEVELOP := $(VENV)/.ropeway-develop
BUILT := $(VENV)/.ropeway-kernels
LITELLM := $(VENV)/litellm/.installed
AUDIT := $(VENV)/audit/bin/pip-audit
ASK := $(AUDIT) --strict --no-deps --disable-pip --requirement
# The lower three floors without torch: what coverage is strictest with.
CORE := src/ropeway/*.py,src/ropeway/contract/*,src/ropeway/config/*,src/ropeway/modelspec/*,src/ropeway/scheduler/*,$\
	src/ropeway/kv/*,src/ropeway/text/*,src/ropeway/store/*,src/ropeway/experiment/*,src/ropeway/engine/*,$\
	src/ropeway/recorder/*,src/ropeway/remote/*,src/ropeway/scene/*,src/ropeway/sim/*
KERNEL_SOURCES := $(wildcard src/ropeway/runtime/kernels/*.py src/ropeway/runtime/kernels/cpu/*)

# Folders of programs, each of which imports what lies beside it.
PROGRAMS := $(sort $(dir $(wildcard deploy/*.py examples/*.py $(foreach depth,* */* */*/*,benchmarks/$(depth).py))))

# Both ways of installing write to one environment.
.NOTPARALLEL:
.PHONY: help serve test explore test-gpu lint mutation coverage bench evidence audit dist lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name what; do printf '%-17s %s\n' "$$name" "$$what"; done

serve: $(BUILT) ## set everything up, then serve the bundled model on http://127.0.0.1:8000
	@exec $(BIN)/ropeway serve $(MODEL) --port $(PORT) $(ARGS)

test: $(DEVELOP) $(LITELLM) $(BUILT) ## run the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

explore: override ARGS += -m hypothesis --hypothesis-profile explore
explore: test ## run the tests that draw examples, with others than `make test` always has (minutes)

test-gpu: $(DEVELOP) $(BUILT) ## run what computes on a GPU there; without one only the kernels, in Triton's interpreter
	$(BIN)/python -m pytest tests/gpu_kernels tests/gpu tests/unit/runtime/test_lane.py tests/unit/runtime/test_runner.py $(ARGS)

lint: $(DEVELOP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for place in $(PROGRAMS); do echo "mypy $$place*.py"; \
		MYPYPATH=benchmarks $(BIN)/mypy --allow-untyped-calls $$place*.py || exit 1; done

coverage: $(DEVELOP) $(LITELLM) $(BUILT) ## run the whole suite, and say which branches it took in all its processes
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --fail-under 85
	$(BIN)/coverage report --skip-covered --fail-under 95 --include '$(CORE)'

mutation: $(DEVELOP) ## plant small mistakes in the scheduler and the KV memory: do the tests notice? (ten minutes to an hour)
	$(BIN)/python tests/mutation $(ARGS)

bench: $(DEVELOP) $(BUILT) ## static against continuous batching on this machine, with a picture of the seats
	$(BIN)/ropeway bench batching $(ARGS)

evidence: $(DEVELOP) $(BUILT) ## measure what batching and its parts gain on this machine, and write docs/evidence (minutes)
	$(BIN)/python benchmarks/evidence $(ARGS)

# A version that is known to be vulnerable has to be found first: otherwise nobody has been asked.
audit: $(AUDIT) ## look for known vulnerabilities in the versions that are tested (asks PyPI)
	@echo requests==2.19.0 > $(VENV)/audit/known.txt
	@if $(ASK) $(VENV)/audit/known.txt 2>&1 | grep -q PYSEC-2018-28; then $(ASK) constraints.txt; else \
		echo "NOT AUDITED: PyPI's database of vulnerabilities does not answer from here (mirrors have none)." >&2; \
		exit $(UNAUDITED); fi

dist: $(DEVELOP) ## build the wheel and the source distribution
	rm -rf dist
	$(BIN)/python -m hatchling build

lock: ## renew constraints.txt: the newest of everything, in an environment of its own
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/$(PIP) -e '.[dev]'
	{ sed -n '/^#/p' constraints.txt; \
		build/lock/bin/python -m pip freeze --exclude-editable | \
		sed -e 's/+.*//' -e '/^triton==/d' -e '/^nvidia-/d' -e '/^cuda-/d'; } > build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt
	rm -rf build/lock

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist bench-results .coverage* src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Ropeway needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# Installing for development includes what serving needs, so it marks both as done.
$(DEVELOP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Ropeway with its development tools into $(VENV) (once; a few minutes)"
	@$(BIN)/$(PIP) -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED) $@

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Ropeway into $(VENV) (once; a few minutes)"
	@$(BIN)/$(PIP) -c constraints.txt -e .
	@touch $@

# LiteLLM wants other versions of packages than those that are tested here: it gets a directory of its own.
$(LITELLM): constraints.txt | $(DEVELOP)
	@rm -rf $(@D)
	@$(BIN)/$(PIP) --target $(@D) 'litellm[mcp]'
	@touch $@

$(AUDIT): | $(BIN)/python
	@$(BIN)/python -m venv $(VENV)/audit
	@$(VENV)/audit/bin/$(PIP) pip-audit

$(BUILT): $(KERNEL_SOURCES) | $(INSTALLED)
	@if $(BIN)/python -m ropeway.runtime.kernels.build; then touch $@; else echo "Going on without them: slower."; fi
