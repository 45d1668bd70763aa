"""A run of the benchmark: the command, the turns that variants take, what a results file says, and what is imported."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import HEADER

import benchmarks
from benchmarks import __main__ as command
from benchmarks.experiments import ALL, BY_NAME, CHOICES, QUICK
from benchmarks.measure import allocator, results_file, session
from benchmarks.measure.case import Case, Work, WrongResult
from benchmarks.measure.timing import LEAD_IN_CALLS, Plan, interleave

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

PACKAGE = Path(benchmarks.__file__).parent


# ---- the command ----


def test_every_experiment_is_listed_and_has_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    listed = capsys.readouterr().out
    for experiment in ALL:
        assert f"{experiment.name} " in listed
        assert experiment.question in listed
        where = {"device": ("cpu",)} if "device" in experiment.axes else {}
        assert experiment.work("", {**experiment.axes, **where}, quick=True).cases
        assert set(experiment.axes) - set(CHOICES) <= {"batch"}
        assert all(set(values) <= set(CHOICES[axis]) for axis, values in experiment.axes.items() if axis in CHOICES)


def test_the_results_of_an_experiment_are_of_its_kind() -> None:
    """And each file in the folder is some experiment's."""
    for path in (PACKAGE / "results").glob("*.json"):
        experiment = BY_NAME[path.stem]
        assert experiment.results == path
        assert results_file.load(path)["kind"] == experiment.kind


@pytest.mark.parametrize("name", [e.name for e in ALL])
def test_an_unknown_workload(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(allocator, "take_page_faults_out", lambda: None)
    device = ["--device", "cpu"] if "device" in BY_NAME[name].axes else []
    assert command.main(["run", name, "--workload", "no such block", *device]) == 1
    assert "no workload and no network has this in its name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "gpu"])
def test_cuda_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(allocator, "take_page_faults_out", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["run", name, "--device", "cuda"]) == 1
    assert "this torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ([], "whole"),
        (["--rounds", "3"], "whole"),
        (["--quick"], None),
        (["--layout", "nchw"], None),
        (["--quick", "--out", "mine.json"], "mine.json"),
    ],
)
def test_only_a_whole_run_replaces_the_results(
    options: list[str], written: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def run(experiment: Any, *arguments: Any) -> dict[str, Any]:
        seen["out"], seen["rounds"] = arguments[-1], arguments[2].rounds
        return {**HEADER, "failed": [], "rows": []}

    monkeypatch.setattr(allocator, "take_page_faults_out", lambda: None)
    monkeypatch.setattr(session, "run", run)
    assert command.main(["run", "tails", *options]) == 0
    assert seen["out"] == {"whole": BY_NAME["tails"].results, None: None}.get(written, Path(str(written)))
    assert seen["rounds"] == (3 if "--rounds" in options else 2 if "--quick" in options else 8)


def test_all_are_run_each_in_a_process_of_its_own_but_the_gpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda line, check: lines.append(line))
    assert command.main(["run", "all"]) == 0
    assert lines == [[sys.executable, "-m", "benchmarks", "run", e.name] for e in ALL if e.name != "gpu"]


