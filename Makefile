# Two commands on a fresh machine: `make quickstart` and `make test`. Both first make .venv and install pinned versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SIZE ?= full

.PHONY: quickstart study test test-slow check unit clean

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py

study: $(STAMP)
	$(BIN)/python examples/study/study.py --size $(SIZE) $(if $(GSM8K),--gsm8k $(GSM8K))

test: check
	$(BIN)/python -m pytest tests --durations=15

test-slow: $(STAMP)
	$(BIN)/python -m pytest tests -m slow --durations=20

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_ledom

unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit

$(STAMP): pyproject.toml setup.py constraints.txt .ci/make_venv $(wildcard csrc/*/*)
	PYTHON="$(PYTHON)" bash .ci/make_venv "$(VENV)"
	touch $@

clean:
	rm -rf $(VENV) build quickstart study
