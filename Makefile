# make demo   load the small trained model, let it write, score it with lm-eval (about two minutes after the install)
# make test   the test suite on this machine's CPU; GPU tests run too where there is a GPU
# make lint   ruff's checks and formatting
# Each makes .venv first if it is missing. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint

demo: $(READY)
	@$(BIN)/python -m modeling_rebased.eval.demo

test: $(READY)
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
