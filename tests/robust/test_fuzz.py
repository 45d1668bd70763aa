"""Nonsense that the schemas let through, from Python and from TorchScript: every call gives the formula's result or
raises a Python exception. None ends the process, none lasts, none gives another answer."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
from strategies import IS_LONG, TIMES

pytestmark = pytest.mark.cpu_only
CALLS = 3000
LONGEST_S = 30.0  # of one call, on a busy machine


def test_nonsense_is_refused(tmp_path: Path) -> None:
    first = time.time_ns() % 2**40 if IS_LONG else 0
    progress = tmp_path / "progress"
    output = tmp_path / "output"
    with output.open("w") as to:
        running = subprocess.Popen(
            [sys.executable, programs.HERE / "fuzzed_calls.py", str(first), str(CALLS * TIMES), progress],
            env=programs.environment(),
            stdout=to,
            stderr=subprocess.STDOUT,
        )
        at, since = "", time.monotonic()
        while running.poll() is None:
            time.sleep(0.1)
            now = progress.read_text() if progress.exists() else ""
            if now != at:
                at, since = now, time.monotonic()
            if time.monotonic() - since > LONGEST_S:
                running.kill()
                running.wait()
                pytest.fail(f"call {at!r} lasts")
    said = output.read_text()
    assert running.returncode == 0, f"call {at!r} ended the process ({running.returncode}): {said[-2000:]}"
    lines = said.splitlines()
    assert len(lines) == 1, "\n".join(lines)
    assert "'right': " in lines[0]
