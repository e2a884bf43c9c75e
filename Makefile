# `make demo` and `make test` do their own set-up: all they need is make and a Python from 3.11 on.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
OLDEST := $(abspath $(VENV))-oldest
PEERS ?= $(abspath $(VENV))-peers
SERVERS := $(abspath $(VENV))-servers
MINIO := github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c
TOXIPROXY := github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0
export PATH := $(SERVERS):$(PATH)
BRINGING := store fetcher large failures errors
USING := express dataset bad_input workers life processes lookahead ranks cli vision
SOAK_S ?= 60
PARALLEL := --numprocesses 3 --dist worksteal
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint test-newest test-oldest test-full-lane test-minio test-thorough soak bench bench-peers docs servers clean

help:
	@echo "make demo    train on handwritten digits from a local S3 server, and see the difference"
	@echo "make test    lint, type check, and all tests; some again with the oldest aiobotocore, and on the full lane"
	@echo "make test-thorough  what varies these at length, and Lightning and Accelerate, and examples with MinIO (ten minutes more)"
	@echo "make test-minio  what only a real MinIO shows, also at length, behind toxiproxy, too; takes Go (two minutes)"
	@echo "make bench   cold and warm epochs beside one request per sample, and beside local files; memory; tables"
	@echo "make bench-peers  the same beside other libraries, in environments of their own, and one GET by itself"
	@echo "make soak    a minute of training through faults of network, disk and processes at random; SOAK_S=3600 for an hour"
	@echo "make docs    build the site of docs/ into site/, links and names checked"
	@echo "make servers  build MinIO and toxiproxy from source, which takes Go and some minutes; their tests are skipped otherwise"
	@echo "make clean   delete the environments, and the site"

demo: $(VENV)/.demo
	$(BIN)/asyncds demo

test: lint test-newest test-oldest test-full-lane

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-newest: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL)

# What speaks S3, once more with the oldest aiobotocore that is supported, the one that aioboto3 pins.
test-oldest: $(OLDEST)/.test
	PATH="$(BIN):$$PATH" $(OLDEST)/bin/python -m pytest $(PARALLEL) $(addprefix tests/test_,store.py lanes.py guards.py faults_network.py)
	PATH="$(BIN):$$PATH" $(OLDEST)/bin/python -m pytest -k aioboto3 tests/test_examples.py

# What brings objects, and what can go wrong with that, once more without the lean lane.
test-full-lane: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) --lane full $(addprefix tests/test_,$(addsuffix .py,$(BRINGING)))

# What only a real server shows: also 20,000 keys, 200 MB, and an absence of 20 s.
test-minio: $(VENV)/.test servers
	$(BIN)/python -m pytest $(PARALLEL) -m "thorough or not thorough" tests/test_minio.py tests/test_toxiproxy.py

test-thorough: $(VENV)/.test
	$(BIN)/python $(PIP) --editable '.[test,frameworks]'
	$(BIN)/python -m pytest $(PARALLEL) -m thorough
	$(BIN)/python -m pytest $(PARALLEL) --lane full $(addprefix tests/test_,$(addsuffix .py,$(USING)))

soak: $(VENV)/.test
	$(BIN)/python tests/soak.py --seconds $(SOAK_S)

bench: $(VENV)/.bench
	$(BIN)/python tests/benchmarks/epochs.py
	$(BIN)/python tests/benchmarks/memory.py
	$(BIN)/python tests/benchmarks/cache.py
	$(BIN)/python tests/benchmarks/lookahead.py
	$(BIN)/python tests/benchmarks/manifest.py
	$(BIN)/python tests/benchmarks/limiter.py
	$(BIN)/python tests/benchmarks/tail.py
	$(BIN)/python tests/benchmarks/warm.py
	$(BIN)/python tests/benchmarks/start.py
	$(MAKE) bench-peers

# A library whose environment cannot be made is a row of the tables that says so.
bench-peers: $(VENV)/.bench
	$(BIN)/python tests/benchmarks/environments.py --folder $(PEERS)
	$(BIN)/python tests/benchmarks/lanes.py --environments $(PEERS)
	$(BIN)/python tests/benchmarks/peers.py --environments $(PEERS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

servers: $(SERVERS)/minio $(SERVERS)/toxiproxy-server

# The community's MinIO is distributed as source.
$(SERVERS)/minio:
	GOBIN=$(SERVERS) go install $(MINIO)

$(SERVERS)/toxiproxy-server:
	GOBIN=$(SERVERS) go install $(TOXIPROXY)
	mv $(SERVERS)/server $@

clean:
	rm -rf $(VENV) $(OLDEST) $(PEERS) $(SERVERS) site

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

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/python $(PIP) --editable '.[docs]'
	@touch $@

# An environment whose own packages are the old ones, and which finds everything else, torch above all, in the first.
$(OLDEST)/.test: $(VENV)/.test
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) 'aioboto3==15.5.*' 'aiobotocore==2.25.1'
	$(BIN)/python -c 'import os, site; print(site.getsitepackages()[0], os.getcwd(), sep="\n")' > "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/newest.pth"
	@touch $@
