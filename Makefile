PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# a worker per core, at most four, each of one thread; NODELENS_DATA=<folder> adds the tests on real images and trained networks;
# compiled files are kept even if the environment says otherwise, or each process that a test starts compiles the package again
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# a minute: runs from end to end, the order of the rooms, every metric through a pass, golden numbers, the laws
CHECK = tests/app/test_tasks.py tests/test_structure.py tests/metrics/test_every_metric.py tests/test_golden.py \
	tests/metrics/test_laws_metrics.py tests/statistics/test_laws_statistics.py

.PHONY: help setup run check test test-all lint docs bench clean

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

check: $(VENV)/.stamp  ## the most telling tests, in about a minute
	$(PYTEST) -m 'not slow' $(CHECK)

test: $(VENV)/.stamp  ## all tests but the slow ones
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.stamp  ## the slow tests too
	$(PYTEST)

lint: $(VENV)/.stamp  ## style, docstrings, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp  ## the documentation, in site/; a broken link is an error
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.stamp  ## what measuring and pruning cost, beside the bare pass, goals and peers, in at most 10 minutes
	$(BIN)/python benchmarks/bench.py

clean:  ## remove the virtual environment and caches; results stay
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache
