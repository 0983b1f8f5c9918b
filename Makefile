# Two commands: `make book` builds the book, `make test` checks everything. `make` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Results must not depend on whether the machine has an accelerator.
export JAX_PLATFORMS ?= cpu
# What is compiled once, for a chapter or a test, is kept for the next run; see conftest.py.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/_build/compiled
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
PORT ?= 8000
CHAPTER ?=

.PHONY: help book test lab execute serve lint lock clean
.DEFAULT_GOAL := help

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

book: $(STAMP) ## Execute the chapters and write the pages to _build/html
	@$(BIN)/python -m tools.build

test: $(STAMP) ## Run every check: style, types, tests, notebooks, pages, browser
	@$(BIN)/python -m pytest -n 2

lab: $(STAMP) ## Open the chapters in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=book

execute: $(STAMP) ## Re-run and normalise the committed notebooks (CHAPTER=score for one)
	@$(BIN)/python -m tools.notebooks $(CHAPTER)

serve: book ## Serve the built book at http://localhost:8000 (PORT=...)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

lint: $(STAMP) ## Check style and types, and mend the style that can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/mypy

lock: $(STAMP) ## Lock requirements.txt again after a change of the dependencies in pyproject.toml
	@test -x _build/uv/bin/uv || { $(BIN)/python -m venv _build/uv && _build/uv/bin/pip install --quiet uv; }
	_build/uv/bin/uv pip compile pyproject.toml --group book --group test --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --quiet \
	  --custom-compile-command "make lock" --output-file requirements.txt

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) _build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The editable install is last, and the stamp with it: what was interrupted starts again.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fisherbook needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make book PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "The module venv is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the locked requirements into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
