# The four commands a newcomer needs, and the long ones. `make run` is the only one to remember.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] < (3,13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# How many processes run tests, each with a database of its own; `make test N=0` runs them in one. What pytest makes of
# the tests' asserts is kept, also where images say that Python keeps nothing: it takes longer than a thousand tests.
N ?= 2
TESTED = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(N) -rs --durations=10

.PHONY: setup run quick test check lint torture bench

setup: .venv/.runtime
run: setup
	@$(BIN)/python -m app run --demo

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Satmeter needs Python 3.11 or 3.12; none was found. Install one, or say: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; echo "Could not make a virtual environment in .venv with $(PYTHON). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
.venv/.runtime: deploy/requirements.txt | .venv/bin/python
	@echo "Installing the locked requirements (once, about a minute) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/requirements.txt
	@touch $@
.venv/.dev: deploy/requirements-dev.txt .venv/.runtime
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/requirements-dev.txt
	@touch $@

quick: .venv/.dev
	@echo "Left out: chains, browsers, gateways, whole programs, the grid, long random runs. make test and make torture have them."
	$(TESTED) -m "not slow and not long"
test: .venv/.dev
	$(TESTED) -m "not slow"
lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
check: lint test
torture: .venv/.dev
	$(BIN)/python -m pytest -m slow -s
bench: .venv/.dev
	$(BIN)/python -m tests.bench $(BENCH)
