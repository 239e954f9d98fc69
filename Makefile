# Two commands from a fresh clone: `make demo` and `make test`. Both make .venv first, from constraints.txt.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
CODE := platform jobs serve_apps tests
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1

# Installs Debian packages where that may be done, or says what follows where it may not: $(call apt,PACKAGES,CONSEQUENCE)
apt = { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get install --yes --quiet --no-install-recommends $(1) > /dev/null 2>&1 \
	      || { apt-get update --quiet > /dev/null 2>&1 && apt-get install --yes --quiet --no-install-recommends $(1) > /dev/null 2>&1; } \
	      || echo "$(1) could not be installed: $(2)"; \
	  else echo "no $(1), and not root: $(2)"; fi; }

.PHONY: help demo test test-full venv lint bench tree chromium clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' Makefile

demo: venv  ## score a real archive of about 2,000 images with a real model; a second time there is nothing to do
	$(BIN)/eagleray demo

test: venv lint chromium  ## every test but the long form of the journeys
	$(BIN)/python -m pytest -m "not full"

test-full: venv lint chromium  ## every test, the long journeys too
	$(BIN)/python -m pytest

lint: venv  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv  ## the speed tables of docs/log.md: scoring, then serving
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/benchmarks/bench_score.py
	$(BIN)/python tests/benchmarks/bench_serve.py

tree:  ## write the README's tree anew, from the first lines of the files
	$(PYTHON) tests/house/tree.py

venv: $(STAMP)  ## .venv from constraints.txt; made again when pyproject.toml or constraints.txt change

# torch goes first and by its pin: where a CPU wheel is at hand, nothing later may pull the CUDA build in its place.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "eagleray needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v cc > /dev/null || $(call apt,gcc libc6-dev,the resize kernel is left out and Pillow resizes instead)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

chromium:  # the page is looked at in a real browser; without one those tests skip and say so
	@command -v chromium > /dev/null || $(call apt,chromium,the tests of the page in a browser will skip)

clean:  ## remove what was built; runs and corpora stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
	find platform -name '*.egg-info' -type d -prune -exec rm -rf {} +
