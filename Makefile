# `make` lists the targets. Everything runs in .venv, which `make setup` creates and every other target makes sure of.

PYTHON ?= python3
# A plain `torch` may bring gigabytes of GPU libraries. Another build: make setup TORCH="torch==... --index-url ..."
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install
# Processes that tests run in, one per core, each with a few GiB of memory at most. In one: make test PYTEST_WORKERS=0
PYTEST_WORKERS ?= logical
PYTEST := $(BIN)/pytest --numprocesses $(PYTEST_WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Where it is set, each of the many processes that tests start would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-fast test-deploy lint bench-serve bench-decode bench-kernels bench-quality protos fmt clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '%-14s %s\n' "$$name" "$$text"; done

setup: $(READY) ## create .venv with kvpilot and all it needs (once; again when pyproject.toml changes)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvpilot needs Python 3.11 or newer as \`$(PYTHON)\`; another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
		{ echo "\`$(PYTHON)\` cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) -e '.[dev]'
	@touch $(READY)

model: $(READY) ## fetch the small model that the demo and the tests use
	$(BIN)/kvpilot model fetch

demo: model ## start the whole stack, run a handful of jobs and watch their caches being steered
	$(BIN)/kvpilot demo

test: $(READY) ## everything CI checks: lint, types, stubs, protos, all tests
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint model
	$(PYTEST)

test-fast: $(READY) ## the tests that need neither the model nor patience
	$(PYTEST) -m "not slow and not model"

test-deploy: model ## images' steps, chart, rules, dashboards, metrics, traces, processes that come and go (part of `make test`)
	$(PYTEST) tests/deploy tests/faults $(patsubst %,tests/e2e/test_%.py,metrics traces log_levels bench)

lint: $(READY) ## style, types, and whether the checked-in stubs, table of metrics and dashboards are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python protos/generate.py --check
	$(BIN)/python docs/generate_metrics.py --check
	$(BIN)/python -m deploy.grafana.generate --check
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

bench-serve: model ## eight requests at once through kvpilot against the same eight one after another in transformers
	$(BIN)/kvpilot bench serve

bench-decode: model ## tokens/s with a long context, raw and at 4 bits, and how long a live switch keeps a request waiting
	$(BIN)/kvpilot bench decode

bench-kernels: $(READY) ## decode attention of every block format, beside the memory's bandwidth and torch's attention
	$(BIN)/kvpilot bench kernels

bench-quality: model ## divergence, needles, recall and long answers of every stage and recipe, at how many bytes (minutes)
	$(BIN)/kvpilot bench quality --quick

protos: $(READY) ## regenerate the stubs after a change to a .proto file
	$(BIN)/buf format --write
	$(BIN)/python protos/generate.py

fmt: $(READY) ## format the code and the protos, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

clean: ## remove .venv and all caches of this checkout (not the fetched model)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
