# Every target does its own set-up; `make help` lists them. Settings, all optional:
#   PYTHON=python3  TORCH=2.13.0  VENV=.venv  OUT_DIR=bench/out  QUICK=1  FULL=1  MAX_JOBS=2
PYTHON  ?= python3
TORCH   ?= 2.13.0
VENV    ?= .venv
OUT_DIR ?= bench/out

python := $(VENV)/bin/python

export PYTHONUNBUFFERED := 1
.DEFAULT_GOAL := help
.PHONY: help test test-full bench bench-full package-check gpu-check lint format clean
.NOTPARALLEL:

help:           ## this list
	@sed -n 's/^\([a-z-]*\): .*## /  make \1@/p; s/^\([a-z-]*\):  *## /  make \1@/p' Makefile | sort -u | column -t -s@

setup-%:
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --torch $(TORCH) $*

test: setup-test            ## the test suite (at most 15 minutes on 2 cores)
	@tools/test.sh $(python)

test-full: setup-test       ## test, then sanitizers, a run on memory filled with rubbish, long property runs
	@tools/test_full.sh $(python)

bench: setup-bench          ## check every operator, then the benchmark table (at most 5 minutes)
	@tools/bench.sh $(python) --quick $(OUT_DIR)/quick.json

bench-full: setup-bench     ## the same with every case and size
	@tools/bench.sh $(python) --full $(OUT_DIR)/full.json

package-check: setup-package  ## wheel, sdist, editable, isolated; several torches and Pythons (FULL=1: all of them)
	@$(python) tools/package_check.py --torch $(TORCH) $(if $(FULL),--full)

gpu-check:                  ## on a GPU machine, offline: build, GPU tests, sanitizers, benchmarks (QUICK=1: 3 minutes)
	@$(PYTHON) tools/gpu_check.py --out-dir $(OUT_DIR) $(if $(QUICK),--quick)

lint: setup-lint            ## ruff and clang-format, changing nothing
	@tools/lint.sh $(VENV)/bin check

format: setup-lint          ## the same, in place
	@tools/lint.sh $(VENV)/bin fix

clean:                      ## removes what builds and runs left behind, except the virtual environment
	@rm -rf build dist .pytest_cache .hypothesis .benchmarks .ruff_cache bench/out *.egg-info
	@rm -f pyperf_dl/*.so pyperf_dl/_triton
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
