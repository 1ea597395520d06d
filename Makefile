# Everything runs in .venv, which is created on first use. `make PYTHON=python3.12 test` uses another Python.
PYTHON ?= python3
BIN := .venv/bin
# One process per core; each test process uses one torch thread (tests/conftest.py).
PYTEST_ARGS ?= -n auto

.PHONY: install assets quickstart notebook test test-newest test-oldest kill-test bench site format lint type
.DELETE_ON_ERROR:

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora-ft needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,templates,dev]'
	@touch $@

# Download the model into models/ and the reviews into data/, unless they are there.
assets: .venv/.installed
	@$(BIN)/python scripts/assets.py

quickstart: assets
	@$(BIN)/python scripts/quickstart.py

# Run lora.ipynb and store its outputs.
notebook: assets
	$(BIN)/jupyter-execute --inplace lora.ipynb

test: .venv/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Run the tests with the newest versions that the package index has, in an environment of their own: torch's build for CUDA,
# which is gigabytes. They need a newer Python: make PYTHON=python3.13 test-newest
NEWEST := .venv-newest/bin
test-newest: .venv-newest/.installed
	$(NEWEST)/python -m pytest $(PYTEST_ARGS)

.venv-newest/.installed: pyproject.toml constraints.txt constraints-newest.txt
	@$(NEWEST)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-newest
	@awk -F '[=>]=' '!seen[$$1]++' constraints-newest.txt constraints.txt > .venv-newest/constraints.txt
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/constraints.txt -e '.[test,templates]'
	@touch $@

# Run the tests with the oldest versions that pyproject.toml allows, in an environment of their own.
OLDEST := .venv-oldest/bin
test-oldest: .venv-oldest/.installed
	$(OLDEST)/python -m pytest $(PYTEST_ARGS)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	@$(OLDEST)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps trl  # only its templates
	@touch $@

# Kill and resume a run N times and compare it with an uninterrupted run.
N ?= 200
kill-test: .venv/.installed
	@$(BIN)/python scripts/kill_test.py -n $(N)

# Speed and memory against PEFT + Trainer, TRL and the machine's limit; over an hour on an idle machine.
bench: assets
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

# The pages of docs/ as a site in site/.
site: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@$(BIN)/mkdocs build --strict --quiet

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: .venv/.installed
	$(BIN)/mypy
