# Two commands are all there is to setting up: `make run` and `make test`. Everything lives in .venv and runs/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip is told not to look for a newer pip: the one that the venv came with is enough.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# A stamp is newer than these two until one of them changes, and so long nothing is installed again.
RECIPE := pyproject.toml constraints.txt

.PHONY: help run test test-slow gate bench clean
.DELETE_ON_ERROR:

help:
	@echo "make run        train and score the quick suite, print its board, write runs/quick/index.html"
	@echo "make test       ruff, mypy and the tests"
	@echo "make test-slow  the tests that build, install or train from nothing"
	@echo "make gate       train the suite \`gate\` anew and compare it with ci/baseline.json"
	@echo "make bench      the benchmarks"
	@echo "make clean      remove what builds and tests leave; runs/ and .venv stay"

run: $(VENV)/.installed
	$(BIN)/klbench run quick --out runs/quick

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile

# pyproject.toml deselects slow tests; of two -m the later one counts.
test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

# From nothing each time: a run is known by what was asked, and what is on trial here is the code.
gate: $(VENV)/.installed
	rm -rf runs/gate
	OMP_NUM_THREADS=1 $(BIN)/klbench run gate --out runs/gate
	$(BIN)/klbench check --baseline ci/baseline.json --candidate runs/gate --gate ci/gate.yaml --junit runs/gate/junit.xml

# Peers are measured on one thread and on two; MODEL=DIR measures a model of yours too, DISCO=DIR a checkout of naver/disco.
bench: $(VENV)/.installed-dev
	@set -e; say() { echo "$(BIN)/python $$*"; $(BIN)/python "$$@"; }; \
	found=; for script in benchmarks/[!_]*.py; do \
		test -f "$$script" || continue; found=yes; also=; \
		case $$script in */training.py) also="$(if $(DISCO),--disco $(DISCO))";; esac; \
		say "$$script" $$also; \
		case $$script in */training.py|*/sampling.py|*/scoring.py) \
			say "$$script" $$also --threads 2; \
			test -z "$(MODEL)" || say "$$script" $$also --model "$(MODEL)";; \
		esac; \
	done; test -n "$$found" || { echo "no benchmark in benchmarks/" >&2; exit 1; }
	$(BIN)/python docs/make_performance.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find klbench tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Only ever made, never updated: a venv's own age says nothing about what is installed in it.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "klbench needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(RECIPE) | $(BIN)/python
	@echo "installing klbench and what it needs into $(VENV) (minutes the first time)"
	$(PIP_INSTALL) -e .
	touch $@

# What `make run` needs is part of this, so its stamp is set too.
$(VENV)/.installed-dev: $(RECIPE) | $(BIN)/python
	@echo "installing klbench, what it needs and its tools into $(VENV) (minutes the first time)"
	$(PIP_INSTALL) -e ".[dev]"
	touch $(VENV)/.installed $@
