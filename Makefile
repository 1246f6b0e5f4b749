# SPDX-License-Identifier: Apache-2.0
# Thin on purpose: what a target does stands in tools/.
PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= The with statement is used to
PY      = $(VENV)/bin/python

export MAX_JOBS CMAKE_ARGS

.PHONY: demo test build wheels lint bench bench-dispatch bench-cpu abi-matrix tables clean setup
demo: setup              ## set up, build, and generate text through opmux
	$(VENV)/bin/opmux demo "$(PROMPT)"

test: setup              ## everything that this machine can check
	$(PY) -m pytest tests

setup:                   ## virtual environment, torch, and every backend that this machine can build
	$(PYTHON) tools/setup.py --venv $(VENV)

build:                   ## wheels into dist/; honours MAX_JOBS and CMAKE_ARGS
	$(PYTHON) tools/setup.py --venv $(VENV) --wheels-only

wheels: build            ## the same, with the CPU wheel repaired to its manylinux tag
	$(PY) tools/repair_wheel.py dist

lint: setup              ## formatting, style, types
	$(PY) tools/lint.py

bench: bench-dispatch bench-cpu
bench-dispatch: setup    ## cost of a call over the torch op, and of the import
	$(PY) benchmarks/dispatch.py
bench-cpu: setup         ## CPU kernels beside torch, as a fraction of the copy bandwidth
	$(PY) benchmarks/cpu.py

abi-matrix: build        ## the wheel in dist/ on every torch and CPython of the matrix
	$(PY) tools/abi_matrix.py

tables: setup            ## write the generated tables and stubs again
	$(PY) tools/generate.py

clean:
	rm -rf build dist $(VENV) backends/*/build
