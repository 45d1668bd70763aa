"""The table of the versions that were tried, and the program that tries them; not the trying, which takes minutes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import versions
from helpers import ROOT

pytestmark = pytest.mark.cpu_only


def row(torch: str, python: str, passed: int = 1) -> dict[str, Any]:
    counts = {"tests": "tests/kernels tests/dispatch", "passed": passed, "skipped": 0, "failed": 0}
    return {"torch": torch, "Python": python, "compiler": "GCC 12.2.0", "CUDA kernels": "not built", **counts}


def recorded() -> list[dict[str, Any]]:
    return json.loads(versions.RESULTS.read_text())


def test_the_page_has_the_table_of_the_results() -> None:
    page = versions.PAGE.read_text()
    assert versions.with_table(page, recorded()) == page
    assert page.count("| not built |") + page.count("| built |") == len(recorded())


def test_the_oldest_version_was_tried() -> None:
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert any(row["torch"].startswith(f"{oldest[1]}.0") and row["passed"] > 0 for row in recorded())


def test_what_failed_is_said() -> None:
    page = versions.PAGE.read_text()
    for row in recorded():
        assert not row["failed"] or f"- **torch {row['torch'].split('+')[0]}**: " in page


def test_a_result_takes_the_place_of_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    for new in (row("2.10.0", "3.11.7"), row("2.9.1", "3.11.7"), row("2.10.0", "3.9.1"), row("2.10.0", "3.11.7", 5)):
        versions.record(new)
    assert recorded() == [row("2.9.1", "3.11.7"), row("2.10.0", "3.9.1"), row("2.10.0", "3.11.7", 5)]
    assert "| 2.9.1 | 3.11.7 | GCC 12.2.0 | not built | `tests/kernels`, `tests/dispatch` | 1 | 0 | 0 |" in (
        versions.table(recorded())
    )


def test_compiled_kernels_are_taken_only_where_they_are_new(tmp_path: Path) -> None:
    made = tmp_path / "build" / "csrc/cpu/kernels/baseline.o"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"code")
    versions.take_kernels(tmp_path / "build", tmp_path / "source")
    [taken] = (tmp_path / "source").rglob("baseline.o")
    assert taken.read_bytes() == b"code"

    os.utime(made, (0, 0))
    with pytest.raises(SystemExit, match="a kernel's source is newer"):
        versions.take_kernels(tmp_path / "build", tmp_path / "other")
    with pytest.raises(SystemExit, match=r"no csrc/cpu/kernels/\*\.o in"):
        versions.take_kernels(tmp_path / "source", tmp_path / "other")
