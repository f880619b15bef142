# make quickstart   set up, then run the whole pipeline on simulated radar data (see README)
# make test         set up, then run the tests
# make lint         set up, then let ruff read the code (rules in pyproject.toml)
# They install into .venv once, and again only after pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# OpenMP threads that spin while waiting take the cores of the other ranks.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup test lint quickstart clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[mpi,test]"
	touch $(STAMP)

test: setup
	$(VENV)/bin/python -m pytest -q tests

lint: setup
	$(VENV)/bin/python -m ruff check guided_diffusion_vae scripts benchmarks tests

quickstart: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash scripts/quickstart.sh

clean:
	rm -rf quickstart
