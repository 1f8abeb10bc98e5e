PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help setup run test test-all lint bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile | awk -F': ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(VENV)/.stamp  ## make the virtual environment in .venv and install everything

$(VENV)/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

run: $(VENV)/.stamp  ## train the small default network, its units measured every epoch, and analyse it
	run=outputs/first/$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/python train.py callbacks=measure hydra.run.dir=$$run/train && \
	$(BIN)/python analyze.py ckpt_path=$$run/train/checkpoints/best.ckpt hydra.run.dir=$$run/analyze

test: $(VENV)/.stamp  ## the tests (NODELENS_DATA=<folder> adds those on real images and trained networks)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not slow'

test-all: $(VENV)/.stamp  ## the slow tests too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.stamp  ## style, docstrings, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.stamp  ## what measuring costs, beside the bare forward pass
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/synergy.py

clean:  ## remove the virtual environment and caches; results stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
