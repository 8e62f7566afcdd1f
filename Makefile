PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup test check mutate clean

setup: $(VENV)/.installed

# One resolver run with the pinned versions; the CPU build of torch is taken where one is provided.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutate: setup
	$(BIN)/python tests/mutate.py

clean:
	rm -rf $(VENV) build *.egg-info

.PHONY: demo demo-clean
demo: setup
	$(BIN)/python tools/demo.py

demo-clean:
	rm -rf runs/demo
