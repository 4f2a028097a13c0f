# Every target makes the environment it needs, once, and reuses it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.installed
CODE := modeling_lighthubert training demo benchmarks model_cards tests

.PHONY: demo test test-fast test-integration quality style clean

demo: $(ENVIRONMENT)  ## The whole way, on the speech and the teacher in demo/. ARGS are passed on.
	$(BIN)/python demo/run_demo.py $(ARGS)

# files in the order of their names: by number of tests, the demonstration, few and long, would come last and alone
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(ENVIRONMENT)  ## All tests.
	$(PYTEST) $(ARGS)

test-fast: $(ENVIRONMENT)  ## Those that run no whole script, and compile and export nothing.
	$(PYTEST) tests/modeling tests/training $(ARGS)

test-integration: $(ENVIRONMENT)  ## Those that run whole scripts and processes, as users do.
	$(PYTEST) tests/integration $(ARGS)

quality: $(ENVIRONMENT)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

style: $(ENVIRONMENT)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# torch goes first and alone, at the version of constraints.txt: any other way pip brings gigabytes of CUDA
$(ENVIRONMENT): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Making the environment in $(VENV) (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) demo/output *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
