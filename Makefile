# The commands a newcomer needs, and the long ones. `make` by itself lists them; `make run` is the only one to remember.
FITS := import sys; sys.exit(not (3,11) <= sys.version_info[:2] < (3,13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# How many processes run tests, each with a database of its own; `make test N=0` runs them in one. What pytest makes of
# the tests' asserts is kept, also where images say that Python keeps nothing: it takes longer than a thousand tests.
N ?= 2
TIMES ?= 20
TESTED = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(N) -rsfE --durations=10

CITUS_TESTS = tests/test_walkthrough.py tests/test_metering.py tests/test_topups.py

.PHONY: help setup run quick test check lint torture in-a-row citus bench bench-gateway vendor

help:
	@echo "make setup    install the locked requirements and the command satmeter into .venv"
	@echo "make run      setup, then a development server with a demo account"
	@echo "make quick    the tests that take milliseconds"
	@echo "make test     every test but the slow suites"
	@echo "make lint     style, types, floors"
	@echo "make check    lint and test: what CI runs first"
	@echo "make torture  the slow suites: crashes, real chains, a browser, long random runs"
	@echo "make in-a-row failovers and rolling restarts under load, 20 each (TIMES=n), one after the other; some minutes"
	@echo "make citus    the acceptance on a Citus of yours, CITUS_URL, whose database is emptied"
	@echo "make bench    the hot path beside pgbench"
	@echo "make bench-gateway  the gateway beside its bare upstream"
	@echo "make vendor   the pages' scripts and stylesheet from npm, as pinned; they are committed, nobody else needs this"

setup: .venv/.runtime
run: setup
	@$(BIN)/python -m app run --demo

.venv/bin/python:
	@test -w . || { echo "$(CURDIR) cannot be written by $$(id -un), and .venv is made there; choose another folder" >&2; exit 1; }
	@test -n "$(PYTHON)" || { echo "Satmeter needs Python 3.11 or 3.12; none was found. Install one, or say: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	@command -v "$(PYTHON)" >/dev/null || { echo "PYTHON=$(PYTHON) is not a program on this machine; Satmeter needs Python 3.11 or 3.12" >&2; exit 1; }
	@"$(PYTHON)" -c '$(FITS)' || { echo "PYTHON=$(PYTHON) is $$("$(PYTHON)" -V 2>&1); Satmeter needs Python 3.11 or 3.12" >&2; exit 1; }
	@said=$$("$(PYTHON)" -m venv .venv 2>&1) || { rm -rf .venv; case "$$said" in \
	*ensurepip*) why="On Debian and Ubuntu: apt-get install python3-venv";; *) why=$$(echo "$$said" | tail -n 1);; esac; \
	echo "Could not make a virtual environment in .venv with $(PYTHON). $$why" >&2; exit 1; }
.venv/.runtime: deploy/requirements.txt $(wildcard pyproject.toml) | .venv/bin/python
	@test -w .venv || { echo "$(CURDIR)/.venv cannot be written by $$(id -un); remove it, or run make as who made it" >&2; exit 1; }
	@echo "Installing the locked requirements (once, about a minute) ..."
	@$(PIP) --require-hashes -r deploy/requirements.txt
	@$(PIP) --no-deps --no-build-isolation --no-index -e .
	@touch $@
.venv/.dev: deploy/requirements-dev.txt .venv/.runtime
	@echo "Installing what the tests need (once, about half a minute) ..."
	@$(PIP) --require-hashes -r deploy/requirements-dev.txt
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
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(N) --dist loadfile -rsfEP --show-capture=stdout --durations=20 -m slow
in-a-row: .venv/.dev
	FAILOVERS=$(TIMES) $(BIN)/python -m pytest -s -rs -m slow tests/integration/test_failover.py
	ROLLING_RESTARTS=$(TIMES) $(BIN)/python -m pytest -s -rs -m slow tests/integration/test_rolling_restart.py
citus: .venv/.dev
	$(BIN)/python -m pytest -n 0 -s -rs tests/integration/test_citus.py $(CITUS_TESTS)
bench: .venv/.dev
	$(BIN)/python -m tests.bench $(BENCH)
bench-gateway: .venv/.dev
	$(BIN)/python -m tests.bench.gateway $(BENCH)
vendor: .venv/bin/python
	$(BIN)/python deploy/vendor.py
