# Development tasks, with plain venv and pip. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
# Made anew when pyproject.toml changes, and only then.
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := check
.PHONY: help install lint lint-fix format type-check test test-peers test-all test-ends soak fuzz bench layer check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

install: $(INSTALLED) ## Make .venv and install the package and the development tools in it

$(INSTALLED): pyproject.toml
	@test -x $(PY) || $(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || { \
		echo '$(PYTHON) must be Python 3.9 or later, with its venv module (on Debian and Ubuntu: apt install python3-venv).'; \
		echo 'To use another one: make PYTHON=/path/to/python3'; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip # a venv made by uv has no pip
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1' # the first that reads dependency groups
	$(PY) -m pip install --quiet --editable . --group dev
	@touch $@

lint: $(INSTALLED) ## Check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

lint-fix: $(INSTALLED) ## Fix what ruff can fix by itself
	$(PY) -m ruff check --fix

format: $(INSTALLED) ## Format the code
	$(PY) -m ruff format

type-check: $(INSTALLED) ## Check the types, strictly
	$(PY) -m mypy
	$(PY) -m mypy --python-version 3.9 zamp_sdk

# Coverage is of the whole suite: PYTEST_ARGS=tests/test_errors.py runs that file alone, without it.
test: $(INSTALLED) ## Run the tests with coverage, or those of PYTEST_ARGS without
	@command -v openssl >/dev/null || { \
		echo 'The tests make certificates with openssl, which is not here (on Debian and Ubuntu: apt install openssl).'; exit 1; }
	$(PY) -m pytest $(or $(PYTEST_ARGS),--cov -n 4 --dist worksteal)

test-peers: $(INSTALLED) ## Run the tests against real programs (nginx, tinyproxy, the official SDK, ...)
	$(PY) -m pytest tests/peers -n 2 --dist loadfile $(PYTEST_ARGS)

test-all: $(INSTALLED) ## Run the tests on every Python from 3.9 on that this machine has
	$(PY) .ci/test_all.py $(PYTEST_ARGS)

test-ends: $(INSTALLED) ## Run the tests on the oldest and the newest Python of this machine
	$(PY) .ci/test_all.py --ends $(PYTEST_ARGS)

soak: $(INSTALLED) ## Run 20,000 actions against a faulty server, cancel 40,000, and keep to a limit (4 minutes)
	$(PY) -m tests.peers.soak
	$(PY) -m tests.peers.storm
	$(PY) -m tests.peers.limits

fuzz: $(INSTALLED) ## Read 40,000 random replies (about a minute at most)
	$(PY) -m tests.peers.fuzz

bench: $(INSTALLED) ## Measure beside the official SDK
	$(PY) -m tests.benchmarks

layer: ## Build dist/zamp-sdk-layer.zip for AWS Lambda
	$(PYTHON) .ci/layer.py

check: lint type-check test ## Lint, type-check and test (the default)

clean: ## Remove everything that was made here
	rm -rf $(VENV) .venvs .bench dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
	find zamp_sdk tests .ci -name __pycache__ -prune -exec rm -rf {} +
