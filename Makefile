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

# Two files of tests at a time: most of them are one process that computes, or ranks that wait for each other.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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

# A Slurm cluster on this machine, for as long as the tests take. Debian's packages are installed by root alone.
.PHONY: test-slurm
test-slurm: setup
	command -v slurmctld >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge; } || \
		echo "Slurm could not be installed"
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py -rs

# Ranks, jobs and nodes killed at random moments; RCM_FAULT_SEED=N repeats the moments of a run that printed it.
.PHONY: test-faults
test-faults: setup
	$(BIN)/python -m pytest -s -m faults tests/test_faults.py

# The part of the quality laboratory that needs no GPU: docs/quality says what it shows. Two hours on two cores; goes on where it was.
.PHONY: lab
lab: setup
	$(BIN)/python tools/lab.py plane
	$(BIN)/python tools/lab.py digits
	$(BIN)/python tools/lab.py report plane digits
