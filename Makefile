# `make help` lists the targets. Each of them makes .venv first where it is missing or older than what it is made from.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,baselines,analysis,docs
PYTEST_ARGS ?=
OPTIONS ?=

# Absolute, because `lint` runs mypy from another folder.
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
CACHE := .cache
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

# No test needs a hub; offline, one that reaches for it fails at once instead of waiting for the network.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help

.PHONY: help venv quickstart compare methods test test-gpu lint format bench docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12
	@echo
	@echo "PYTHON=$(PYTHON) makes the environment; PYTEST_ARGS='-k name -x' go to pytest, OPTIONS='--model.lr 2e-3' to quickstart."

venv: $(STAMP)  ## .venv with the tested versions and this tree, editable

# torch goes first: asked for by another package, pip would take the newest one, several gigabytes of CUDA packages.
# setuptools goes with it, so that the build of this tree uses the pinned one too.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

quickstart: $(STAMP)  ## fine-tune the bundled model with LIFT, and show what it learned and kept
	$(BIN)/python -m lift_lightning.quickstart $(OPTIONS)

compare: $(STAMP)  ## LIFT, LoRA, a random mask and full fine-tuning on the bundled model, three seeds each
	$(BIN)/python -m lift_lightning.quickstart.compare $(OPTIONS)

methods: $(STAMP)  ## every method of configs/methods/ on the bundled model for some steps, checked
	$(BIN)/python -m lift_lightning.quickstart.methods $(OPTIONS)

test: $(STAMP)  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

test-gpu: $(STAMP)  ## the tests that need a CUDA device; fails where there is none
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	    f"test-gpu: torch {torch.__version__} sees no CUDA device, so nothing was tested")'
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# mypy cannot follow the folders mapped into the package (callbacks/, datamodules/), so it reads a copy laid out as the
# wheel lays it out. The copy is made anew each time: a file deleted from the tree must not live on in it.
lint: $(STAMP)  ## ruff (rules, format) and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(CACHE)/typecheck
	@$(BIN)/python -c 'import setuptools; setuptools.setup()' -q build_py --build-lib $(CACHE)/typecheck
	cd $(CACHE)/typecheck && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p lift_lightning

format: $(STAMP)  ## let ruff rewrite what `lint` would complain of, where it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every benchmarks/bench_*.py, and their results into docs/performance.md; needs LIFT_SMOLLM2_DIR
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python benchmarks/tables.py

docs: $(STAMP)  ## the documentation, into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(CACHE) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
