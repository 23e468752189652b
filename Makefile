# `make serve` is all a fresh machine with Python 3.11+ needs: it makes .venv, installs into it and
# serves the bundled model. Everything is idempotent; a stamp file remembers what is installed.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
WORKERS ?= 2
GPU_PYTHON ?= $(shell test -x $(VENV)/bin/python && echo $(VENV)/bin/python || echo $(PYTHON))

.PHONY: help serve venv test quick exhaustive lint format docs gpu-check gpu-bench clean

help:
	@echo 'make serve   the bundled model on http://$(HOST):$(PORT)/v1 (PORT=, HOST=, ARGS=)'
	@echo 'make venv    everything for development into $(VENV) (PYTHON=python3.12)'
	@echo 'make test    the test suite; make quick leaves out the slow ones, make exhaustive fills matrices'
	@echo 'make lint    ruff, mypy, import rules'
	@echo 'make gpu-check, gpu-bench   what a GPU must show; ARGS=--dry-run tries them without one'

serve: $(VENV)/.runtime
	@exec $(VENV)/bin/foresight serve --config configs/demo.yaml --host $(HOST) --port $(PORT) $(ARGS)

venv: $(VENV)/.development

test: $(VENV)/.development
	$(VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

quick: $(VENV)/.development
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m 'not slow and not exhaustive' $(ARGS)

exhaustive: $(VENV)/.development
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m exhaustive $(ARGS)

lint: $(VENV)/.development
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.development
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.development
	$(VENV)/bin/python -m cli.document
	$(VENV)/bin/python -m docs.tables

# By .venv where it is, else by PYTHON: a machine with a GPU may bring its own torch.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check --json gpu-check.json $(ARGS)

gpu-bench:
	$(GPU_PYTHON) -m benchmarks.gpu_bench --json gpu-bench.json $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo 'Python 3.11 or newer is needed; say which: make PYTHON=python3.12'; exit 1; }
	@echo '== virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV)

# A bare `torch` from PyPI brings gigabytes of CUDA libraries. Without a GPU: the CPU build that
# this machine's own pip configuration offers, else the one from PyTorch's public index. PyPI's
# build for macOS is a CPU build already.
$(VENV)/.runtime: pyproject.toml Makefile | $(VENV)/bin/python
	@echo '== PyTorch'
	@torch="$$($(VENV)/bin/python deploy/requirements.py torch)"; \
	if nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname)" = Darwin ] \
	  || $(PIP) index versions torch 2>/dev/null | grep -q '+cpu'; then \
	  $(PIP) install "$$torch"; \
	else \
	  $(PIP) install --index-url https://download.pytorch.org/whl/cpu "$$torch"; \
	fi
	@echo '== Foresight and what it needs'
	@if nvidia-smi -L >/dev/null 2>&1; then $(PIP) install -e '.[gpu]'; else $(PIP) install -e .; fi
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo '== tools for development'
	@if $(VENV)/bin/python -c 'import triton' 2>/dev/null; then $(PIP) install -e '.[dev]'; \
	  else $(PIP) install -e '.[dev,interpreter]'; fi
	@touch $@
