"""Nothing is read or written in front of a tensor or behind it, or after it is freed: each tensor that an op gets,
makes or keeps lies between two pages that may not be touched."""

from __future__ import annotations

import subprocess

import programs
import pytest
from strategies import TIMES

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that puts tensors between such pages."""
    return programs.library_to_preload("guard_pages.c", tmp_path_factory.mktemp("guard"))


def run(guard: str, where: str, *words: str) -> subprocess.CompletedProcess[str]:
    return programs.run("guarded_calls.py", *words, timeout=60 + 30 * TIMES, LD_PRELOAD=guard, GUARD=where)


@pytest.mark.parametrize("where", ["begin", "end"])
def test_every_op_stays_within_its_tensors(guard: str, where: str) -> None:
    done = run(guard, where, "calls", str(TIMES))
    assert done.returncode == 0, f"at {done.stdout.split()[-1:]}, signal {-done.returncode}: {done.stderr[-2000:]}"
    assert int(done.stdout.split()[-1]) > 500


@pytest.mark.parametrize("where", ["begin", "end"])
@pytest.mark.parametrize("what", ["read", "write", "freed"])
def test_the_guards_are_there(guard: str, what: str, where: str) -> None:
    """One byte beyond a tensor ends the process."""
    done = run(guard, where, what, "1", where)
    assert done.returncode < 0
    assert done.stdout == "beyond a tensor\n"
