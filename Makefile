# `make demo` and `make test` do their own set-up: all they need is make and a Python from 3.11 on.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
OLDEST := $(abspath $(VENV))-oldest
PEERS ?= $(abspath $(VENV))-peers
PARALLEL := --numprocesses 2 --dist worksteal
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint test-newest test-oldest test-thorough bench bench-peers clean

help:
	@echo "make demo    train on handwritten digits from a local S3 server, and see the difference"
	@echo "make test    lint, type check, and all tests with the newest and the oldest aiobotocore"
	@echo "make test-thorough  what varies these at length, and Lightning and Accelerate (ten minutes more)"
	@echo "make bench   cold and warm epochs beside one request per sample, and beside local files; memory; tables"
	@echo "make bench-peers  the same beside other libraries, in environments of their own, and one GET by itself"
	@echo "make clean   delete the environments"

demo: $(VENV)/.demo
	$(BIN)/asyncds demo

test: lint test-newest test-oldest

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-newest: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL)

# What speaks S3, once more with the oldest aiobotocore that is supported, the one that aioboto3 pins.
test-oldest: $(OLDEST)/.test
	PATH="$(BIN):$$PATH" $(OLDEST)/bin/python -m pytest $(PARALLEL) tests/test_store.py tests/test_dataset.py

test-thorough: $(VENV)/.test
	$(BIN)/python $(PIP) --editable '.[test,frameworks]'
	$(BIN)/python -m pytest $(PARALLEL) -m thorough

bench: $(VENV)/.bench
	$(BIN)/python tests/benchmarks/epochs.py
	$(BIN)/python tests/benchmarks/memory.py
	$(BIN)/python tests/benchmarks/cache.py
	$(BIN)/python tests/benchmarks/lookahead.py
	$(BIN)/python tests/benchmarks/manifest.py
	$(MAKE) bench-peers

# A library whose environment cannot be made is a row of the tables that says so.
bench-peers: $(VENV)/.bench
	$(BIN)/python tests/benchmarks/environments.py --folder $(PEERS)
	$(BIN)/python tests/benchmarks/lanes.py --environments $(PEERS)
	$(BIN)/python tests/benchmarks/peers.py --environments $(PEERS)

clean:
	rm -rf $(VENV) $(OLDEST) $(PEERS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "asyncds needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch and torchvision come together from PyPI: a torch built for CPUs only does not load PyPI's torchvision.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python $(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python $(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python $(PIP) --editable '.[test,bench]'
	@touch $@

# An environment whose own packages are the old ones, and which finds everything else, torch above all, in the first.
$(OLDEST)/.test: $(VENV)/.test
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) 'aioboto3==15.5.*' 'aiobotocore==2.25.1'
	$(BIN)/python -c 'import os, site; print(site.getsitepackages()[0], os.getcwd(), sep="\n")' > "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/newest.pth"
	@touch $@
