# What a person has to remember: demo, test, lint, bench, generate.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PEERS_INSTALL := $(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check
# Twice the cores of a small machine: tests of real servers mostly wait.
JOBS ?= 4

.PHONY: help demo test checkout-test wheel-test lint generate bench bench-gpu optimizers matrix packages clean

help:
	@echo "make demo            train a small transformer with optwatch on, and show what it sees (BREAK=nan breaks it)"
	@echo "make test            lint and every test, against real Prometheus, Alertmanager and PostgreSQL"
	@echo "make lint            ruff, mypy --strict, import rules"
	@echo "make generate        everything that is generated: dashboards, metric reference, wire schema, SLO rules"
	@echo "make bench           what the agent costs and finds, against what a user would pick instead"
	@echo "make bench-gpu       the same on a GPU, and the tests that need one"
	@echo "make optimizers      every optimizer of every package against its definition; takes minutes"

# The demo needs Python 3.10, development 3.11 (the Grafana SDK's own floor).
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (once; takes a minute)"
	@$(PIP_INSTALL) -e '.[torch,server]' -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) for development (once; takes a minute)"
	@$(PIP_INSTALL) -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py $(if $(BREAK),--break $(BREAK))

packages:
	@sh scripts/packages $(PYTHON)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Agent and server against the built wheel, from a folder where the sources are out of reach.
wheel-test: $(VENV)/.dev packages
	$(BIN)/python scripts/test_wheel.py -n $(JOBS)

# What the wheel carries, and what stands around it, in the checkout. One test at a time to whoever is free: a process
# with an end-to-end test would otherwise have others waiting behind it, for minutes.
checkout-test: $(VENV)/.dev packages
	$(BIN)/pytest -n $(JOBS) --maxschedchunk 1 --ignore=tests/agent --ignore=tests/server

test: lint wheel-test checkout-test

generate: $(VENV)/.dev
	$(BIN)/python dashboards/generate.py
	$(BIN)/python scripts/generate_reference.py
	$(BIN)/python scripts/generate_optimizers.py
	$(BIN)/python scripts/generate_audit.py
	$(BIN)/python scripts/generate_schema.py
	$(BIN)/python scripts/generate_slo.py
	$(BIN)/python scripts/generate_chart.py

# Every optimizer of every package against its definition; the tests run a sample.
optimizers: $(VENV)/.dev
	OPTWATCH_ALL_OPTIMIZERS=1 $(BIN)/python -m pytest tests/agent/state/test_optimizers.py

# Every optimizer in every way of training; the tests train a covering part. About an hour of two cores: SLICE=3/32 is a
# part of it. What is done stays in build/matrix and is not done again.
matrix: $(VENV)/.dev
	$(BIN)/python tests/agent/matrix/run.py --out build/matrix --slice $(or $(SLICE),1/1) --report benchmarks/results/matrix.md

# What the agent is compared with, in an environment of its own: their pins have nothing to do with ours.
$(VENV)-peers/.peers: pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/requirements-composer.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(PEERS_INSTALL) -e '.[torch]' -c constraints.txt
	$(PEERS_INSTALL) -r benchmarks/requirements.txt -c constraints.txt
	$(PEERS_INSTALL) --no-deps -r benchmarks/requirements-composer.txt
	@touch $@

bench: $(VENV)/.dev $(VENV)-peers/.peers packages
	$(VENV)-peers/bin/python benchmarks/overhead.py
	$(BIN)/python benchmarks/scrape.py
	$(BIN)/python benchmarks/attach.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/detectors.py
	$(BIN)/python benchmarks/attribution.py
	$(BIN)/python benchmarks/time_to_page.py

# What only a GPU can tell; it skips with the reason where there is none.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu tests/agent
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf build dist $(VENV) $(VENV)-peers .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
