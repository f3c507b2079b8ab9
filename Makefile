# Everything happens in $(VENV), which `make install` creates and every other target brings up to date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
MARGINAL ?= sequence
# more options for pytest, for example: make test PYTEST_ARGS="tests/ops -x"; "-n 0" runs all in one process
PYTEST_ARGS ?=
# make gate GATE_ARGS=--update writes benchmarks/gate.json
GATE_ARGS ?=

BIN := $(VENV)/bin
# pip shows its progress to a person and keeps quiet in continuous integration
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install $(if $(CI),--quiet)
# One process for each core, but no more than 16, since each collects all tests first. worksteal gives
# neighbouring tests to the same process, so nearly every fixture of a module is made once.
PYTEST := $(BIN)/python -m pytest --durations=10 -n logical --maxprocesses 16 --dist worksteal
INSTALLED := $(VENV)/.installed
UNPINNED_TRITON := $(VENV)/constraints-without-triton.txt
# its tests skip themselves where it is not built, and here it has been
EXPECT_EXTENSION := FASTRAG_EXPECT_EXT=1
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS=$$'\t' read -r target text; do printf '  make %-15s %s\n' "$$target" "$$text"; done

.PHONY: install
install: $(INSTALLED) ## create .venv with everything that the targets below need (PYTHON=python3)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fastrag needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first and without the triton pin: a CUDA build of torch brings the one triton that it
# works with, a CPU build brings none.
$(INSTALLED): $(BIN)/python setup.py pyproject.toml constraints.txt $(CXX_SOURCES)
	@grep -v '^triton==' constraints.txt > $(UNPINNED_TRITON)
	@echo "installing torch and the build tools"
	@$(PIP_INSTALL) -c $(UNPINNED_TRITON) torch numpy setuptools wheel pybind11
	@$(BIN)/python -m pip show --quiet triton 2>/dev/null || $(PIP_INSTALL) -c constraints.txt triton
	@echo "installing fastrag with what its tests, its demo and its benchmarks need"
	@$(PIP_INSTALL) -c $(UNPINNED_TRITON) --no-build-isolation -e '.[test,demo,bench]'
	@touch $@
	@echo "installed into $(VENV)"

.PHONY: test
test: $(INSTALLED) ## the quick half of the tests, with the examples in the docstrings
	@$(EXPECT_EXTENSION) $(PYTEST) --timeout 300 -m "not slow and not gpu" $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(INSTALLED) ## the heavy half: architectures, builds and installs, kills and resumes, the gate
	@$(EXPECT_EXTENSION) $(PYTEST) --timeout 1500 -m "slow and not gpu" $(PYTEST_ARGS)

.PHONY: lint
lint: $(INSTALLED) ## ruff, mypy on fastrag and kernels, clang-format on all C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --allow-untyped-defs --allow-incomplete-defs kernels
	$(if $(CXX_SOURCES),@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(wildcard tests/csrc/*.cpp benchmarks/*.cpp))

.PHONY: demo
demo: $(INSTALLED) ## train retriever and generator from scratch, a few minutes on two cores (SEED=0 MARGINAL=sequence)
	@$(BIN)/python -m examples.demo.run --seed $(SEED) --marginal $(MARGINAL) --out runs/demo

.PHONY: demo-ablation
demo-ablation: $(INSTALLED) ## the demo against its ablations, seeds 0 to 2
	@$(BIN)/python -m examples.demo.ablation

.PHONY: bench
bench: $(INSTALLED) ## time all ops against their peers in under 10 minutes (BENCH_ARGS="--op mips": all of one)
	@$(BIN)/python -m benchmarks.run $(or $(BENCH_ARGS),--op all --budget-minutes 9)

.PHONY: gate
gate: $(INSTALLED) ## compare instruction counts, registers and allocations with the committed ones
	@$(BIN)/python -m benchmarks.gate $(GATE_ARGS)

.PHONY: plots
plots: $(INSTALLED) ## draw the figures and write the tables of the documentation from the committed CSVs
	@$(BIN)/python -m benchmarks.plot

.PHONY: clean
clean: ## remove build outputs and caches; .venv and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
