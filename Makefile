# `make demo` and `make test` each set up all they need in .venv; a second call finds it done.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all lint format clean

demo: $(READY)
	$(BIN)/holdfast demo

test: lint
	$(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST)

test-all: lint
	$(BIN)/python -m pytest -n auto $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks experiments
	$(BIN)/ruff format --check src tests benchmarks experiments
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix src tests benchmarks experiments
	$(BIN)/ruff format src tests benchmarks experiments

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# DeepSpeed comes as source, whose setup asks the torch that is installed; it compiles nothing.
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation deepspeed
	touch $@

clean:
	rm -rf .venv runs
