# `make demo` and `make test` set up all they need: an environment in .venv with LLaVA's pins and this plugin, or with
# STACK=current one in .venv-current on today's torch and transformers (STACK=repository: the pins of LLaVA's repository).
# VENV=/path/to/environment uses one that you have, as it is. PYTHON=/path/to/python3.11 names the Python to make .venv with.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-repository test-engine lint docs clean environment

OUT := $(or $(OUT),runs/demo-$(shell date +%Y%m%d-%H%M%S))
PYTEST_ARGS ?=
STACK ?= pinned
FOLDER := .venv$(if $(filter-out pinned,$(STACK)),-$(STACK))
ENVIRONMENT := $(or $(VENV),$(FOLDER))
RUN := $(ENVIRONMENT)/bin/python

help:
	@echo "make demo    train and evaluate a small checkpoint end to end, in a new folder below runs/ (or OUT=folder)"
	@echo "make test    the tests (PYTEST_ARGS='tests/test_cli.py -k help' for some of them)"
	@echo "make test-fast  the tests that need no torch, in a small environment of their own (.venv-fast): seconds, not minutes"
	@echo "make test-repository  a share of the tests on the pins of LLaVA's repository (.venv-repository)"
	@echo "make test-engine  stage 2 with answers sampled by a real vLLM server on the CPU (.venv-engine, 3.5 GB)"
	@echo "             demo and test: STACK=current for today's torch and transformers instead of LLaVA's pins"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make docs    the documentation as a site, in site/"
	@echo "make clean   remove environments, runs and what tools leave"

environment:
ifeq ($(VENV),)
	@bash constraints/environment.sh $(STACK) $(FOLDER)
endif

demo: environment
	@$(RUN) -m umed_plugin.cli demo --out "$(OUT)"
	@echo
	@cd "$(OUT)" && for made in report.html before_after.png summary.json checkpoint/*; do \
	  [ ! -e "$$made" ] || echo "$$PWD/$$made"; done

test: environment
	@$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What differs on these pins: transformers 4.37 has sdpa attention, and torch 2.1.
REPOSITORY_TESTS := tests/patches tests/model tests/training/test_trained_weights.py tests/training/test_accumulation.py tests/commands/test_memory.py

test-repository:
	@bash constraints/environment.sh repository .venv-repository
	@.venv-repository/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m llava $(REPOSITORY_TESTS) $(PYTEST_ARGS)

test-fast:
	@bash constraints/environment.sh fast .venv-fast
	@.venv-fast/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not llava and not run" $(PYTEST_ARGS)

# One server at a time: no -n.
test-engine: environment
	@bash constraints/environment.sh engine .venv-engine
	@UMED_ENGINE_PYTHON=$$PWD/.venv-engine/bin/python $(RUN) -m pytest -m engine tests/engine $(PYTEST_ARGS)

lint:
	@bash constraints/environment.sh lint .venv-lint
	@.venv-lint/bin/ruff check .
	@.venv-lint/bin/ruff format --check --diff . 2>/dev/null || { echo "ruff format wants changes: .venv-lint/bin/ruff format ."; exit 1; }
	@.venv-lint/bin/mypy -p umed_plugin
	@.venv-lint/bin/lint-imports --no-cache

docs:
	@bash constraints/environment.sh docs .venv-docs
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "$$PWD/site/index.html"

clean:
	rm -rf .venv .venv-current .venv-repository .venv-fast .venv-lint .venv-docs .venv-engine runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
