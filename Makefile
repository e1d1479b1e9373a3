# `make help` lists the targets. Works with GNU make 3.81 (macOS) and newer.

PYTHON ?= python3
VENV ?= .venv
NEXT_VENV ?= .venv-next
WORKERS ?= 2
ARGS ?=
TUTORIALS ?= $(sort $(wildcard tutorials/[0-9][0-9]_*.py))

BIN := $(VENV)/bin
# Made when an install has finished; an install runs again when what is asked for has changed.
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev
NEXT_STAMP := $(NEXT_VENV)/.installed
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP_INSTALL) -c constraints.txt
NEXT_INSTALL := $(NEXT_VENV)/bin/python $(PIP_INSTALL)
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help demo install test test-next lint format bench gpu tutorials wheel clean distclean

help: ## list the targets
	@echo "usage: make TARGET [ARGS='more arguments'] [PYTHON=python3.11] [WORKERS=2]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "The first target that needs it creates $(VENV) and installs the versions of constraints.txt"
	@echo "(test-next: $(NEXT_VENV), with TorchRL as in constraints-next.txt)."
	@echo "Examples:"
	@echo "  make demo ARGS='--env CartPole-v1'"
	@echo "  make test ARGS='-m \"not slow\" -k returns'"
	@echo "  make tutorials TUTORIALS=tutorials/01_first.py"

demo: $(DEMO_STAMP) ## learn a world model of Pendulum-v1 and plan in it (ARGS: options of `train`)
	$(BIN)/python -m layeredrl_trl train $(ARGS)

install: $(DEV_STAMP) ## install the library and everything the targets below need

test: $(DEV_STAMP) ## run all tests and docstring examples (ARGS: options of pytest)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-next: $(NEXT_STAMP) ## run them with TorchRL 0.15 as in constraints-next.txt (ARGS: options of pytest)
	$(NEXT_VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(DEV_STAMP) ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV_STAMP) ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV_STAMP) ## time what benchmarks/ measures and print a table (ARGS: options of pytest)
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only $(ARGS)

gpu: $(DEV_STAMP) ## run the tests that need a GPU, then check and time everything on it (ARGS: options of benchmarks.gpu)
	@status=0; \
	$(BIN)/python -m pytest -m gpu || status=$$?; \
	$(BIN)/python -m benchmarks.gpu $(ARGS) || status=$$?; \
	exit $$status

tutorials: $(DEV_STAMP) ## execute tutorials/*.py into the notebooks beside them
	@set -e; for script in $(TUTORIALS); do \
		notebook="$${script%.py}.ipynb"; \
		echo "$$script -> $$notebook"; \
		$(BIN)/jupytext --quiet --to ipynb --set-kernel python3 --update --output "$$notebook" "$$script"; \
		$(BIN)/jupyter-execute --inplace "$$notebook"; \
	done

wheel: ## build sdist and wheel into dist/ and try the wheel in a new environment
	@$(CHECK_PYTHON)
	$(PYTHON) .ci/check_wheel.py dist

clean: ## remove caches and what training and building left here
	rm -rf build dist outputs runs .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -path './$(NEXT_VENV)' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## clean, and remove $(VENV) and $(NEXT_VENV)
	rm -rf $(VENV) $(NEXT_VENV)

$(BIN)/python:
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the library and the demo's packages into $(VENV) (about a minute)"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the library and the development packages into $(VENV) (a minute or two)"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(DEMO_STAMP)

# Made anew: torchrl and torchrl-nightly share a folder, and pip would mix what changes between them.
$(NEXT_STAMP): pyproject.toml constraints-next.txt constraints.txt
	@echo "installing the next TorchRL and what the tests need into $(NEXT_VENV) (a minute or two)"
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(NEXT_VENV)
	$(NEXT_INSTALL) -r constraints-next.txt
	$(NEXT_INSTALL) --no-deps -e .
	@touch $@
