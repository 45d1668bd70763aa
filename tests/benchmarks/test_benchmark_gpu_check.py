"""make gpu-check, with programs that only say what they are called for."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  -c*get_device_capability*) [ "$NO_GPU" ] && exit 1; printf 9.0 > "${@: -1}"; echo "a GPU" >&2;;
  -c*) exit 1;;
  setup.py*) echo "build $TORCH_CUDA_ARCH_LIST $FORCE_CUDA"; exit 1;;
  -m\\ pytest*) echo "pytest $SE_EXT_REQUIRE_CUDA $*"; case "$*" in *s/test_func.py) exit 1;; esac; echo "7 passed";;
  -m\\ benchmarks\\ report*) echo "tables of $(basename "$4")";;
  -m\\ benchmarks*) echo "{}" > "${@: -1}"
    if [ "$KILLED" ]; then cat "$(dirname "${@: -1}")/summary.txt" >&2; kill $$; fi
    echo "| tables |"; echo "progress" >&2;;
  *) echo "case $PYTORCH_NO_CUDA_MEMORY_CACHING $2 $PYTHONPATH";;
esac
"""
# Files of tests. Those that are of the CPU, or of the kernels on the host, as a whole are left out.
TESTS = {
    "test_values.py": "import pytest\n",
    "cuda/test_cuda.py": "import pytest\n",
    "promises/test_func.py": "@pytest.mark.cpu_only\ndef test_one(): ...\n",
    "deep/down/test_isa.py": "pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]\n",
    "test_host.py": "pytestmark = pytest.mark.skipif(not emulated_cuda(), reason='no')\n",
    "test_not_emulated.py": "pytestmark = pytest.mark.skipif(emulated_cuda(), reason='no')\n",
    "helpers.py": "",
}
STAGES = ["device", "build", "whole", "chunked", "cluster", "auto", "memcheck", "synccheck", "cuda"]
STAGES += ["benchmark", "tests", "ptx", "initcheck", "racecheck"]
FAKE_SANITIZER = '#!/usr/bin/env bash\necho "checks $2"; shift 6; "$@"\n'


def gpu_check(tmp_path: Path, **environment: str) -> tuple[int, Path, str]:
    """benchmarks/gpu_check.sh in an empty tree, with programs that only say what they are called for."""
    tree, out, tools = tmp_path / "tree", tmp_path / "out", tmp_path / "tools"
    (tree / "benchmarks").mkdir(parents=True)
    (tree / "se_ext").mkdir()
    (tree / "se_ext" / "__init__.py").touch()
    tools.mkdir()
    for name, text in TESTS.items():
        (tree / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "tests" / name).write_text(text)
    script = tree / "benchmarks" / "gpu_check.sh"
    script.write_text((ROOT / "benchmarks" / "gpu_check.sh").read_text())
    for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", FAKE_SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(script), str(out), str(tools / "python")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **path, **environment},
    )
    return done.returncode, out, done.stdout + done.stderr


def test_a_failing_stage_stops_none_after_it(tmp_path: Path) -> None:
    status, out, shown = gpu_check(tmp_path)
    assert status != 0
    summary = (out / "summary.txt").read_text()
    verdicts = dict(line.split(maxsplit=1) for line in summary.splitlines() if " s " in line)
    assert list(verdicts) == STAGES
    failed = [name for name, verdict in verdicts.items() if "FAILED" in verdict]
    assert failed == ["build", "tests", "ptx"]
    assert status == len(failed)
    assert "\na GPU\n" in summary
    assert "---- the end of build ----\nbuild 9.0 1" in shown
    assert "---- the end of ptx ----\nbuild 8.0+PTX 1" in shown
    tests = (out / "tests.log").read_text()
    assert "test_values: status 0: 7 passed" in tests
    assert "test_func: status 1" in tests
    run = {line.split(":")[0] for line in tests.splitlines() if ": status " in line}
    assert run == {"test_values", "test_func", "test_not_emulated"}
    assert "==== cuda\npytest 1 -m pytest -v --maxfail 30 --device cuda" in tests
    assert re.search(r"--test-limit-s 60 tests/cuda/test_cuda.py$", tests, re.MULTILINE)
    assert "pytest 1 -m pytest -q --device cuda" in tests
    assert (
        tests.index("==== whole\ncase  whole") < tests.index("==== cluster\ncase  cluster") < tests.index("==== cuda")
    )
    assert (out / "gpu.md").read_text() == "| tables |\n"
    sanitizer = (out / "sanitizer.log").read_text()
    tools = re.findall(r"^==== (\w+)\nchecks \1\ncase 1 ", sanitizer, re.MULTILINE)
    assert tools == ["memcheck", "synccheck", "initcheck", "racecheck"]
    assert len(list(out.iterdir())) <= 8


def test_what_is_known_is_written_before_gpu_check_ends(tmp_path: Path) -> None:
    """The benchmark's stage is killed: its rows were written, and their tables are made of them; what came before is
    in its files when the stage begins."""
    status, out, _ = gpu_check(tmp_path, KILLED="1")
    assert status != 0
    seen = (out / "benchmark.log").read_text()
    assert "memcheck" in seen
    assert (out / "gpu.md").read_text() == "tables of gpu.json\n"


def test_a_test_that_hangs_ends_the_process(tmp_path: Path) -> None:
    """With the place where it waits; a test within the limit is left alone."""
    file = tmp_path / "test_waits.py"
    file.write_text("import time\ndef test_short(): time.sleep(0.1)\ndef test_long(): time.sleep(50)  # here\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-v", "--test-limit-s", "1", str(file)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 1
    assert "test_short PASSED" in done.stdout
    assert "Timeout" in done.stderr
    assert 'test_waits.py", line 3 in test_long' in done.stderr


def test_gpu_check_without_a_gpu_builds_nothing(tmp_path: Path) -> None:
    status, out, _ = gpu_check(tmp_path, NO_GPU="1")
    assert status != 0
    assert sorted(path.name for path in out.iterdir()) == ["build.log", "summary.txt"]
    assert (out / "summary.txt").read_text().startswith("device ")


def test_gpu_check_s_stages_share_its_time(tmp_path: Path) -> None:
    status, out, _ = gpu_check(tmp_path, GPU_CHECK_S="4")
    assert status != 0
    assert (out / "summary.txt").read_text().startswith("device        0 s  NOT RUN: no time left")


def test_gpu_check_runs_every_test_file_that_a_gpu_has_something_to_say_to() -> None:
    """All but those marked as a whole: cpu_only, and of the kernels on the host."""
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    function = script[script.index("test_files() {") : script.index("# The rest of them")]
    done = subprocess.run(
        ["bash", "-c", f"{function}\ntest_files"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    def marks(path: Path) -> str:
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        return " ".join(ast.unparse(n.value) for n in nodes if ast.unparse(n.targets[0]) == "pytestmark")

    apart = re.compile(r"mark\.cpu_only|not [\w.]*emulated_cuda\(\)")
    files = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if not apart.search(marks(path))
    }
    assert len(files) > 10
    assert sorted(done.stdout.split()) == sorted(files)
