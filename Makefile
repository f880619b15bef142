# make quickstart   install, then run the whole pipeline on simulated radar data (see README)
# make test         install, then run the tests
# make lint         install, then check the code with ruff and its types with mypy (rules in pyproject.toml)
# make notebooks    install, then execute the notebooks of docs/tutorials: up to 10 min each on 2 CPU cores
# make docs         install, then build the documentation into site/; start with site/index.html
# make clean        delete the output of make quickstart and make docs
# Packages are installed into .venv, and updated only if pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Waiting OpenMP threads must not spin: they would occupy the cores of other ranks.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup test lint notebooks docs quickstart clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[mpi,test]"
	touch $(STAMP)

# One process of tests per core, up to 8, of about 1 GiB each. With bytecode, which the environment may turn off, the
# programs that tests start do not compile the package each time.
test: export PYTHONDONTWRITEBYTECODE :=
test: setup
	$(VENV)/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal tests

lint: setup
	$(VENV)/bin/python -c "import mypy" 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[lint]"
	$(VENV)/bin/python -m ruff check guided_diffusion_vae scripts benchmarks tests
	$(VENV)/bin/python -m mypy

quickstart: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash scripts/quickstart.sh

notebooks: setup
	$(VENV)/bin/python -c "import nbclient, ipykernel" 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[tutorials]"
	$(VENV)/bin/python docs/tutorials/run.py

# The site needs packages that nothing else needs. The variable turns off an advertisement.
docs: setup
	$(VENV)/bin/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict

clean:
	rm -rf quickstart site
