# Everything happens in .venv; nothing but Python 3.11+, a C compiler and make need be there before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml README.md LICENSE $(shell find engine native -name '*.py' -o -name '*.py[ix]' -o -name '*.pxd' -o -name '*.[ch]' -o -name '*.html')

.PHONY: help demo test soak lint bench fuzz wheel clean

help:
	@echo "make demo    train, load, serve and query 2013's flights out of New York, end to end"
	@echo "make test    lint, type-check and test the installed package"
	@echo "make soak    thousands of killed processes, and 100,000 random steps of a store, in about ten minutes"
	@echo "make lint    ruff, mypy and stubtest alone"
	@echo "make fuzz    a million damaged frames against the server (an hour)"
	@echo "make bench   the server against a bare C echo server, on this machine"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove what the others made"

demo: $(VENV)/demo
	$(BIN)/python demo/run.py

test: lint
	$(BIN)/python -m pytest

soak: $(VENV)/test
	SHORTTAIL_FAULT_CYCLES=1000 SHORTTAIL_MACHINE_STEPS=100000 $(BIN)/python -m pytest -s tests/faults tests/unit/test_store_machine.py

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest --ignore-missing-stub --ignore-disjoint-bases --mypy-config-file pyproject.toml $(patsubst native/%.pyx,shorttail._native.%,$(wildcard native/*.pyx))

fuzz: $(VENV)/test
	FUZZ_FRAMES=1000000 $(BIN)/python -m pytest -x -s tests/fuzz

bench: $(VENV)/demo
	$(BIN)/python bench/serve.py

wheel: $(VENV)/python
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# One stamp for each set of extras. The package is installed as users install it, not as a link to this folder.
$(VENV)/demo: $(VENV)/python $(SOURCES)
	$(BIN)/pip install --quiet '.[demo]'
	@touch $@

$(VENV)/test: $(VENV)/python $(SOURCES)
	$(BIN)/pip install --quiet '.[test,lint]'
	@touch $@

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit("shorttail needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist demo/out engine/*.egg-info engine/shorttail/_native/*.so
