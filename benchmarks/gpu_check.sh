#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: builds se_ext in place for that GPU, runs the tests on it, the
# benchmark, and the sanitizers. Wants a Python with torch, pybind11, ninja, numpy and pytest, and nvcc; no network.
#
#   benchmarks/gpu_check.sh OUT [PYTHON]
#
# Logs, tables and results go to OUT, eight files at most. A stage that fails doesn't stop the ones after it; the exit
# status is 0 where all passed. GPU_CHECK_S: the seconds that all stages share, 525 by default.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

readonly python=${2:-python3} work=build/gpu-check
readonly started=$SECONDS total=${GPU_CHECK_S:-525}
mkdir -p "${1:?usage: gpu_check.sh OUT [PYTHON]}" || exit 1
out=$(cd "$1" && pwd)
rm -rf "$work" && mkdir -p "$work/tests" || exit 1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

# The files of tests that a GPU has something to say to: all, anywhere under tests/, but those whose pytestmark, on one
# line, says that they are of the CPU or of the kernels on the host. The largest first: without pytest-xdist each is a
# process of its own.
test_files() {
  find tests -name 'test_*.py' -printf '%s %p\n' | sort -rn | cut -d ' ' -f 2- |
    xargs grep -LE '^pytestmark = .*(mark\.cpu_only|not [a-z_.]*emulated_cuda)'
}

left() { echo $((total - (SECONDS - started))); }

# stage NAME SECONDS COMMAND…: runs the command with its output in NAME.log, and writes down how it went.
stage() {
  local name=$1 limit=$2 begun=$SECONDS status verdict
  shift 2
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    verdict="NOT RUN: no time left"
    status=1
  else
    timeout --kill-after=10 "$limit" "$@" >> "$work/$name.log" 2>&1
    status=$?
    case $status in
      0) verdict=passed ;;
      124 | 137) verdict="FAILED: longer than $limit s" ;;
      *) verdict="FAILED: status $status" ;;
    esac
  fi
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - begun)) "$verdict" | tee -a "$work/summary.txt"
  [ "$status" -eq 0 ] || failed+=("$name")
  return "$status"
}

deliver() {
  local name
  cat "$work"/{memcheck,racecheck,initcheck}.log > "$work/sanitizer.log" 2> /dev/null
  cat "$work"/tests/*.log >> "$work/tests.log" 2> /dev/null
  for name in summary.txt build.log tests.log sanitizer.log benchmark.log gpu.md gpu.json gpu.png; do
    [ -s "$work/$name" ] && tail -c 8000000 "$work/$name" > "$out/$name"
  done
  for name in "${failed[@]}"; do
    printf '\n---- the end of %s ----\n' "$name"
    tail -n 25 "$work/$name.log" 2> /dev/null | cut -c -300
  done
  return "${#failed[@]}"
}

on_device='
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", file=sys.stderr)
open(sys.argv[1], "w").write(f"{major}.{minor}")
'
if ! stage device 60 "$python" -c "$on_device" "$work/architecture"; then
  deliver
  exit 1
fi
cat "$work/device.log" >> "$work/summary.txt"

TORCH_CUDA_ARCH_LIST=$(cat "$work/architecture") FORCE_CUDA=1 MAX_JOBS=$(nproc) \
  stage build 270 "$python" setup.py --quiet build_ext --inplace

# One run of pytest on eight workers, or eight runs of a file each at a time.
run_tests() {
  export SE_EXT_REQUIRE_CUDA=1 SE_EXT_SLOW=1 OMP_NUM_THREADS=2
  local options=(-q --device cuda --tb=short -p no:cacheprovider)
  if "$python" -c "import xdist" 2> /dev/null; then
    # shellcheck disable=SC2046
    "$python" -m pytest "${options[@]}" -n 8 $(test_files)
  else
    test_files | xargs -P 8 -I{} sh -c \
      'name=$(basename {} .py) log="'"$work"'/tests/$(basename {} .py).log"
       "$0" -m pytest "$@" {} > "$log" 2>&1; status=$?
       echo "$name: status $status: $(grep -E "passed|failed|error|skipped" "$log" | tail -n 1)"
       exit $status' "$python" "${options[@]}"
  fi
}
tests_in_a_shell="$(declare -p python work); $(declare -f test_files run_tests); run_tests"
stage tests 150 bash -c "$tests_in_a_shell"

budget=$(($(left) - 100))
[ "$budget" -gt 220 ] && budget=220
stage benchmark $((budget + 30)) sh -c \
  '"$0" -m benchmarks run gpu --device cuda cpu --budget-s "$1" --out "$2/gpu.json" > "$2/gpu.md"' \
  "$python" "$budget" "$work"
if [ -s "$work/gpu.json" ] && "$python" -c "import matplotlib" 2> /dev/null; then
  "$python" -m benchmarks report "$work/gpu.json" --plots "$work" >> "$work/benchmark.log" 2>&1
fi

sanitizer=$(command -v compute-sanitizer)
for folder in "${CUDA_HOME:-/usr/local/cuda}" "$(dirname "$(command -v nvcc)")/.."; do
  [ -z "$sanitizer" ] && [ -x "$folder/bin/compute-sanitizer" ] && sanitizer=$folder/bin/compute-sanitizer
done
# Without torch's caching, each tensor is an allocation of its own, whose bounds and contents the tools know.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=4
for tool in memcheck initcheck racecheck; do
  stage $tool 45 "${sanitizer:-compute-sanitizer}" --tool $tool --error-exitcode 1 --print-limit 20 \
    "$python" tests/cuda_sanitizer_case.py
done

deliver
