# Each target sets up what it needs in .venv and reuses it afterwards. PYTHON=… names the interpreter to start from.
PYTHON ?= python3.11
SANITIZE ?= address
VENV := .venv
BIN := $(VENV)/bin
DEPS := $(VENV)/.dependencies
BUILD := $(VENV)/.built
CPP := $(shell find csrc tests/cuda_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py setup_compile.py setup_cuda.py pyproject.toml $(filter csrc/%,$(CPP))
RESULTS := $(patsubst %,benchmarks/results/%.json,inference inference-batch8 train tails networks allocators stages)
BLOCKS := $(BIN)/python benchmarks/run.py --variants eager_conv eager_linear compile compile_linear

.PHONY: help demo test test-isa emulated cuda-check cuda-host gpu-check bench readme lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(BUILD)  ## train a small CNN on handwritten digits: without SE, with plain SE, with se_ext
	$(BIN)/python -m examples.digits $(ARGS)

test: $(BUILD)  ## every test
	SE_EXT_REQUIRE_BUILD_TREE=1 $(BIN)/python -m pytest $(ARGS)

test-isa: $(BUILD)  ## the tests of the kernels again, on every narrower instruction set of this CPU
	for isa in $$($(BIN)/python -c "from se_ext import _C; print(*_C.cpu_capabilities()[:-1])"); do \
	  SE_EXT_CPU_ISA=$$isa SE_EXT_REQUIRE_ISA=$$isa $(BIN)/python -m pytest $(or $(ARGS),tests/kernels) || exit 1; \
	done

emulated: $(BUILD)  ## every op on emulated older CPUs, against illegal instructions; needs qemu-x86_64 (qemu-user)
	SE_EXT_SLOW=1 SE_EXT_REQUIRE_QEMU=1 $(BIN)/python -m pytest tests/building/test_emulated.py $(ARGS)

cuda-check: $(BUILD)  ## the CUDA build without a GPU: compiled, linked, and what nvcc made of the kernels; needs nvcc
	$(BIN)/python tests/cuda_check.py $(ARGS)

cuda-host: $(BUILD)  ## the CUDA kernels compiled for the CPU, and their tests
	$(BIN)/python tests/cuda_host/build.py --self-test
	$(BIN)/python tests/cuda_host/emulate.py --sanitize $(SANITIZE) $(or $(ARGS),tests/cuda/test_cuda_host.py)

gpu-check:  ## build for this machine's GPU, its tests, benchmark and sanitizers, without .venv: OUT=dir PYTHON=python3
	benchmarks/gpu_check.sh "$(OUT)" "$(PYTHON)"

bench: $(BUILD)  ## every measurement behind the README's tables; needs a quiet machine
	$(BLOCKS) --out benchmarks/results/inference.json --mode inference --batch 1 32 --rounds 8 $(ARGS)
	$(BLOCKS) --out benchmarks/results/inference-batch8.json --mode inference --dtype float32 bfloat16 --rounds 8 $(ARGS)
	$(BLOCKS) --out benchmarks/results/train.json --mode train --batch 8 32 --rounds 5 $(ARGS)
	$(BIN)/python benchmarks/tails.py --out benchmarks/results/tails.json
	$(BIN)/python benchmarks/networks.py --out benchmarks/results/networks.json
	$(BIN)/python benchmarks/allocators.py --out benchmarks/results/allocators.json
	$(BIN)/python benchmarks/stages.py --out benchmarks/results/stages.json
	$(MAKE) readme

readme: $(DEPS)  ## write the benchmark's tables and pictures from its results files
	$(BIN)/python benchmarks/report.py $(RESULTS) --readme README.md --plots benchmarks/results
	$(BIN)/python benchmarks/gpu_tables.py --readme README.md

lint: $(DEPS)  ## ruff, clang-format, mypy, and the README's tables against their results files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py $(RESULTS) --readme README.md --check
	$(BIN)/python benchmarks/gpu_tables.py --readme README.md --check

format: $(DEPS)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove what make made, the virtual environment included
	rm -rf $(VENV) build demo_out *.egg-info se_ext/*.so se_ext/_build.py

$(DEPS): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# In place and incremental; `pip install --editable` would compile everything anew at every change.
$(BUILD): $(DEPS) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@echo $(CURDIR) > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/se_ext.pth
	@touch $@
