# Two commands on a fresh machine: `make quickstart` and `make test`. Both first make .venv and install pinned versions.
# .ci/choose_python.py chooses the Python of a new environment, or `make PYTHON=python3.12` names it. Two environments live side by
# side: make VENV=.venv-3.12 PYTHON=python3.12 test-core
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed$(if $(PYTHON),-$(subst /,_,$(PYTHON)))
PYTEST := $(BIN)/python -m pytest

SIZE ?= full

# Tests run in two workers, a file at a time; tests that start a cluster run alone.
WORKERS ?= 2
# Folders in the order of their names, so that the long files run first and tests/unit fills the end.
AT_ONCE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What a version of megatron-core can change. CI runs it on Python 3.12 beside the whole suite on 3.11.
CORE := $(addprefix tests/distributed/test_,reshard.py resume.py layouts.py hazards.py damaged_shards.py async_save.py) tests/judges \
	tests/distributed/test_muon_layouts.py tests/golden tests/numerics/test_muon.py tests/numerics/test_conversion.py tests/quickstart/test_one_minute.py tests/unit/platform tests/unit/checkpoint
# Long tests in these files of what does not depend on the version: kills and signals at random moments.
NOT_CORE := $(addprefix --deselect tests/distributed/test_resume.py::test_,kills_at_random_moments_change_nothing \
	sigterm_at_any_moment_saves_and_the_same_command_resumes)

.PHONY: quickstart study docs test test-fast test-slow test-core moves check unit clean

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py

study: $(STAMP)
	$(BIN)/python examples/study/study.py --size $(SIZE) $(if $(GSM8K),--gsm8k $(GSM8K))

# The documentation as a site in build/site; a broken link fails. `$(BIN)/python -m docs.generator` writes its generated pages first.
# Not --quiet: mkdocs then counts no warnings, and --strict would accept a broken link.
docs: $(STAMP)
	$(BIN)/python -m docs.generator
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# datatrove, for examples/corpus/clean: 56 MB of downloads, 206 MB in a folder that only this script reads, so that it changes nothing else.
# With it `make test` runs tests/cleaning too; without it they are skipped.
DATATROVE := $(VENV)/datatrove/.installed
.PHONY: install-datatrove
install-datatrove: $(DATATROVE)

$(DATATROVE): examples/corpus/clean/requirements.txt $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --no-deps --no-compile --target $(@D) -r $<
	touch $@

# Transformer Engine's layers and Megatron Bridge beside ours, without a GPU: 11 MB of packages in a folder that only tests/judges reads.
# With them installed, `make test` runs tests/judges too; without them it skips them.
JUDGES := $(VENV)/judges/.installed
.PHONY: judges install-judges
install-judges: $(JUDGES)

judges: $(JUDGES)
	$(PYTEST) tests/judges --durations=5

$(JUDGES): tests/judges/requirements.txt $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --no-deps --no-compile --target $(@D) -r $<
	touch $@

CHECK := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy megatron_ledom

# All tests except the slow ones. The first part waits most of the time, so `check` runs beside it; if that fails, nothing else runs. The
# second part also runs if the first fails; a failure of either fails the target.
test: $(STAMP)
	@first=0; second=0; log=$$(mktemp); \
	($(CHECK)) >$$log 2>&1 & check=$$!; \
	echo "=== 1 of 2: tests that start a cluster, and lint and types"; \
	$(PYTEST) tests/slurm --durations=5 || first=$$?; \
	wait $$check; checked=$$?; cat $$log; rm -f $$log; \
	[ $$checked = 0 ] || exit $$checked; \
	echo "=== 2 of 2: all tests without a cluster, $(WORKERS) at once"; \
	$(PYTEST) tests --ignore=tests/slurm $(AT_ONCE) --durations=40 || second=$$?; \
	echo "=== exit codes: $$first, $$second"; \
	exit $$((first > second ? first : second))

# Lint, types and unit tests: run before each commit.
test-fast: check unit

test-slow: $(STAMP)
	$(PYTEST) tests -m slow --durations=20

# Tests of judges run if `make install-judges` has been run.
test-core: $(STAMP)
	$(PYTEST) $(CORE) $(NOT_CORE) $(AT_ONCE) --durations=25

# Checkpoints of one megatron-core read by another: CORES has NAME=PYTHON[,FOLDER] for each (tests/benchmarks/move_checkpoints.py).
moves: $(STAMP)
	$(BIN)/python tests/benchmarks/move_checkpoints.py $(CORES)

check: $(STAMP)
	$(CHECK)

unit: $(STAMP)
	$(PYTEST) tests/unit $(AT_ONCE) -m "not distributed" --durations=10

# An environment of another Python than the named one is replaced.
$(STAMP): pyproject.toml setup.py $(wildcard constraints/*) .ci/make_venv .ci/choose_python.py $(wildcard csrc/*/*)
	PYTHON="$(PYTHON)" bash .ci/make_venv "$(VENV)"
	touch "$(VENV)/.installed" "$@"

clean:
	rm -rf $(VENV) build minute quickstart study
