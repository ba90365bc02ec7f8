# Two commands need nothing before them but Python 3.10+, its venv module and (for the C++ kernels) a compiler:
#   make demo    environment, install, and the main job on the bundled real data
#   make test    environment, install, and the tests
PYTHON ?= python3
VENV   ?= .venv
STEPS  ?=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint install clean

install: $(STAMP)

# torch first, and no build isolation, so that the extension compiles against the torch it will run with.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip<27" "setuptools>=77" wheel ninja pybind11
	$(BIN)/pip install --quiet "torch>=2.10" numpy
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/diffgap demo $(if $(STEPS),--steps $(STEPS))

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info diffgap/_C_*.so .pytest_cache .mypy_cache .ruff_cache demo-run
