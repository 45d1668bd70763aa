#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: builds se_ext in place for that GPU, and runs what tells most
# about it first. Wants a Python with torch, pybind11, ninja, numpy and pytest, and nvcc; no network.
#
#   benchmarks/gpu_check.sh OUT [PYTHON]
#
# Stages, each a process of its own, because an illegal address leaves a process without its GPU:
#   device, build
#   whole, chunked, cluster, auto    every op on that path, small shapes
#   memcheck, synccheck              the same on every path under NVIDIA's compute-sanitizer
#   cuda                             tests/cuda/test_cuda.py, until 30 tests have failed
#   benchmark                        every path beside the chosen one, and se_ext beside torch
#   tests                            the rest of the tests
#   ptx                              the ops, built for 8.0+PTX: code that knows no clusters, translated for this GPU
#   initcheck, racecheck             as memcheck
#
# Logs, tables and results go to OUT while they are made: eight files at most, complete up to where a run is cut off. A
# stage that fails doesn't stop the ones after it; the exit status is 0 where all passed. GPU_CHECK_S: the seconds that
# all stages share, 525 by default.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

readonly python=${2:-python3} work=build/gpu-check
readonly started=$SECONDS total=${GPU_CHECK_S:-525}
mkdir -p "${1:?usage: gpu_check.sh OUT [PYTHON]}" || exit 1
out=$(cd "$1" && pwd)
readonly out
for name in summary.txt build.log tests.log sanitizer.log benchmark.log gpu.md gpu.json gpu.png; do
  rm -f "${out:?}/$name"
done
rm -rf "$work" && mkdir -p "$work/tests" || exit 1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

left() { echo $((total - (SECONDS - started))); }

# stage NAME SECONDS LOG COMMAND…: runs the command with its output at the end of OUT/LOG, and writes down how it went.
stage() {
  local name=$1 limit=$2 log=$out/$3 begun=$SECONDS status verdict from
  shift 3
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    verdict="NOT RUN: no time left"
    status=1
  else
    printf '==== %s\n' "$name" >> "$log"
    from=$(($(wc -l < "$log") + 1))
    timeout --kill-after=10 "$limit" "$@" >> "$log" 2>&1
    status=$?
    case $status in
      0) verdict=passed ;;
      124 | 137) verdict="FAILED: longer than $limit s" ;;
      *) verdict="FAILED: status $status" ;;
    esac
  fi
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - begun)) "$verdict" | tee -a "$out/summary.txt"
  if [ "$status" -ne 0 ]; then
    failed+=("$name")
    if [ -n "${from:-}" ]; then
      printf -- '---- the end of %s ----\n' "$name"
      tail -n "+$from" "$log" | tail -n 25 | cut -c -300
    fi
  fi
  return "$status"
}

on_device='
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", file=sys.stderr)
open(sys.argv[1], "w").write(f"{major}.{minor}")
'
stage device 60 build.log "$python" -c "$on_device" "$work/architecture" || exit 1
tail -n 1 "$out/build.log" >> "$out/summary.txt"

TORCH_CUDA_ARCH_LIST=$(cat "$work/architecture") FORCE_CUDA=1 MAX_JOBS=$(nproc) \
  stage build 270 build.log "$python" setup.py --quiet build_ext --inplace

for path in whole chunked cluster auto; do
  stage "$path" 30 tests.log "$python" tests/cuda_sanitizer_case.py $path
done

sanitizer=$(command -v compute-sanitizer)
for folder in "${CUDA_HOME:-/usr/local/cuda}" "$(dirname "$(command -v nvcc)")/.."; do
  [ -z "$sanitizer" ] && [ -x "$folder/bin/compute-sanitizer" ] && sanitizer=$folder/bin/compute-sanitizer
done
# Without torch's caching, each tensor is an allocation of its own, whose bounds and contents the tools know.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=4 \
    stage "$1" 45 sanitizer.log "${sanitizer:-compute-sanitizer}" --tool "$1" --error-exitcode 1 --print-limit 20 \
    "$python" tests/cuda_sanitizer_case.py
}
sanitize memcheck
sanitize synccheck

export SE_EXT_REQUIRE_CUDA=1 SE_EXT_SLOW=1 OMP_NUM_THREADS=2
readonly first_file=tests/cuda/test_cuda.py
stage cuda 150 tests.log "$python" -m pytest -v --maxfail 30 --device cuda --tb=short -p no:cacheprovider \
  --test-limit-s 60 $first_file

budget=$(($(left) - 60))
[ "$budget" -gt 150 ] && budget=150
# shellcheck disable=SC2016
stage benchmark $((budget + 30)) benchmark.log sh -c \
  '"$0" -m benchmarks run gpu --device cuda cpu --budget-s "$1" --out "$2/gpu.json" > "$2/gpu.md"' \
  "$python" "$budget" "$out"
if [ -s "$out/gpu.json" ]; then
  # A run that was cut off wrote no tables.
  [ -s "$out/gpu.md" ] || "$python" -m benchmarks report "$out/gpu.json" > "$out/gpu.md" 2>> "$out/benchmark.log"
  if "$python" -c "import matplotlib" 2> /dev/null; then
    "$python" -m benchmarks report "$out/gpu.json" --plots "$out" >> "$out/benchmark.log" 2>&1
  fi
fi

# The files of tests that a GPU has something to say to: all, anywhere under tests/, but those whose pytestmark, on one
# line, says that they are of the CPU or of the kernels on the host. The largest first: without pytest-xdist each is a
# process of its own.
test_files() {
  find tests -name 'test_*.py' -printf '%s %p\n' | sort -rn | cut -d ' ' -f 2- |
    xargs grep -LE '^pytestmark = .*(mark\.cpu_only|not [a-z_.]*emulated_cuda)'
}

# The rest of them: one run of pytest on eight workers, or eight runs of a file each at a time. A file's log goes to the
# log of all as soon as the file is done.
run_tests() {
  local options=(-q --device cuda --tb=short -p no:cacheprovider --test-limit-s 60)
  if "$python" -c "import xdist" 2> /dev/null; then
    # shellcheck disable=SC2046
    "$python" -m pytest "${options[@]}" -n 8 $(test_files | grep -vx "$first_file")
  else
    # shellcheck disable=SC2016
    test_files | grep -vx "$first_file" | xargs -P 8 -I{} sh -c \
      'name=$(basename {} .py) log="'"$work"'/tests/$(basename {} .py).log"
       "$0" -m pytest "$@" {} > "$log" 2>&1; status=$?
       cat "$log"
       echo "$name: status $status: $(grep -E "passed|failed|error|skipped" "$log" | tail -n 1)"
       exit $status' "$python" "${options[@]}"
  fi
}
tests_in_a_shell="$(declare -p python work first_file); $(declare -f test_files run_tests); run_tests"
stage tests 150 tests.log bash -c "$tests_in_a_shell"

# Beside the build for this GPU: the package's Python files, and a library with PTX of an architecture without clusters.
build_with_ptx() {
  mkdir -p "$work/ptx" && cp -r se_ext "$work/ptx/" && rm -f "$work"/ptx/se_ext/*.so &&
    TORCH_CUDA_ARCH_LIST=8.0+PTX FORCE_CUDA=1 MAX_JOBS=$(nproc) \
      "$python" setup.py --quiet build_ext --build-lib "$work/ptx" &&
    PYTHONPATH=$PWD/$work/ptx "$python" tests/cuda_sanitizer_case.py
}
stage ptx 120 tests.log bash -c "$(declare -p python work); $(declare -f build_with_ptx); build_with_ptx"

sanitize initcheck
sanitize racecheck
exit "${#failed[@]}"
