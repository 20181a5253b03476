# make train: a slide classifier on the built-in cohort.   make test: lint, types, tests.
# Both create .venv on first use and reuse it after.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: train test lint types clean

train: $(STAMP)
	$(BIN)/python -m pipelines.pathology train

test: lint types
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
