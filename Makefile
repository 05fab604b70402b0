# make demo    a whole swarm on this machine, in minutes     make test   everything that is tested
# make setup   only what both need                           make lint   style and types     make fast  quick tests
# make chaos   everything bad at its full length, and its prices into docs/reliability.md; make test has the short form
# make fuzz    garbage wherever bytes come from strangers: 100,000 inputs instead of the few thousand of make fast

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo test fast swarm faults chaos fuzz lint bench clean

setup: $(READY)

# The mark is written last, so an interrupted installation is taken up again; pip keeps what it has.
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11. Install a newer one, then: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (a few minutes the first time) ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check --progress-bar on -r requirements-dev.txt
	@touch $@

demo: setup
	@$(RUN) scripts/local_swarm.py --config configs/demo.yaml --trainers 2

test: fast swarm faults

fast: setup
	@$(RUN) -m pytest -m "not swarm and not chaos"

swarm: setup
	@$(RUN) -m pytest -m swarm

faults: setup
	@$(RUN) -m pytest -m chaos

chaos: setup
	@mkdir -p runs && rm -f runs/prices.jsonl
	@CHAOS=full PRICES=runs/prices.jsonl $(RUN) -m pytest -m chaos
	@$(RUN) -m tests.chaos.prices runs/prices.jsonl
	@$(RUN) scripts/chaos.py --minutes 20

fuzz: setup
	@SAMITI_FUZZ=30 $(RUN) -m pytest tests/fuzz

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: setup
	@$(RUN) -m benchmarks.demo

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
