"""The time of an import in the benchmark: of the package alone, in a fresh process, torch before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases import imports
from benchmarks.measure.timing import OtherLoad, Plan
from benchmarks.report.imports import import_lines

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]


def test_the_import_of_the_package_is_timed_where_torch_was_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "slow.py").write_text("import sys, time\nassert 'torch' in sys.modules\ntime.sleep(0.1)\n")
    assert imports.import_us("slow") > 100e3


def test_the_first_import_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [90e3, 12e3, 14e3, 10e3]
    monkeypatch.setattr(imports, "import_us", lambda package: times.pop(0))
    row = imports.ImportCase("se_ext").measure(Plan(rounds=3))
    assert row["variants"]["import"]["samples_us"] == [12e3, 14e3, 10e3]
    assert import_lines([row]).endswith("\n\n- `se_ext`: 12.0 (10.4 to 13.6) ms")


def test_programs_that_the_benchmark_started_are_no_other_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time is taken off that of all programs, which stands still here."""
    monkeypatch.setattr(Path, "read_text", lambda self: "cpu 1 0 0 0 0 0 0 0 0 0\n")
    before = OtherLoad._now()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    after = OtherLoad._now()
    assert before is not None
    assert after is not None
    assert after[1] - before[1] < -0.2
