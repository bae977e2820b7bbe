# Four commands; each sets up its own virtual environment in .venv and needs nothing but Python ≥ 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint bench clean

# Simulate a city, ingest, predict, score, report: prints the scores and where the map and the report lie.
# With SERVER=1 on a Prefect server, whose UI stays open at the printed address until Ctrl-C.
demo: $(READY)
	$(BIN)/roadfuse demo --out demo $(if $(SERVER),--server)

test: $(READY)
	$(BIN)/python -m pytest

# Proofs that take minutes: faults injected at random, large inputs.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Ratios measured in one run on this machine.
bench: $(READY)
	$(BIN)/python -m tests.benchmarks

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "RoadFuse needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) demo build *.egg-info
