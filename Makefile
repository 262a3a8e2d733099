# make demo   everything in .venv, then the main job: train a language model on real text
# make test   everything in .venv, then the tests
# make gpu    on a machine with an NVIDIA GPU: build, GPU tests and benchmarks, one report
#
# TORCH=       the torch to install (default: the one in constraints.txt)
# PIP_FLAGS=   passed to every pip install, e.g. --index-url ...
# PYTHON=      the Python to make .venv with; for make gpu the one that has torch, Triton and ninja
# WORKERS=     processes that share the tests (default: one a core, 4 at most), 0: none but pytest's
# PYTEST_FLAGS= passed to pytest, e.g. --failed-first
#
# make gpu takes less than nine minutes, needs no network and uses no .venv. It writes report.md,
# results.json, logs.txt, pictures, and failures.txt if tests fail.
# OUT=         the folder for them (default: bench/results/<gpu>)
# ONLY=        parts of it, with commas between them: build, tests, ops or update, e.g. ONLY=gae
# COMMIT=      what the report is stamped with (default: git's own)
# WHEELS=      a folder of wheels that this machine lacks, such as peers; it is not installed into

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
PIP_FLAGS ?=
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
CONSTRAINED = $(PIP_INSTALL) --constraint $(VENV)/constraints.txt
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
  --benchmark-disable
MACHINE_PATH := $(PATH)
GPU_FLAGS = $(if $(OUT),--out "$(OUT)") $(if $(ONLY),--only "$(ONLY)") \
  $(if $(COMMIT),--commit "$(COMMIT)") $(if $(WHEELS),--wheels "$(WHEELS)")
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-all bench gpu peers lint format clean check-tools
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/fastrl train

# Threads that spin while they wait would keep the other processes from the cores.
test test-all: export OMP_WAIT_POLICY := passive
test: $(VENV)/.built
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-all: $(VENV)/.built
	$(PYTEST) $(PYTEST_FLAGS)

bench: $(VENV)/.peers
	$(BIN)/fastrl bench $(BENCH_FLAGS)

gpu: export PATH := $(MACHINE_PATH)
gpu:
	$(PYTHON) -m bench.gpu $(GPU_FLAGS)

# The torch that was asked for decides; where it brings its own Triton, that one stays.
$(VENV)/.torch: constraints.txt | check-tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) "$(TORCH)"
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip freeze | grep '^torch==' >> $(VENV)/constraints.txt
	if $(BIN)/python -m pip show --quiet triton 2>/dev/null; then \
	  sed -i '/^triton==/d' $(VENV)/constraints.txt; fi
	$(CONSTRAINED) setuptools ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(CONSTRAINED) --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/.peers: $(VENV)/.built
	$(CONSTRAINED) --no-build-isolation --editable '.[test,peers]'
	touch $@

$(VENV)/.lint: $(VENV)/.built
	$(CONSTRAINED) ruff mypy clang-format
	touch $@

peers: $(VENV)/.peers

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

check-tools:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "fastrl: expected Python 3.10 or newer, found no $(PYTHON). Install it, or set PYTHON=."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastrl: expected Python 3.10 or newer, got $$($(PYTHON) --version). Set PYTHON=."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "fastrl: expected Python's venv module, found none. Debian and Ubuntu: apt-get install python3-venv."; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "fastrl: expected Python's headers, found none. Debian and Ubuntu: apt-get install python3-dev."; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { \
	  echo "fastrl: expected a C++ compiler, found no $${CXX:-c++}. Debian and Ubuntu: apt-get install g++."; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info fastrl/_C*.so
