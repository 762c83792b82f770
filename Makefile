# The project's commands. CI calls these and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo check test test-gpu bench

# torch first and by its exact version, so that no CUDA build is drawn in where there is no GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/strata run -m demo -p "Once upon a time" -n 160 --temp 0.7 --seed 1

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: install
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90

# On a machine with a GPU: correctness, then the share of its bandwidth that each kernel reaches.
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m scripts.gpu_check

bench: install
	$(BIN)/strata bench -m demo
