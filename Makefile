# Two commands do everything on a fresh Linux machine: `make demo` and `make test`.
# ENGINE=gpu installs the CUDA build of the engine instead of the CPU build.

ENGINE ?= cpu
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(ENGINE)
# mergekit, the peer of tests and benchmarks, in an environment of its own
PEER   := .venv-mergekit/.installed

# triton, for its interpreter, in a folder of its own: a CPU engine must not find it
TRITON := .triton/.installed

# The CPU build of torch is not on the package index: take it from a wheel folder if one is given, else from PyTorch's own index.
ifeq ($(ENGINE),cpu)
TORCH_FROM := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",--torch-backend cpu)
endif

.PHONY: help setup demo test check types unit triton-test zoo format lock clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv with the `evomerge` command (nothing happens when it is up to date)

$(STAMP): pyproject.toml requirements/$(ENGINE).txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, found {v[0]}.{v[1]}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python $(TORCH_FROM) requirements/$(ENGINE).txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
# Starting vLLM and Ray without bytecode takes twice as long. Files for other Python versions do not compile: no reason to stop.
	-@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: setup ## train the demo models, search, export the best recipe, merge it, score it
	$(BIN)/evomerge zoo build --out zoo
	rm -rf runs/demo runs/demo-merged
	$(BIN)/evomerge search configs/demo.yaml --run-dir runs/demo
	$(BIN)/evomerge export runs/demo --pick best -o runs/demo-best.yaml --overwrite
	$(BIN)/evomerge merge runs/demo-best.yaml runs/demo-merged
	$(BIN)/evomerge eval runs/demo-merged --config runs/demo --split report
	@$(BIN)/evomerge summary runs/demo
	@echo "report:       $$($(BIN)/evomerge report runs/demo)"
	@echo "merged model: runs/demo-merged"

$(PEER): requirements/mergekit.txt | $(STAMP)
	$(PYTHON) -m venv .venv-mergekit
	$(BIN)/uv pip sync --quiet --python .venv-mergekit/bin/python $(TORCH_FROM) requirements/mergekit.txt
	@touch $@

test: setup check types zoo triton-test unit ## everything CI checks

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

zoo: setup
	$(BIN)/evomerge zoo build --out zoo

unit: setup $(PEER)
	$(BIN)/pytest -n 2 --no-loadscope-reorder -m 'not alone'
	$(BIN)/pytest -m alone

$(TRITON): requirements/triton.txt | $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .triton -r requirements/triton.txt
	@touch $@

triton-test: setup $(TRITON) ## the GPU's kernels, and vLLM's, run by Triton's interpreter and compiled, without a GPU
	PYTHONPATH=.triton TRITON_INTERPRET=1 $(BIN)/pytest tests/weights/test_triton_kernels.py tests/weights/test_triton_left_to_cpu.py tests/weights/test_triton_benchmark.py
	PYTHONPATH=.triton TRITON_INTERPRET=1 $(BIN)/pytest tests/engine/test_gpu_model_runner.py
	PYTHONPATH=.triton $(BIN)/pytest tests/weights/test_triton_compile.py

format: setup ## rewrite the code in its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## resolve the dependencies again
	$(BIN)/uv pip compile --quiet pyproject.toml --extra cpu --extra dev --extra bo --extra optuna --extra nevergrad \
	  --override requirements/cpu-overrides.txt $(TORCH_FROM) --python-version 3.11 \
	  --no-emit-index-url --no-emit-find-links --no-header --upgrade -o requirements/cpu.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --extra gpu --extra dev --extra bo --extra optuna --extra nevergrad \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-emit-index-url --no-emit-find-links --no-header --upgrade -o requirements/gpu.txt

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-mergekit .triton zoo runs/demo runs/demo-merged runs/demo-best.yaml .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
