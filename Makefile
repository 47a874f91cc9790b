# Two commands do everything: `make demo` and `make test`. Both set up .venv on first use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format bench bench-losses bench-store bench-teacher bench-train bench-flows stack-up stack-down docs clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.ready  ## Run the whole system on built-in scenes (a few minutes on two CPU cores)
	$(BIN)/rdd run configs/quickstart.yaml

test: $(VENV)/.ready-dev lint  ## Check style, types and layers, then run all tests
	./scripts/install-system-packages
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

test-gpu: $(VENV)/.ready-dev  ## Run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest tests/gpu --durations=10

lint: $(VENV)/.ready-dev  ## Check style, types, and the direction of dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready-dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-losses bench-store bench-teacher bench-train bench-flows  ## Run all benchmarks

bench-losses: $(VENV)/.ready-dev  ## Time and memory of the losses
	$(BIN)/python bench/losses.py

bench-store: $(VENV)/.ready-dev  ## Bytes, time and memory of the map store beside other formats
	$(BIN)/python bench/store.py

bench-teacher: $(VENV)/.ready-dev  ## The teacher pass over its bare forward loop
	$(BIN)/python bench/teacher.py

bench-train: $(VENV)/.ready-dev  ## Loading, and training from stored maps beside its alternatives
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/train.py

bench-flows: $(VENV)/.ready-dev  ## What Prefect and Dask add
	$(BIN)/python bench/flows.py

stack-up: $(VENV)/.ready-dev  ## Start PostgreSQL, Redis, Prefect, Dask and S3 here (docs/operations.md)
	./scripts/install-system-packages
	$(BIN)/rdd stack up

stack-down: $(VENV)/.ready-dev  ## Stop them; their data are kept
	$(BIN)/rdd stack down

docs: $(VENV)/.ready-dev  ## Run the code blocks of README and docs
	$(BIN)/python -m pytest tests/test_docs.py

clean:  ## Remove the environment and caches; runs are kept
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rdd-maps needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Setting up $(VENV) (once; about two minutes)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Setting up $(VENV) with the development tools (once; about two minutes)"
	$(PIP_INSTALL) -e '.[dev]'
	$(BIN)/python -m pip check
	@touch $@ $(VENV)/.ready
