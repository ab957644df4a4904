# `make train` and `make test` work on a machine with Python >= 3.11, make and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test slow lint types kernels

train: $(VENV)/.installed
	$(BIN)/python -m redi.engine.quickstart make runs/quickstart
	OMP_NUM_THREADS=1 $(BIN)/redi train $(addprefix engine/recipes/quickstart-, sft.toml control.toml redi.toml sft-simper.toml)
	OMP_NUM_THREADS=1 $(BIN)/python -m redi.engine.quickstart report runs/quickstart

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest --import-mode=importlib -n 2 --dist loadfile

slow: $(VENV)/.installed-test
	$(BIN)/pytest --import-mode=importlib -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An installed copy: mypy cannot see through the editable mapping of folders to import names.
types: $(VENV)/.installed-test
	rm -rf .typecheck
	$(BIN)/pip install --quiet --no-deps --target .typecheck .
	MYPYPATH=.typecheck $(BIN)/mypy -p redi.kernels -p redi.engine -p redi.bench

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[engine]'
	touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.installed

# The Triton kernels for each GPU, or for those in TARGETS: registers, shared memory; fails if
# anything spills.
kernels: $(VENV)/.installed-test
	$(BIN)/python -W ignore -m redi.bench.build $(if $(TARGETS),--targets $(TARGETS))
