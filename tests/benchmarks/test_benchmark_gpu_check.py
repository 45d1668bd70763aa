"""make gpu-check, with programs that only say what they are called for."""

from __future__ import annotations

import ast
import os
import re
import subprocess
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
  -m\\ benchmarks*) echo "| tables |"; echo "{}" > "${@: -1}"; echo "progress" >&2;;
  *) echo "case $PYTORCH_NO_CUDA_MEMORY_CACHING";;
esac
"""
# Files of tests. Those that are of the CPU, or of the kernels on the host, as a whole are left out.
TESTS = {
    "test_values.py": "import pytest\n",
    "promises/test_func.py": "@pytest.mark.cpu_only\ndef test_one(): ...\n",
    "deep/down/test_isa.py": "pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]\n",
    "test_host.py": "pytestmark = pytest.mark.skipif(not emulated_cuda(), reason='no')\n",
    "test_not_emulated.py": "pytestmark = pytest.mark.skipif(emulated_cuda(), reason='no')\n",
    "helpers.py": "",
}
FAKE_SANITIZER = '#!/usr/bin/env bash\necho "checks $2"; shift 6; "$@"\n'


def gpu_check(tmp_path: Path, **environment: str) -> tuple[int, Path, str]:
    """benchmarks/gpu_check.sh in an empty tree, with programs that only say what they are called for."""
    tree, out, tools = tmp_path / "tree", tmp_path / "out", tmp_path / "tools"
    (tree / "benchmarks").mkdir(parents=True)
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
    verdicts = dict(line.split(maxsplit=1) for line in (out / "summary.txt").read_text().splitlines() if " s " in line)
    assert list(verdicts) == ["device", "build", "tests", "benchmark", "memcheck", "initcheck", "racecheck"]
    failed = [name for name, verdict in verdicts.items() if "FAILED" in verdict]
    assert failed == ["build", "tests"]
    assert "---- the end of build ----\nbuild 9.0 1" in shown
    tests = (out / "tests.log").read_text()
    assert "test_values: status 0: 7 passed" in tests
    assert "test_func: status 1" in tests
    run = {line.split(":")[0] for line in tests.splitlines() if ": status " in line}
    assert run == {"test_values", "test_func", "test_not_emulated"}
    assert "pytest 1 -m pytest -q --device cuda" in tests
    assert (out / "gpu.md").read_text() == "| tables |\n"
    sanitizer = (out / "sanitizer.log").read_text()
    assert sanitizer == "checks memcheck\ncase 1\nchecks racecheck\ncase 1\nchecks initcheck\ncase 1\n"
    assert len(list(out.iterdir())) <= 8


def test_gpu_check_without_a_gpu_builds_nothing(tmp_path: Path) -> None:
    status, out, _ = gpu_check(tmp_path, NO_GPU="1")
    assert status != 0
    assert [path.name for path in out.iterdir()] == ["summary.txt"]
    assert (out / "summary.txt").read_text().startswith("device ")


def test_gpu_check_s_stages_share_its_time(tmp_path: Path) -> None:
    status, out, _ = gpu_check(tmp_path, GPU_CHECK_S="4")
    assert status != 0
    assert (out / "summary.txt").read_text().startswith("device        0 s  NOT RUN: no time left")


def test_gpu_check_runs_every_test_file_that_a_gpu_has_something_to_say_to() -> None:
    """All but those marked as a whole: cpu_only, and of the kernels on the host."""
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    function = script[script.index("test_files() {") : script.index("left() {")]
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
