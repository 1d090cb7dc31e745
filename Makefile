# `make demo` and `make test` each do all the set-up: Python 3.10 or newer and make are enough.

# the tested version; any pip requirement can be named, options included
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv

BIN := $(VENV)/bin

.PHONY: help demo test test-long test-triton lint bench report clean FORCE

help:
	@echo 'make demo    segment a synthetic case with the shipped weights'
	@echo 'make test    run the tests'
	@echo 'make test-long    run those that it leaves out for the time they take'
	@echo 'make test-triton TRITON=3.6.0   the same for the kernels alone, with another triton'
	@echo 'make lint    run ruff and mypy'
	@echo 'make bench   run the benchmarks'
	@echo 'make report  draw the figures and fill in the tables from benchmarks/results'
	@echo 'make clean   remove the virtual environment, builds and caches'
	@echo
	@echo 'variables    PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH="$(TORCH)"'

demo: $(VENV)/.installed
	$(BIN)/meddanet demo

test: $(VENV)/.installed-test
	$(BIN)/pytest -n auto
	$(BIN)/pytest tests/test_cli.py -k test_info_kernels
# Triton reads the variable while it decorates a kernel, hence a second process
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto tests/kernels

test-long: $(VENV)/.installed-test
	$(BIN)/pytest -n auto -m long
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto -m long tests/kernels

# in a virtual environment of its own; the interpreter of triton 3.6 needs numpy below 2.4
OTHER := $(VENV)-triton-$(TRITON)
test-triton:
	@test -n '$(TRITON)' || { echo 'name one: make test-triton TRITON=3.6.0' >&2; exit 1; }
	$(MAKE) VENV=$(OTHER) $(OTHER)/.installed-test
	$(OTHER)/bin/pip install --no-deps triton==$(TRITON) 'numpy<2.4'
	$(OTHER)/bin/pytest -n auto tests/kernels tests/test_backend.py tests/test_kernel_list.py
	TRITON_INTERPRET=1 $(OTHER)/bin/pytest -n auto tests/kernels

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/pytest benchmarks --benchmark-only

report: $(VENV)/.installed-plots
	$(BIN)/python benchmarks/report.py

clean:
	test ! -f $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	rm -rf $(VENV)-triton-*
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

# the last file that venv writes: an interrupted set-up is repeated
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'meddanet needs Python 3.10 or newer, and $(PYTHON) is not: name one, as in' >&2; \
	  echo '  make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo '$(PYTHON) -m venv failed: install the venv module (Debian, Ubuntu: apt install python3-venv),' >&2; \
	  echo 'or name another Python: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }

# rewritten only when TORCH changes, so that another torch is installed then
$(VENV)/torch.txt: $(BIN)/pip FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch comes first: whatever depends on it then keeps the build named here
$(VENV)/.torch: $(VENV)/torch.txt
	$(BIN)/pip install $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml meddanet/version.py
	$(BIN)/pip install --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch setup.py pyproject.toml meddanet/version.py
	$(BIN)/pip install --editable '.[$*]'
	@touch $@
