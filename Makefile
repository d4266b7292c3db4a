### Commands. `make` alone lists them. CI calls the same ones.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/default.txt
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv align test lint types format clean

help: #- show this list
	@awk -F ':.*#- ' '/^[a-z-]+:.*#- / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else "error: Python 3.10, 3.11 or 3.12 is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $(STAMP)

venv: $(STAMP) #- install everything into .venv, under locked versions

align: $(STAMP) #- convert ModernBERT-base to Paddle and prove it equal, fp32 and bf16, with reports
	$(BIN)/modernbert-align convert --src hf --dst paddle
	$(BIN)/modernbert-align diff --dtype fp32
	$(BIN)/modernbert-align diff --dtype bf16
	$(BIN)/modernbert-align gate reports/diff-base-masked_lm-fp32.json reports/diff-base-masked_lm-bf16.json --require model=base,dtype=fp32,dtype=bf16

test: $(STAMP) #- run all tests
	$(BIN)/python -m pytest

lint: $(STAMP) #- style, formatting and import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) #- static types
	$(BIN)/mypy

format: $(STAMP) #- format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: #- remove what was generated, but not .venv
	rm -rf checkpoints build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find reports -maxdepth 1 -name 'diff-*' -delete
