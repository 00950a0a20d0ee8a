# Errata. Bare `make` lists the targets; every target is safe to repeat and sets up what it needs.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
FAISS ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all bench soak lint format types clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first: with none installed, the project's own range would take the newest CUDA build of several gigabytes.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: expected Python 3.11 or newer as '$(PYTHON)'; name yours with PYTHON=…" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(FAISS),dev]"
	@touch $@

install: $(STAMP)  ## virtual environment, torch, the project

demo: $(STAMP)  ## edits through the gate into a registered model, on the built-in base
	$(BIN)/errata demo

test: $(STAMP)  ## all tests but a few long ones; no network, no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-all: $(STAMP)  ## those too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(STAMP)  ## print the benchmarks; each says what it measures
	$(BIN)/python -m benchmarks.edit_quality
	$(BIN)/python -m benchmarks.casting
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.edit_speed
	$(BIN)/python -m benchmarks.withdrawal
	$(BIN)/python -m benchmarks.withdrawal_trace
	$(BIN)/python -m benchmarks.long_run
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos
	$(BIN)/python -m benchmarks.orchestration
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.moments
	$(BIN)/python -m benchmarks.spread
	$(BIN)/python -m benchmarks.calibration
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.neuron_lookup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.neuron_quality
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.neuron_ablations
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.retrieval
	$(BIN)/python -m benchmarks.contextual_base
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.context_quality
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.edit_costs
	$(BIN)/errata bench --quick
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.collapse

soak: $(STAMP)  ## 200 scheduled batches with faults; more than half an hour
	$(BIN)/python -m benchmarks.soak

lint: $(STAMP) types  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## mypy, strict on errata/ and registry/
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches of this checkout
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
