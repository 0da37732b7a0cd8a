# make demo | test | test-slurm | lint | bench | clean; each fails when something in it fails.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slurm lint bench clean

PYTHON ?= python3
# files of tests that run at a time
JOBS ?= 2
VENV := .venv
INSTALLED := $(VENV)/.installed
# console scripts and ninja (DeepSpeed builds its CUDA operators with it) live in the environment's bin
RUN := env PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

help:
	@echo "make demo    train QPiSSA on a small model with 2 CPU ranks, convert, evaluate with stock PEFT (runs/demo)"
	@echo "make test    set up and run the tests, but for tests/slurm"
	@echo "make test-slurm  install Debian's Slurm (as root) and pass tests/slurm on it, on loopback"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make bench   run every benchmarks/bench_*.py"
	@echo "make clean   remove the environment, caches and build output; runs/ stays"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e ".[dev,demo]"
	touch $@

setup: $(INSTALLED)

demo: $(INSTALLED)
	$(RUN) lowrank-dist demo --output runs/demo

# one thread per rank: the distributed tests start several ranks on few cores
test test-slurm: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(RUN) python -m pytest --ignore=tests/slurm --numprocesses $(JOBS) --dist loadgroup $(PYTEST_ARGS)

# not root, no Debian, or daemons that do not run here: the tests are skipped and say why
test-slurm: $(INSTALLED)
	if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
		tests/slurm/lab.sh install || echo "Debian's Slurm could not be installed: its tests are skipped" >&2; \
	fi
	$(RUN) python -m pytest tests/slurm $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(INSTALLED)
	@shopt -s nullglob; files=(benchmarks/bench_*.py); \
	if (($${#files[@]} == 0)); then echo "no benchmarks/bench_*.py yet: nothing to run"; fi; \
	for file in "$${files[@]}"; do echo "== $$file"; $(RUN) python "$$file"; done

clean:
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -path ./.git -prune -o -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
