# `make demo` and `make test` do all of their own set-up, in .venv.
# Needed beforehand: Python 3.11 or newer with venv, a C compiler, make.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: setup demo test check bench compare soak simulate fuzz spec-coverage proto clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Silo needs Python 3.11 or newer: no python3 was found" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Silo needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
	           "Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/silo demo

test: setup
	$(BIN)/pytest -n 2 --dist loadgroup

soak: setup
	$(BIN)/pytest -m soak

# For example: make simulate SEEDS=1000, or make simulate FROM=17 SEEDS=1 SCENARIO=chaos
SEEDS    ?= 200
FROM     ?= 0
simulate: setup
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --from $(FROM) $(if $(SCENARIO),--scenario "$(SCENARIO)")

# For example: make fuzz MINUTES=30
MINUTES  ?= 5
fuzz: setup
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

bench: setup
	$(BIN)/silo bench engine
	$(BIN)/silo bench latency
	$(BIN)/silo bench fairness

# Silo and other queues, in environments of their own: some of those cannot share one.
# For example: make compare ARGS="--jobs 2000 --rounds 3 --only silo,huey"
COMPARE := .venv-compare
compare: $(COMPARE)/.ready
	$(COMPARE)/main/bin/python -m benchmarks $(ARGS)

$(COMPARE)/.ready: $(wildcard benchmarks/requirements/*.txt) requirements.lock pyproject.toml
	for name in main arq saq; do \
	    "$(PYTHON)" -m venv $(COMPARE)/$$name && \
	    $(COMPARE)/$$name/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements/$$name.txt || exit 1; \
	done
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_protos.py --check

spec-coverage: setup
	$(BIN)/python scripts/spec_coverage.py

proto: setup
	$(BIN)/python scripts/generate_protos.py

clean:
	rm -rf $(VENV) $(COMPARE) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
