# `make demo`, `make images`, `make real` and `make test` each set up all they need in .venv; a second call finds it done.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CODE := src tests benchmarks examples experiments .ci
LOWEST := .venv-lowest
# The core: configuration, data, training, resume, scores and the report.
LOWEST_TESTS := tests/whole/test_project.py tests/whole/test_bad_input.py tests/data/test_formats.py \
	tests/data/test_load.py tests/runner/test_run.py tests/training/test_trainer.py \
	tests/rehearsal/test_rehearsal.py tests/tuners/test_tuners.py tests/scoring/test_scorers.py \
	tests/evaluation/test_evaluation.py tests/report/test_report.py

.PHONY: demo images real test test-all test-lowest wheel docs lint format clean

demo: $(READY)
	$(BIN)/holdfast demo

images: $(READY)
	$(BIN)/holdfast demo --images

real: $(READY)
	$(BIN)/holdfast demo --real

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(PYTEST)

test-all: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)

# The lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/holdfast --version
	$(LOWEST)/bin/holdfast run --help >/dev/null
	$(LOWEST)/bin/python -m pytest -m "not slow" $(LOWEST_TESTS)

wheel:
	PYTHON=$(PYTHON) .ci/wheel

# The site, in build/docs/site. A dead link, a missing page and a page that no navigation names fail.
docs: .venv/.docs
	$(BIN)/python .ci/pages.py build/docs
	$(BIN)/zensical build --strict --clean --config-file build/docs/zensical.yml

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Python compiles what it imports; to compile all that is installed takes longer than to install it.
PIP := pip install --disable-pip-version-check --no-compile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[dev]'
	# DeepSpeed comes as source, whose setup asks the torch that is installed; it compiles nothing.
	$(BIN)/$(PIP) --constraint constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/$(PIP) --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

.venv/.docs: $(READY)
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/$(PIP) --constraint constraints-lowest.txt --editable . pytest
	touch $@

clean:
	rm -rf .venv $(LOWEST) build dist runs
