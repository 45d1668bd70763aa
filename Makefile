# Each target sets up what it needs in .venv and reuses it afterwards. PYTHON=… names the interpreter to start from.
PYTHON ?= python3.11
SANITIZE ?= address
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests; 0: none but pytest's own. A thread that waits sleeps: it leaves its CPU to the others.
WORKERS ?= 2
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
DEPS := $(VENV)/.dependencies
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes
BUILD := $(VENV)/.built
CPP := $(shell find csrc tests/cuda_host tests/sanitize tests/cpp examples/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py setup_compile.py setup_cuda.py pyproject.toml csrc/instruction_sets.txt $(wildcard cmake/*.in) $(filter csrc/%,$(CPP))

.PHONY: help demo insertion test test-isa emulated cpp versions pins cuda-check cuda-host sanitize gpu-check bench readme lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(BUILD)  ## train a small CNN on handwritten digits: without SE, with plain SE, with se_ext
	$(BIN)/python -m examples.digits $(ARGS)

insertion: $(BUILD)  ## train a small CNN on photographs of solar cells: plain, with inserted SE blocks, twice as deep
	$(BIN)/python -m examples.insertion $(ARGS)

test: $(BUILD)  ## the tests, but the slow ones
	SE_EXT_REQUIRE_BUILD_TREE=1 $(PYTEST) $(ARGS)

test-isa: $(BUILD)  ## the tests of the kernels again, on every narrower instruction set of this CPU
	for isa in $$($(BIN)/python -c "from se_ext import _C; print(*_C.cpu_capabilities()[:-1])"); do \
	  SE_EXT_CPU_ISA=$$isa SE_EXT_REQUIRE_ISA=$$isa $(PYTEST) tests/kernels $(ARGS) || exit 1; \
	done

emulated: $(BUILD)  ## every op on emulated older CPUs, against illegal instructions; needs qemu-x86_64 (qemu-user)
	SE_EXT_SLOW=1 SE_EXT_REQUIRE_QEMU=1 $(BIN)/python -m pytest tests/building/test_emulated.py $(ARGS)

cpp: $(BUILD)  ## C++ programs: the library built by CMake, its C++ tests, and the example; needs cmake and libjpeg
	SE_EXT_SLOW=1 SE_EXT_REQUIRE_CMAKE=1 $(BIN)/python -m pytest tests/building/test_cmake.py $(ARGS)

versions:  ## build with another torch, install elsewhere, run tests: TORCH=2.10.0 PYTHON=python3.12
	$(PYTHON) tests/building/versions.py $(TORCH) $(ARGS)

pins: $(DEPS)  ## write requirements-dev*.txt, with the hash of every file, from requirements-dev.in
	$(BIN)/python tests/building/pins.py

cuda-check: $(BUILD)  ## the CUDA build without a GPU: compiled, linked, and what nvcc made of the kernels; needs nvcc
	$(BIN)/python tests/cuda_check.py $(ARGS)

cuda-host: $(BUILD)  ## the CUDA kernels compiled for the CPU, and their tests
	$(BIN)/python tests/cuda_host/build.py --self-test
	$(BIN)/python tests/cuda_host/emulate.py --sanitize $(SANITIZE) -n $(WORKERS) --dist worksteal $(or $(ARGS),tests/cuda/test_cuda_host.py)

sanitize: $(BUILD)  ## the ops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(BIN)/python tests/sanitize/sanitize.py -n $(WORKERS) --dist worksteal $(ARGS)

gpu-check:  ## build for this machine's GPU, its tests, benchmark and sanitizers, without .venv: OUT=dir PYTHON=python3
	benchmarks/gpu_check.sh "$(OUT)" "$(PYTHON)"

bench: $(BUILD)  ## every measurement behind the generated pages; needs a quiet machine
	$(BIN)/python -m benchmarks run all
	$(MAKE) readme

readme: $(DEPS)  ## write the README's table, the generated pages of docs/ and their pictures from the results files
	$(BIN)/python -m benchmarks report

lint: $(DEPS)  ## ruff, clang-format, mypy, and the generated pages against their results files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/python -m benchmarks report --check

format: $(DEPS)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove what make made, the virtual environment included
	rm -rf $(VENV) build demo_out *.egg-info se_ext/*.so se_ext/_build.py se_ext/cmake

# Torch for CPUs where pip finds it, else the registry's and NVIDIA's libraries (tests/building/pins.py).
$(DEPS): $(wildcard requirements-dev*.txt)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) -r requirements-dev-cpu.txt || $(INSTALL) -r requirements-dev-cuda.txt
	@touch $@

# In place and incremental; `pip install --editable` would compile everything anew at every change.
$(BUILD): $(DEPS) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@echo $(CURDIR) > $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/se_ext.pth
	@touch $@
