# Everything happens in .venv, which is made when it is missing. Needs Python 3.11 or newer with
# its venv module (Debian: apt-get install python3-venv).
PYTHON ?= python3
BENCH ?= train_throughput
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
BASE := .venv/installed
DEV := .venv/installed-dev

.DEFAULT_GOAL := help
.PHONY: help speedrun test lint bench
.DELETE_ON_ERROR:

help:
	@echo 'make speedrun   raise a small model from text to a proven release (recipes/speedrun.yaml)'
	@echo 'make test       ruff, mypy and pytest'
	@echo 'make lint       ruff and mypy'
	@echo 'make bench      a side-by-side benchmark; BENCH=NAME chooses it ($(BENCH))'

speedrun: $(BASE)
	$(BIN)/vicugna run recipes/speedrun.yaml

test: lint
	$(BIN)/pytest -q

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/vicugna bench $(BENCH)

$(BASE): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv; PyTorch is large, so this takes some minutes.'
	$(PIP) -e .
	@touch $@

$(DEV): $(BASE)
	$(PIP) -e '.[dev]'
	@touch $@
