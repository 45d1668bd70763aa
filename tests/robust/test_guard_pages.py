"""Nothing is read or written in front of a tensor or behind it, or after it is freed: each tensor that an op gets,
makes or keeps lies between two pages that may not be touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TESTS
from strategies import TIMES

pytestmark = pytest.mark.cpu_only
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that puts tensors between such pages."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    source = HERE / "guard_pages.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library


def run(guard: Path, where: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, TESTS, HERE)))
    return subprocess.run(
        [sys.executable, HERE / "guarded_calls.py", *arguments],
        env=os.environ | {"LD_PRELOAD": str(guard), "GUARD": where, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60 + 30 * TIMES,
        check=False,
    )


@pytest.mark.parametrize("where", ["begin", "end"])
def test_every_op_stays_within_its_tensors(guard: Path, where: str) -> None:
    done = run(guard, where, "calls", str(TIMES))
    assert done.returncode == 0, f"at {done.stdout.split()[-1:]}, signal {-done.returncode}: {done.stderr[-2000:]}"
    assert int(done.stdout.split()[-1]) > 500


@pytest.mark.parametrize("where", ["begin", "end"])
@pytest.mark.parametrize("what", ["read", "write", "freed"])
def test_the_guards_are_there(guard: Path, what: str, where: str) -> None:
    """One byte beyond a tensor ends the process."""
    done = run(guard, where, what, "1", where)
    assert done.returncode < 0
    assert done.stdout == "beyond a tensor\n"
