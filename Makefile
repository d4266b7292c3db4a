### Commands. `make` alone lists them. CI calls the same ones.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/default.txt
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
COMPAT := .venv-compat
COMPAT_CONSTRAINTS := constraints/paddlenlp3.txt
COMPAT_STAMP := $(COMPAT)/.installed
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else "error: Python 3.10, 3.11 or 3.12 is needed; set PYTHON=...")'

.PHONY: help venv align align-hub selftest test test-default test-compat lint types format clean

help: #- show this list
	@awk -F ':.*#- ' '/^[a-z-]+:.*#- / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $(STAMP)

$(COMPAT_STAMP): pyproject.toml $(COMPAT_CONSTRAINTS)
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT_CONSTRAINTS) --editable '.[dev]'
	@touch $(COMPAT_STAMP)

venv: $(STAMP) #- install everything into .venv, under locked versions

align: $(STAMP) #- convert ModernBERT-base to Paddle and prove it equal, fp32 and bf16, with reports
	$(BIN)/modernbert-align convert --src hf --dst paddle
	$(BIN)/modernbert-align diff --dtype fp32
	$(BIN)/modernbert-align diff --dtype bf16
	$(BIN)/modernbert-align diff --dtype bf16 --attention blockwise
	$(BIN)/modernbert-align gate reports/diff-base-masked_lm-fp32.json reports/diff-base-masked_lm-bf16.json reports/diff-base-masked_lm-bf16-blockwise.json \
		--require model=base,dtype=fp32,dtype=bf16 --require model=base,dtype=fp32,dtype=bf16,attention=blockwise

align-hub: $(STAMP) #- the same on the published ModernBERT-base and -large; needs a network
	$(BIN)/modernbert-align diff --model answerdotai/ModernBERT-base --dtype bf16
	$(BIN)/modernbert-align diff --model answerdotai/ModernBERT-large --dtype bf16

selftest: $(STAMP) #- prove that the comparison can fail: known bugs die, unbroken models pass; with reports
	$(BIN)/modernbert-align selftest --model tiny-sensitive --dtype bf16
	$(BIN)/modernbert-align selftest --model tiny-stress --dtype bf16

test: test-default test-compat #- run all tests, under both sets of versions

test-default: $(STAMP) #- run all tests under the default set
	$(BIN)/python -m pytest

test-compat: $(COMPAT_STAMP) #- run the parity, head and fine-tuning tests under paddlenlp 3.0.0b4 and transformers 4.55.4
	$(COMPAT)/bin/python -m pytest tests/parity tests/models tests/cli/test_heads.py tests/cli/test_faults.py tests/examples/test_downstream.py

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
	find reports -maxdepth 1 \( -name 'diff-*' -o -name 'selftest-*' \) -delete
