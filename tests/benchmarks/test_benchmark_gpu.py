"""The GPU's benchmark, as far as a CPU can tell: what it times and in what order, its arithmetic, nothing called met
that was not measured."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import HEADER

from benchmarks import __main__ as command
from benchmarks.cases import gpu
from benchmarks.cases.gpu import (
    BN,
    COPIES,
    QUICK,
    SE,
    SHORTCUT,
    GpuCase,
    Sizes,
    cases,
    check_ours,
    problem_of,
    ring_size,
    shortcut_of,
)
from benchmarks.cases.problem import LAYOUTS
from benchmarks.cases.workloads import Use, Workload, read_workloads
from benchmarks.measure.case import WrongResult
from benchmarks.measure.timing import Plan, Samples
from benchmarks.report import pages, plots
from benchmarks.report.gpu import NO_GPU, gpu_target_table, paths_table
from benchmarks.report.targets import GPU, ON_CHIP_BYTES
from benchmarks.summary import LARGE, WALL, WORKLOADS

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")
WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Sigmoid", (Use("net", "SEModule", 1),))
ONE_CALL = Plan(rounds=2, block_ms=0.0, warmup_ms=0.0, lead_in_calls=0)


def case(tail: str = SE, mode: str = "inference", **other: Any) -> GpuCase:
    given = {"group": LARGE, "layout": "nchw", "dtype": "float32", "batch": 16, "warm": False, "compiled": False}
    return GpuCase(**{"tail": tail, "mode": mode, "workload": WORKLOAD, **given, **other})


# ---- what is measured ----


def test_every_target_has_its_rows_and_the_first_come_first() -> None:
    found = cases("", ["nchw", "nhwc"], Sizes(), compiled=True)
    assert found[0].is_plain()
    assert len(set(found)) == len(found)
    kinds = [(c.group, c.tail, c.mode) for c in found]
    for kind in ((LARGE, SE, "inference"), (LARGE, SHORTCUT, "inference"), (LARGE, SE, "train"), (LARGE, BN, "train")):
        assert kinds.count(kind) == 16  # four shapes, two layouts, two dtypes
        assert any(c.compiled for c, k in zip(found, kinds, strict=True) if k == kind), kind
    everything = {w.name for w in read_workloads()[0]}
    for dtype in ("float32", "bfloat16"):
        assert {c.workload.name for c in found if c.group == WALL and c.dtype == dtype} == everything
        for batch in (8, 32, 64):
            rows = [c for c in found if c.warm and (c.group, c.batch, c.dtype) == (WORKLOADS, batch, dtype)]
            assert {c.workload.name for c in rows if c.mode == "inference"} == everything
    first, rest = gpu.split(found)
    assert first + rest == found
    assert {c.tail for c in first} == {SE, SHORTCUT, BN}
    assert {c.tail for c in rest} == {SE}


def test_large_maps_have_256_to_512_mb() -> None:
    for c in cases("", ["nchw"], Sizes(), compiled=True):
        if c.group == LARGE:
            size = c.batch * c.workload.channels * c.workload.points * getattr(torch, c.dtype).itemsize
            assert 256e6 <= size <= 512e6, c
            assert c.batch % 8 == 0


def test_few_rows_wait_for_the_compiler() -> None:
    assert not any(c.compiled for c in cases("", ["nchw", "nhwc"], Sizes(), compiled=False))
    found = [c for c in cases("", ["nchw", "nhwc"], Sizes(), compiled=True) if c.compiled]
    assert 20 <= len(found) <= 50
    assert all(c.workload.name in gpu.COMPILED for c in found)
    assert found[0].variants == ("eager_conv", "eager_linear", "compile_linear", "se_ext")


def test_calls_in_turn_leave_the_cache_behind() -> None:
    small, sizes = case(batch=8), Sizes()
    problem = problem_of(small, CPU)
    assert ring_size(small, problem, sizes) == 256
    assert ring_size(dataclasses.replace(small, warm=True), problem, sizes) == gpu.WARM_CALLS
    middle = dataclasses.replace(problem, x=torch.empty(10 * 2**20 // 4))
    assert ring_size(small, middle, sizes) == 8  # x and y: 20 of 160 MB
    assert ring_size(case(SHORTCUT), middle, sizes) == 6
    assert ring_size(case(mode="train"), middle, sizes) == 4
    assert ring_size(case(), dataclasses.replace(problem, x=torch.empty(2**28, device="meta")), sizes) == 2


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_batch_repeats_eight_samples(layout: str) -> None:
    problem = problem_of(case(batch=24, layout=layout), CPU)
    first = problem_of(case(batch=8, layout=layout), CPU)
    assert problem.x.shape == (24, 24, 5, 6)
    assert problem.x.is_contiguous(memory_format=LAYOUTS[layout])
    for part in problem.x.split(8):
        assert torch.equal(part, first.x)
    assert problem_of(case(batch=1), CPU).x.shape[0] == 1
    assert shortcut_of(problem).stride() == problem.x.stride()
    with pytest.raises(ValueError, match="a multiple of it, got 12"):
        problem_of(case(batch=12), CPU)


# ---- nothing wrong is timed ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("tail", "mode"), [(SE, "inference"), (SE, "train"), (SHORTCUT, "inference"), (SHORTCUT, "train"), (BN, "train")]
)
def test_ours_is_the_formula(tail: str, mode: str, layout: str, dtype: str) -> None:
    given = case(tail, mode, layout=layout, dtype=dtype)
    problem = problem_of(given, CPU)
    check_ours(given, problem, shortcut_of(problem))


@pytest.mark.parametrize(("tail", "mode"), [(SE, "inference"), (SE, "train"), (SHORTCUT, "inference"), (BN, "train")])
def test_a_wrong_result_is_never_timed(tail: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, build = case(tail, mode), gpu.module_of

    def wrong(name: str, case: GpuCase, problem: Any) -> torch.nn.Module:
        module = build(name, case, problem)
        if name == "se_ext":
            with torch.no_grad():
                next(p for key, p in module.named_parameters() if "fc2.bias" in key).add_(1)
        return module

    monkeypatch.setattr(gpu, "module_of", wrong)
    with pytest.raises(WrongResult, match="output is off by"):
        gpu.measure_row(given, CPU, QUICK, ONE_CALL)


# ---- one row ----


def test_a_row_is_of_one_call_and_of_the_better_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(warm=True)
    times = {"clone": 300.0, "copy_": 200.0, "eager_conv": 900.0, "eager_linear": 800.0, "se_ext": 400.0}

    def timed(steps: dict[str, Any], *_: Any) -> dict[str, Samples]:
        assert list(steps) == [*COPIES, *given.variants]
        return {name: Samples(3, [times[name]] * 2, 0.0) for name in steps}

    monkeypatch.setattr(gpu, "interleave", timed)
    monkeypatch.setattr(gpu, "WARM_CALLS", 10)
    row = gpu.measure_row(given, CPU, QUICK, ONE_CALL)
    assert row["copied_by"] == "copy_"
    assert row["calls_per_step"] == 10
    assert {name: found["time_us"]["median"] for name, found in row["variants"].items()} == pytest.approx(
        {"clone": 20.0, "eager_conv": 90.0, "eager_linear": 80.0, "se_ext": 40.0}
    )
    assert row["variants"]["se_ext"]["clone_equivalents"] == pytest.approx(2.0)
    assert row["speedup"]["best_eager"]["median"] == pytest.approx(2.0)
    assert row["bytes_slab"] == 24 * 30 * 4
    assert row["in_l2"] is False  # a CPU has none of a GPU


def test_a_step_makes_every_call_of_the_ring_once() -> None:
    made: list[int] = []
    ring = [lambda i=i: made.append(i) or i for i in range(5)]
    assert gpu.as_one_step(ring, True, CPU)() == [0, 1, 2, 3, 4]
    assert gpu.as_one_step(ring, False, CPU)() == []
    assert made == [0, 1, 2, 3, 4] * 2


# ---- every path ----


class Paths:
    """In the place of se_ext._C: a GPU that has no room for a cluster and, left alone, takes the chunked path."""

    forced = "auto"

    def set_cuda_path(self, path: str) -> None:
        self.forced = path

    def last_cuda_path(self) -> str:
        return {"auto": "chunked", "cluster": "whole"}.get(self.forced, self.forced)


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_every_path_that_can_be_taken_is_timed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, times = Paths(), {"auto": 30.0, "chunked": 40.0, "whole": 20.0}

    def timed(steps: dict[str, Any], *_: Any) -> dict[str, Samples]:
        assert list(steps) == list(times)
        for step in steps.values():
            step()
        return {name: Samples(3, [times[name]] * 2, 0.0) for name in steps}

    monkeypatch.setattr(gpu, "_C", paths)
    monkeypatch.setattr(gpu, "interleave", timed)
    monkeypatch.setattr(gpu, "ring_size", lambda *_: 10)
    row = gpu.PathsCase(case(device="cpu", mode=mode)).measure(ONE_CALL)
    assert paths.forced == "auto"
    assert (row["mode"], row["chosen"]) == (mode, "chunked")
    assert row["time_us"]["cluster"] is None
    assert {path: time["median"] for path, time in row["time_us"].items() if time} == {
        "auto": 3.0,
        "chunked": 4.0,
        "whole": 2.0,
    }
    shown = paths_table([row, {**row, "chosen": "whole"}])
    assert shown is not None
    lines = [line.replace(" ", "") for line in shown.splitlines()[-2:]]
    assert lines[0].endswith("|chunked|3.0|–|4.0|2.0|**no**|")
    assert lines[1].endswith("|whole|3.0|–|4.0|2.0|yes|")
    assert paths_table([]) is None


def test_a_path_with_another_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths()
    make_step = gpu.tails.make_step

    def wrong_when_whole(*arguments: Any) -> Any:
        step = make_step(*arguments)

        def run() -> dict[str, Any]:
            found = step()
            last = list(found)[-1]
            return {**found, last: found[last] + (paths.forced == "whole")}

        return run

    monkeypatch.setattr(gpu, "_C", paths)
    monkeypatch.setattr(gpu.tails, "make_step", wrong_when_whole)
    for mode, wrong in (("inference", "output"), ("train", "grad .*")):
        with pytest.raises(WrongResult, match=f"the path whole gives another {wrong} than chunked"):
            gpu.measure_paths(case(device="cpu", mode=mode), CPU, ONE_CALL)
    assert paths.forced == "auto"


# ---- the run ----


def options(tmp_path: Path, *more: str) -> list[str]:
    """Of a run on a CPU, with the rows of the CPU beside it, without torch.compile."""
    quick = ["run", "gpu", "--quick", "--device", "cpu", "--variants", "eager_conv", "eager_linear"]
    return [*quick, "--workload", "2048x7x7", "--layout", "nchw", "--out", str(tmp_path / "gpu.json"), *more]


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options(tmp_path, "--budget-s", "-1")) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["rows"] == []
    assert results["not_reached"]["large, se, inference, float32"] == 1
    assert results["not_reached"]["the CPU"] == 1
    text = capsys.readouterr().out
    assert "- not reached within the budget of time: 1 rows of wall, se, inference, float32" in text
    assert text.count(NO_GPU) == len(GPU)


def test_where_torch_compile_fails_the_row_is_measured_without_it() -> None:
    given = case(compiled=True)
    assert given.fallback() == case()
    assert case().fallback() is None


def test_a_run_with_a_row_that_fails_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu, "measure_row", fail)
    assert command.main(options(tmp_path)) == 1
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 1  # the CPU's


def test_paths_and_memory_come_first_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gpu_facts", lambda where: {"cuda": "13.0"})
    work = gpu.work("", layout=("nchw", "nhwc"), device=("cuda", "cpu"), variants=(), quick=False)
    kinds = [found.kind for found in work.cases]
    assert kinds[:24] == ["paths"] * 24  # inference and training; three shapes, two dtypes, two layouts
    assert kinds[24:40] == ["memory"] * 16
    assert kinds.count("paths") == 24
    assert kinds.count("memory") == 16
    assert kinds.count("the CPU") == 2 * len(read_workloads()[0])
    assert all(found.device == "cuda" for found in work.cases if isinstance(found, GpuCase))
    assert work.facts == {"gpu": {"cuda": "13.0"}, "memory": [], "paths": []}


def test_run_writes_what_it_promises(tmp_path: Path) -> None:
    """With torch and the standard library alone: what a machine with a GPU has while it measures."""
    blocked = "".join(f"sys.modules['{name}'] = None;" for name in ("matplotlib", "timm", "tqdm"))
    program = f"import sys;{blocked}import benchmarks.__main__ as m;sys.exit(m.main(sys.argv[1:]))"
    line = [sys.executable, "-c", program, *options(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=True, env=environment, cwd=ROOT)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert (results["kind"], results["failed"], results["memory"], results["gpu"]) == ("gpu", [], [], None)
    assert {(row["group"], row["tail"], row["mode"]) for row in results["rows"]} == {
        (LARGE, SE, "inference"),
        (LARGE, SHORTCUT, "inference"),
        (LARGE, SE, "train"),
        (LARGE, BN, "train"),
        (WALL, SE, "inference"),
        (WORKLOADS, SE, "inference"),
        (WORKLOADS, SE, "train"),
    }
    assert "**a quick run, whose times mean nothing**" in done.stdout.lower()
    (picture,) = plots.write([results], tmp_path)
    assert picture == tmp_path / "gpu.png"
    assert picture.stat().st_size > 10_000


# ---- the tables ----


def row(seconds: dict[str, float], **other: Any) -> dict[str, Any]:
    """A row of a GPU with these microseconds; by default SE forward of a large map whose slab stays on chip."""
    given = case()
    problem = problem_of(given, CPU)
    samples = {name: Samples(1, [seconds.get(name, 1e6)] * 2, 0.0) for name in ("clone", "copy_")}
    samples |= {name: Samples(1, [time] * 2, 0.0) for name, time in seconds.items()}
    made = gpu.as_row(given, problem, samples, 1)
    return {**made, "device": "cuda", "bytes_slab": ON_CHIP_BYTES, **other}


def results_of(rows: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    found = {"kind": "gpu", "gpu": {"cuda": "13.0"}, "memory": [], "failed": [], "not_reached": {}, "rows": rows}
    return {**HEADER, **found, **other}


def line(results: dict[str, Any] | None, start: str) -> list[str]:
    (found,) = [line for line in gpu_target_table(results).splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in found.split("|")[2:-1]]


def test_without_a_results_file_nothing_is_measured() -> None:
    lines = gpu_target_table(None).splitlines()[4:]
    assert len(lines) == len(GPU) == 14
    assert all(line.endswith(f"| – | – | – | {NO_GPU} |") for line in lines)
    assert all("not measured |" in line for line in gpu_target_table(results_of([])).splitlines()[4:])


def test_the_targets_are_the_issue_s() -> None:
    assert [(t.required, t.aim) for t in GPU] == [
        *[(1.5, 1.05), (1.15, 1.05)],
        *[(1.35, 1.45), (1.3, 1.45)],
        *[(2.2, 2.5), (1.2, 1.3)],
        *[(2.2, 2.5), (1.2, 1.35)],
        *[(2, 4), (1.3, 2)],
        *[(4, 8), (2, 4)],
        *[(0.001, 0.001)] * 2,
    ]


def test_copies_of_x_are_judged_by_the_worst_row_on_each_side_of_what_a_chip_holds() -> None:
    off_chip = {"bytes_slab": ON_CHIP_BYTES + 1}
    rows = [
        row({"clone": 100, "se_ext": 104, "eager_conv": 160}),
        row({"clone": 100, "se_ext": 120, "eager_conv": 160}, layout="nhwc"),
        row({"clone": 100, "se_ext": 140, "eager_conv": 160}, **off_chip),
        row({"clone": 100, "se_ext": 900, "eager_conv": 160}, tail=SHORTCUT, **off_chip),
        row({"clone": 100, "se_ext": 900, "eager_conv": 160}, device="cpu"),
    ]
    results = results_of(rows)
    beyond = line(results, "SE forward, x of 256 MB and more, slabs beyond")
    assert beyond == ["≤ 1.5", "≤ 1.05", "1.40", "1.40", "1", "✓ met"]
    within = line(results, "SE forward, x of 256 MB and more, slabs up to that")
    assert within == ["≤ 1.15", "≤ 1.05", "1.20", "1.20", "2", "✗ **missed**"]


def test_speedups_are_geometric_means_of_the_rows_that_have_the_baseline() -> None:
    rows = [
        row({"clone": 50, "se_ext": 100, "eager_conv": 400, "eager_linear": 200, "compile_linear": 144}),
        row({"clone": 50, "se_ext": 100, "eager_conv": 400, "eager_linear": 100}, layout="nhwc"),
    ]
    results = results_of(rows)
    over_eager = line(results, "SE forward, x of 256 MB and more, over best eager")
    assert over_eager == ["≥ 1.35", "≥ 1.45", "1.41", "1.00", "2", "✓ met"]
    over_compile = line(results, "SE forward, x of 256 MB and more, over torch.compile")
    assert over_compile == ["≥ 1.3", "≥ 1.45", "1.44", "1.44", "1", "✓ met"]
    assert line(results, "SE forward + backward, x of 256 MB and more, over best eager")[-1] == "not measured"


def test_only_what_fits_the_cache_counts_for_the_blocks_in_it() -> None:
    times = {"clone": 10, "se_ext": 10}
    rows = [
        row({**times, "eager_conv": 40}, group=WORKLOADS, in_l2=True),
        row({**times, "eager_conv": 10}, group=WORKLOADS, in_l2=False),
        row({**times, "eager_conv": 90}, group=WALL),
    ]
    found = line(results_of(rows), "SE forward, batches 8 to 64 of the networks' blocks, in the L2 cache, over best")
    assert found == ["≥ 2", "≥ 4", "4.00", "4.00", "1", "✓ aim reached"]
    found = line(results_of(rows), "SE forward, one sample, time at the host, over best eager")
    assert found == ["≥ 4", "≥ 8", "9.00", "9.00", "1", "✓ aim reached"]


def test_memory_beyond_the_output() -> None:
    memory = [
        {"bytes_x": 10**6, "bytes_output": 1_000_500, "bytes_in_place": 0},
        {"bytes_x": 10**6, "bytes_output": 1_000_900, "bytes_in_place": 10**6},
    ]
    results = results_of([], memory=memory)
    assert line(results, "inference: memory")[2:] == ["0.00090", "0.00090", "2", "✓ aim reached"]
    assert line(results, "inference in place")[2:] == ["1.00000", "1.00000", "2", "✗ **missed**"]


def test_a_quick_run_is_not_judged() -> None:
    results = results_of([row({"clone": 100, "se_ext": 104, "eager_conv": 160})], settings={"quick": True})
    assert all(line.endswith("| – | not measured |") for line in gpu_target_table(results).splitlines()[4:])


def test_the_report_has_every_row_and_the_cpu_beside_the_gpu() -> None:
    times = {"clone": 10, "se_ext": 20, "eager_conv": 40}
    same = {"group": WORKLOADS, "warm": True, "batch": 8}
    rows = [row(times, **same), row({**times, "se_ext": 900}, **same, device="cpu"), row(times)]
    text = pages.tables(results_of(rows, failed=["a row: no"], not_reached={"wall": 3}), "r.json")
    assert "| 24x5x6-m8-silu-sigmoid | nchw | 8 | 900.0 | 20.0 | 45.0 |" in text
    assert "- not timed: a row: no" in text
    assert "- not reached within the budget of time: 3 rows of wall" in text
    assert "**Every large map (1 rows)**" in text
    assert "**Every block (1 rows)**" in text
    two = "2.00 / 2.00 / 2.00"
    assert f"| SE | inference | float32 | 16 | memory | 1 | 0 | {two} | {two} / 2.00 | – |" in text
    assert "`r.json`: a CPU, CUDA 13.0, torch 2.13.0, commit 0123456789, 2026-01-02." in text
