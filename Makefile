# SPDX-License-Identifier: Apache-2.0
# Thin on purpose: what a target does stands in tools/.
PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= The with statement is used to
PY      = $(VENV)/bin/python

SETUP   = $(PYTHON) tools/setup.py --venv $(VENV) --backends "$(BACKENDS)"

# BACKENDS=cuda: build that one too, also where it cannot run; OPMUX_CUDA_ARCHS=90a: for one GPU
export MAX_JOBS CMAKE_ARGS OPMUX_CUDA_ARCHS

.PHONY: demo test build wheels lint docs bench bench-dispatch bench-cpu abi-matrix tables clean setup
demo: setup              ## set up, build, and generate text through opmux
	$(VENV)/bin/opmux demo "$(PROMPT)"

test: setup              ## everything that this machine can check
	$(PY) -m pytest tests

setup:                   ## virtual environment, torch, and every backend that this machine can build
	$(SETUP)

build:                   ## wheels into dist/: of all that can be compiled; MAX_JOBS and CMAKE_ARGS limit it
	$(SETUP) --wheels-only

wheels: build            ## the same, with the manylinux tag
	$(PY) tools/repair_wheel.py dist

lint: setup              ## formatting, style, types
	$(PY) tools/lint.py

bench: bench-dispatch bench-cpu
bench-dispatch: setup    ## cost of a call over the torch op, and of the import
	$(PY) benchmarks/dispatch.py
bench-cpu: setup         ## CPU kernels beside torch, as a fraction of the copy bandwidth
	$(PY) benchmarks/cpu.py

abi-matrix: setup        ## the wheels in dist/ on every torch and CPython of the matrix
	$(PY) tools/abi_matrix.py

tables: setup            ## write the generated tables and stubs again
	$(PY) tools/generate.py

docs: setup              ## the site, into build/site; what it needs is installed once
	$(PY) -m pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

clean:
	rm -rf build dist $(VENV) backends/*/build
