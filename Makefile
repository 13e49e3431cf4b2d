# Two commands serve a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint types contracts modes verify screenshot clean

help:  ## what can be made here
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP)  ## a virtual environment with gradwatch and all it needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradwatch needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) -V`; say make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup  ## train on handwritten digits, watched; then once more with the advice followed
	$(BIN)/gradwatch demo

# Two workers on two cores: threads of tiny operations would only wait for one another.
test modes verify: export OMP_NUM_THREADS = 1

test: setup lint types contracts  ## style, types, layers and all quick tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

modes: setup  ## docs/modes.md: what is measured in which mode, from the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/modes --modes=docs/modes.md

verify: setup  ## the long experiments of the theory pages; writes docs/verification.md
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "slow or not slow" \
		--verification=docs/verification.md

screenshot: setup  ## docs/images/tensorboard.png from a new run of the demo; needs chromium
	$(BIN)/python docs/screenshot.py

clean:
	rm -rf $(VENV) runs build dist
