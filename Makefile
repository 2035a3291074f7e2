.PHONY: demo test test-all check
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# pytest processes; a test of several ranks starts its own beside them
JOBS ?= 2

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "moe-accel needs python >= 3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,examples]'
	touch $@

demo: $(STAMP)   ## the main job on a small MoE: 2 processes, experts spread over both, about 3 minutes on 2 cores
	$(BIN)/python examples/demo.py

test: $(STAMP)   ## what CI runs
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(STAMP)   ## with the big matrices, and a pretrained model that is downloaded
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[real]'
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not gpu'

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
