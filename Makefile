# Everything runs in .venv, which each target installs or refreshes as needed. PYTHON=python3.12 make demo chooses an interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

UNIT := -m "not integration" --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test unit check format clean

demo: .venv/installed                  ## caption the sample photos into demo-out/
	$(BIN)/raycap caption raycap/samples demo-out

test: unit                             ## every test
	$(BIN)/python -X faulthandler -m pytest -m integration

unit: .venv/installed-test             ## the fast tests, as many at a time as there are cores
	$(BIN)/python -m pytest $(UNIT)

check: .venv/installed-test            ## format, lint, types and every test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE) test

format: .venv/installed-test           ## format and sort imports in place
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

clean:
	rm -rf .venv demo-out

.venv/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raycap needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	ln -sf bin/python .venv/python

.venv/installed: .venv/python pyproject.toml constraints.txt
	@echo "installing raycap into .venv: a few minutes, about 6 GB with PyTorch"
	$(INSTALL) ".[onnx]"
	touch $@

.venv/installed-test: .venv/python pyproject.toml constraints.txt
	@echo "installing raycap and what its tests need into .venv: a few minutes, about 6 GB with PyTorch"
	$(INSTALL) ".[test]"
	touch .venv/installed $@
