# From a fresh clone to a trained model: `make train`. Recipes work from any working directory (make -C, make -f).

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV := $(ROOT)/.venv
# Python that makes the environment, 3.10 or newer.
PYTHON ?= python3
# Options for pip, such as --index-url https://download.pytorch.org/whl/cpu for torch's CPU build.
PIP_ARGS ?=
# Overrides for train (train.steps=20), options for test (-k router).
ARGS ?=

# Test files that run at once, each in a process; what a test starts comes on top.
TEST_PROCESSES ?= 2

INSTALL = cd "$(ROOT)" && "$(VENV)/bin/python" -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test check clean

help:
	@echo "make train [ARGS='train.steps=20']   train configs/tiny-cpu.yaml, with overrides"
	@echo "make test  [ARGS='-k router']        run the tests"
	@echo "make check                           lint, format and types"
	@echo "make clean                           remove the environment and caches; runs/ stays"

train: $(VENV)/.installed-run
	cd "$(ROOT)" && "$(VENV)/bin/dualpipe" train configs/tiny-cpu.yaml $(ARGS)

test: $(VENV)/.installed-test
	cd "$(ROOT)" && "$(VENV)/bin/python" -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.installed-dev
	cd "$(ROOT)" && "$(VENV)/bin/ruff" check .
	cd "$(ROOT)" && "$(VENV)/bin/ruff" format --check .
	cd "$(ROOT)" && "$(VENV)/bin/mypy"

clean:
	cd "$(ROOT)" && rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A stamp appears when its install is through. An environment without a pip that runs was cut short, or has lost its
# Python: it is made again.
$(VENV)/.installed-run: $(ROOT)/setup.py $(ROOT)/constraints.txt
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	"$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)"
	$(INSTALL) -e .
	touch "$@"

$(VENV)/.installed-test: $(VENV)/.installed-run
	$(INSTALL) -e '.[test]'
	touch "$@"

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(INSTALL) -e '.[dev]'
	touch "$@"
