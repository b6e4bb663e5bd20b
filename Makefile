# make help lists the targets. Everything lives in .venv; nothing is installed outside of this folder.
# The first interpreter that runs and fits; a name on the PATH may be a shim of something that is not installed.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
# The newer megatron-core needs Python 3.12: found in the same way, also where pyenv has it without showing it.
NEXT_FITS := import sys; sys.exit(sys.version_info[:2] != (3, 12))
PYENVS = $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12.*/bin/python3.12)
PYTHON_NEXT ?= $(shell for p in python3 python3.12 $(PYENVS); do $$p -c '$(NEXT_FITS)' 2>/dev/null && echo $$p && break; done)
NEXT := .venvs/mcore-next
VENV := .venv
BIN := $(VENV)/bin
SGLANG := .venvs/sglang
# Test files run side by side: many of their seconds are waits for servers and ranks that start.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart results site test test-all sglang-cpu test-gpu test-mcore-next check lint format types layers locks docs warm-start clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  %-16s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make the virtual environment

$(VENV)/.installed: pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and none was found: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

quickstart: install ## FAPO and plain GRPO on the clock world, then runs/quickstart/report.html
	$(BIN)/python examples/clock/quickstart.py

results: install ## three seeds an arm, the numbers of docs/results.md
	$(BIN)/python examples/clock/quickstart.py --out runs/results --seeds 1 2 3

test: install check ## lint, types, layers and the tests (minutes)
	$(PYTEST) $(SIDE_BY_SIDE) -m "not long and not gpu"

test-all: test sglang-cpu ## the long tests as well
	$(PYTEST) $(SIDE_BY_SIDE) --durations 15 -m "long and not gpu"

sglang-cpu: $(SGLANG)/.installed ## SGLang for the CPU, in an environment of its own (1.8 GB)

$(SGLANG)/.installed: tests/support/sglang/requirements.txt | $(VENV)/.installed
	$(BIN)/python -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@# Stand-ins for what SGLang imports of the CUDA stack, in this environment only.
	@printf '%s\nimport sglang_cpu_stand_ins; sglang_cpu_stand_ins.install()\n' '$(CURDIR)/tests/support/sglang' \
		> $$($(SGLANG)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang_cpu_stand_ins.pth
	@touch $@

test-gpu: install ## tests that need a CUDA device
	$(PYTEST) -m gpu

test-mcore-next: $(NEXT)/.installed ## tests of the policy on Python 3.12 with the newer megatron-core
	OMP_NUM_THREADS=1 $(NEXT)/bin/pytest $(SIDE_BY_SIDE) -m "not gpu" tests/policy tests/compat

$(NEXT)/.installed: pyproject.toml setup.py
	@test -n "$(PYTHON_NEXT)" || { echo "Python 3.12 is needed and was not found: make PYTHON_NEXT=/path/to/python3.12"; exit 1; }
	$(PYTHON_NEXT) -m venv $(NEXT)
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

check: lint types layers ## what needs no test run

lint: install ## ruff: style, sizes, banned imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## mypy, strict, the whole package
	$(BIN)/mypy

layers: install ## import-linter: imports go downwards only
	$(BIN)/lint-imports

site: $(VENV)/.site ## the documentation as a site, build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.site: pyproject.toml | $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[site]'
	@touch $@

locks: ## resolve the image's environments again (docker/*.lock)
	python3 -m venv .venvs/uv && .venvs/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	PATH="$(CURDIR)/.venvs/uv/bin:$$PATH" docker/lock.sh

docs: install ## write the generated pages (docs/config.md, docs/metrics.md)
	$(BIN)/python tools/write_docs.py

warm-start: install ## train the demo's policy and judge again from configs/clock
	$(BIN)/python tools/warm_start.py

clean: ## remove the environment and all runs
	rm -rf $(VENV) $(NEXT) runs build *.egg-info