def test_measuring_imports_no_report() -> None:
    """Only the command does, when all is measured; and none but the pictures needs matplotlib."""
    for path in PACKAGE.rglob("*.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        if path.parent.name in ("cases", "measure"):
            assert not any(name.startswith(("benchmarks.report", "matplotlib", "tqdm")) for name in imported), path
        if path.name != "plots.py":
            assert not any(name.startswith("matplotlib") for name in imported), path


# ---- the session ----


def test_variants_take_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    samples = interleave(steps, Plan(rounds=3, block_ms=0.0, warmup_ms=0.0))
    turn = [name for name in "ABCBCACAB" for _ in range(LEAD_IN_CALLS + 1)]
    assert calls[-len(turn) :] == turn
    assert [found.calls_per_block for found in samples.values()] == [1, 1, 1]


class Made(Case):
    """Measures nothing; `error` is raised instead."""

    def __init__(self, name: str, error: Exception | None = None, instead: Case | None = None) -> None:
        self.name, self.error, self.instead = name, error, instead

    def __str__(self) -> str:
        return self.name

    def measure(self, plan: Plan) -> dict[str, Any]:
        if self.error:
            raise self.error
        return {"row": self.name}

    def fallback(self) -> Case | None:
        return self.instead


def run_of(monkeypatch: pytest.MonkeyPatch, experiment: str, *cases: Case, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(type(BY_NAME[experiment]), "work", lambda *_, **__: Work(cases))
    return session.run(BY_NAME[experiment], quick=True, plan=QUICK, **options)


def test_a_wrong_result_ends_a_run_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    with pytest.raises(WrongResult, match="off by"):
        run_of(monkeypatch, "tails", Made("one"), Made("two", WrongResult("off by 1")), out=out)
    assert not out.exists()
    run_of(monkeypatch, "tails", Made("one"), out=out)
    assert results_file.load(out)["rows"] == [{"row": "one"}]


def test_where_an_experiment_keeps_going_a_failure_is_told_and_the_next_row_follows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = RuntimeError("no compiler\nhere")
    cases = [Made("a", compiler, Made("a without")), Made("b", WrongResult("off")), Made("c")]
    results = run_of(monkeypatch, "gpu", *cases, axes={"device": ("cpu",)})
    assert results["rows"] == [{"row": "a without"}, {"row": "c"}]
    assert results["failed"] == ["a: RuntimeError: no compiler", "b: off"]


def test_what_the_budget_does_not_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_of(monkeypatch, "tails", Made("a"), Made("b"), budget_s=-1)
    assert results["rows"] == []
    assert results["not_reached"] == {"Made": 2}


def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.json"
    arguments = ["--quick", "--workload", "512x7x7", "--batch", "2", "--mode", "inference", "train"]
    arguments += ["--variants", "eager_conv", "eager_linear", "--out", str(out)]
    watched = "import sys, benchmarks.__main__ as m; status = m.main(sys.argv[1:]); print('matplotlib' in sys.modules)"
    line = [sys.executable, "-c", watched, "run", "inference", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True, cwd=PACKAGE.parent)
    assert "page faults taken out" in done.stderr
    assert "4/4" in done.stderr
    assert "| inference | float32 | 2 | both | 2 |" in done.stdout
    assert done.stdout.endswith("False\n")

    results = json.loads(out.read_text())
    assert results["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert results["environment"]["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
    assert results["notes"][0].startswith("page faults taken out")
    assert results["machine"]["cpu"]
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["threads"] >= 1
    assert results["machine"]["isa"] in ("baseline", "avx2", "avx512")
    assert results["software"]["torch"] == torch.__version__
    assert {"caches", "load_average"} <= results["machine"].keys()
    assert {"python", "compiler"} <= results["software"].keys()
    assert results["git"].keys() == {"commit", "dirty"}
    assert results["date"]
    assert results["settings"]["quick"]

    assert [(row["layout"], row["mode"]) for row in results["rows"]] == [
        (layout, mode) for layout in ("nchw", "nhwc") for mode in ("inference", "train")
    ]
    for row in results["rows"]:
        assert row["workload"]["uses"] == [{"model": "seresnet18", "module": "SEModule", "count": 2}]
        assert row["bytes_x"] == 2 * 512 * 49 * 4
        assert row["floor_bytes"] == row["bytes_x"] * (2 if row["mode"] == "inference" else 5)
        assert row["working_set_bytes"] > 2 * row["bytes_x"]
        assert list(row["variants"]) == ["clone", "eager_conv", "eager_linear", "se_ext"]
        for variant in row["variants"].values():
            numbers = [*variant["samples_us"], *variant["time_us"].values(), variant["clone_equivalents"]]
            assert all(math.isfinite(n) and n > 0 for n in [*numbers, variant["gb_per_s"]])
            assert len(variant["samples_us"]) == QUICK.rounds
            assert variant["calls_per_block"] >= 1
        medians = {name: row["speedup"][name]["median"] for name in ("eager_conv", "eager_linear", "better")}
        assert medians["better"] == min(medians.values()) > 0


def test_a_failed_save_keeps_the_old_results(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results = {**HEADER, "rows": [{"a": 1}]}
    results_file.save(results, path)
    assert results_file.load(path) == results
    with pytest.raises(TypeError):
        results_file.save({"rows": [object()]}, path)
    assert results_file.load(path) == results
    assert list(tmp_path.iterdir()) == [path]
