# make quickstart   train a tiny R1-Zero on this machine's CPU and write its report
# make test         the default test tier (about 10 minutes on 2 cores)
# make lint         ruff and mypy
# PYTHON=/path/to/python3.11 chooses the interpreter; everything is installed into .venv.

PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3) python3)
VENV := .venv
CONSTRAINTS := constraints/cpu.txt
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test lint docs clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

quickstart: $(VENV)/.installed
	$(VENV)/bin/megatron-r1 run examples/quickstart/recipe.toml
	$(VENV)/bin/megatron-r1 report runs/quickstart
	@echo "The report is $(CURDIR)/runs/quickstart/report.html (one file, open it in a browser)."

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-dev
	$(VENV)/bin/megatron-r1 config > docs/configuration.md

clean:
	rm -rf $(VENV) build megatron_r1.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "megatron_r1 needs Python 3.11 or newer, but $(PYTHON) is %d.%d; give another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" % (v[0], v[1]))'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable, so that a change to the sources needs no new installation; the stamps are renewed when requirements change.
$(VENV)/.installed: $(VENV)/.created setup.py $(CONSTRAINTS)
	$(PIP) install -q -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created setup.py $(CONSTRAINTS)
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[dev]'
	@touch $(VENV)/.installed $@
