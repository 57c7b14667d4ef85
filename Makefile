# Two commands on a fresh machine: `make quickstart` and `make test`. Both first make .venv and install pinned versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

SIZE ?= full

# Tests that need one process run in two workers, a file at a time; tests that start ranks or a cluster run alone.
WORKERS ?= 2
AT_ONCE := -n $(WORKERS) --dist loadfile
ALONE := distributed or slurm

.PHONY: quickstart study docs test test-fast test-slow moves check unit clean

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py

study: $(STAMP)
	$(BIN)/python examples/study/study.py --size $(SIZE) $(if $(GSM8K),--gsm8k $(GSM8K))

# The documentation as a site in build/site; a broken link fails. `$(BIN)/python -m docs.generator` writes its generated pages first.
# Not --quiet: mkdocs then counts no warnings, and --strict would accept a broken link.
docs: $(STAMP)
	$(BIN)/python -m docs.generator
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All tests except the slow ones. The second part also runs if the first fails; a failure of either fails the target.
test: check
	@first=0; second=0; \
	echo "=== 1 of 2: tests of one process, $(WORKERS) at once"; \
	$(PYTEST) tests $(AT_ONCE) -m "not ($(ALONE))" --durations=15 || first=$$?; \
	echo "=== 2 of 2: tests that start ranks or a cluster, one after the other"; \
	$(PYTEST) tests -m "$(ALONE)" --durations=15 || second=$$?; \
	echo "=== exit codes: $$first, $$second"; \
	exit $$((first > second ? first : second))

# Lint, types and unit tests: run before each commit.
test-fast: check unit

test-slow: $(STAMP)
	$(PYTEST) tests -m slow --durations=20

# Checkpoints of one megatron-core read by another: CORES has NAME=PYTHON[,FOLDER] for each (tests/benchmarks/move_checkpoints.py).
moves: $(STAMP)
	$(BIN)/python tests/benchmarks/move_checkpoints.py $(CORES)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_ledom

unit: $(STAMP)
	$(PYTEST) tests/unit $(AT_ONCE) -m "not ($(ALONE))" --durations=10

$(STAMP): pyproject.toml setup.py constraints.txt .ci/make_venv $(wildcard csrc/*/*)
	PYTHON="$(PYTHON)" bash .ci/make_venv "$(VENV)"
	touch $@

clean:
	rm -rf $(VENV) build minute quickstart study
