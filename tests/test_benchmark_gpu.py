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
from results_header import HEADER

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_harness  # noqa: E402
import gpu_tables  # noqa: E402
import results_file  # noqa: E402
import variants  # noqa: E402
from gpu_harness import COPIES, QUICK, Case, Sizes, cases, check_ours, problem_of, ring_size, shortcut_of  # noqa: E402
from gpu_tables import BN, LARGE, NO_GPU, SE, SHORTCUT, TARGETS, WALL, WORKLOADS, markdown, target_table  # noqa: E402
from problem import WrongResult  # noqa: E402
from timing import Plan, Samples  # noqa: E402
from workloads import Use, Workload, read_workloads  # noqa: E402

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Sigmoid", (Use("net", "SEModule", 1),))
ONE_CALL = Plan(rounds=2, block_ms=0.0, warmup_ms=0.0, lead_in_calls=0)


def case(tail: str = SE, mode: str = "inference", **other: Any) -> Case:
    given = {"group": LARGE, "layout": "nchw", "dtype": "float32", "batch": 16, "warm": False, "compiled": False}
    return Case(**{"tail": tail, "mode": mode, "workload": WORKLOAD, **given, **other})


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
    first, rest = gpu_harness.split(found)
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
    assert all(c.workload.name in gpu_harness.COMPILED for c in found)
    assert found[0].variants == ("eager_conv", "eager_linear", "compile_linear", "se_ext")


def test_calls_in_turn_leave_the_cache_behind() -> None:
    small, sizes = case(batch=8), Sizes()
    problem = problem_of(small, CPU)
    assert ring_size(small, problem, sizes) == 256
    assert ring_size(dataclasses.replace(small, warm=True), problem, sizes) == gpu_harness.WARM_CALLS
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
    assert problem.x.is_contiguous(memory_format=variants.LAYOUTS[layout])
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
    given, build = case(tail, mode), gpu_harness.module_of

    def wrong(name: str, case: Case, problem: Any) -> torch.nn.Module:
        module = build(name, case, problem)
        if name == "se_ext":
            with torch.no_grad():
                next(p for key, p in module.named_parameters() if "fc2.bias" in key).add_(1)
        return module

    monkeypatch.setattr(gpu_harness, "module_of", wrong)
    with pytest.raises(WrongResult, match="output is off by"):
        gpu_harness.measure_row(given, CPU, QUICK, ONE_CALL)


# ---- one row ----


def test_a_row_is_of_one_call_and_of_the_better_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(warm=True)
    times = {"clone": 300.0, "copy_": 200.0, "eager_conv": 900.0, "eager_linear": 800.0, "se_ext": 400.0}

    def timed(steps: dict[str, Any], *_: Any) -> dict[str, Samples]:
        assert list(steps) == [*COPIES, *given.variants]
        return {name: Samples(3, [times[name]] * 2, 0.0) for name in steps}

    monkeypatch.setattr(gpu_harness, "interleave", timed)
    monkeypatch.setattr(gpu_harness, "WARM_CALLS", 10)
    row = gpu_harness.measure_row(given, CPU, QUICK, ONE_CALL)
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
    assert gpu_harness.as_one_step(ring, True, CPU)() == [0, 1, 2, 3, 4]
    assert gpu_harness.as_one_step(ring, False, CPU)() == []
    assert made == [0, 1, 2, 3, 4] * 2


# ---- the run ----


def options(tmp_path: Path, *more: str) -> list[str]:
    quick = ["--device", "cpu", "--quick", "--no-compile", "--workload", "2048x7x7", "--layout", "nchw"]
    return [*quick, "--out", str(tmp_path / "gpu.json"), *more]


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(options(tmp_path, "--budget-s", "-1", "--cpu")) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["rows"] == []
    assert results["not_reached"]["large, se, inference, float32"] == 1
    assert results["not_reached"]["the CPU"] == 1
    text = capsys.readouterr().out
    assert "- not reached within the budget of time: 1 rows of wall, se, inference, float32" in text
    assert text.count(NO_GPU) == len(TARGETS)


def test_a_row_that_fails_is_told_and_the_next_one_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu.Run(gpu.parse(options(tmp_path)), {})

    def fail() -> dict[str, Any]:
        raise RuntimeError("no compiler\nhere")

    run.add("rows", "kind", "a row", fail, lambda: {"row": 1})
    run.add("rows", "kind", "another", fail)
    run.add("rows", "kind", "a third", lambda: {"row": 3})
    assert run.results["rows"] == [{"row": 1}, {"row": 3}]
    assert run.results["failed"] == ["a row: RuntimeError: no compiler", "another: RuntimeError: no compiler"]
    monkeypatch.setattr(gpu_harness, "measure_row", lambda *_: fail())
    assert gpu.main(options(tmp_path)) == 1


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "this torch finds no CUDA device" in capsys.readouterr().err


def test_unknown_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--workload", "no such block"]) == 1
    assert "no workload and no network has this in its name" in capsys.readouterr().err


def test_run_writes_what_it_promises(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *options(tmp_path, "--cpu")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=environment)
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
    assert "A quick run, whose times mean nothing." in done.stdout
    gpu_tables.plot(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


# ---- the tables ----


def row(seconds: dict[str, float], **other: Any) -> dict[str, Any]:
    """A row of a GPU with these microseconds; by default SE forward of a large map whose slab stays on chip."""
    given = case()
    problem = problem_of(given, CPU)
    samples = {name: Samples(1, [seconds.get(name, 1e6)] * 2, 0.0) for name in ("clone", "copy_")}
    samples |= {name: Samples(1, [time] * 2, 0.0) for name, time in seconds.items()}
    made = gpu_harness.as_row(given, problem, samples, 1)
    return {**made, "device": "cuda", "bytes_slab": gpu_tables.ON_CHIP_BYTES, **other}


def results_of(rows: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    found = {"gpu": {"cuda": "13.0"}, "memory": [], "failed": [], "not_reached": {}, "rows": rows}
    return {**HEADER, **found, **other}


def line(results: dict[str, Any] | None, start: str) -> list[str]:
    (found,) = [line for line in target_table(results).splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in found.split("|")[2:-1]]


def test_without_a_results_file_nothing_is_measured() -> None:
    lines = markdown(None).splitlines()[4:]
    assert len(lines) == len(TARGETS) == 14
    assert all(line.endswith(f"| – | – | – | {NO_GPU} |") for line in lines)
    assert all("not measured |" in line for line in target_table(results_of([])).splitlines()[4:])


def test_the_targets_are_the_issue_s() -> None:
    assert [(t.required, t.aim) for t in TARGETS] == [
        *[(1.5, 1.05), (1.15, 1.05)],
        *[(1.35, 1.45), (1.3, 1.45)],
        *[(2.2, 2.5), (1.2, 1.3)],
        *[(2.2, 2.5), (1.2, 1.35)],
        *[(2, 4), (1.3, 2)],
        *[(4, 8), (2, 4)],
        *[(0.001, 0.001)] * 2,
    ]


def test_copies_of_x_are_judged_by_the_worst_row_on_each_side_of_what_a_chip_holds() -> None:
    off_chip = {"bytes_slab": gpu_tables.ON_CHIP_BYTES + 1}
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
    assert all(line.endswith("| – | not measured |") for line in target_table(results).splitlines()[4:])


def test_the_report_has_every_row_and_the_cpu_beside_the_gpu() -> None:
    times = {"clone": 10, "se_ext": 20, "eager_conv": 40}
    same = {"group": WORKLOADS, "warm": True, "batch": 8}
    rows = [row(times, **same), row({**times, "se_ext": 900}, **same, device="cpu"), row(times)]
    text = markdown(results_of(rows, failed=["a row: no"], not_reached={"wall": 3}), "r.json")
    assert "| 24x5x6-m8-silu-sigmoid | nchw | 8 | 900.0 | 20.0 | 45.0 |" in text
    assert "- not timed: a row: no" in text
    assert "- not reached within the budget of time: 3 rows of wall" in text
    assert "<summary>Every large map (1 rows)</summary>" in text
    assert "<summary>Every block (1 rows)</summary>" in text
    two = "2.00 / 2.00 / 2.00"
    assert f"| SE | inference | float32 | 16 | memory | 1 | 0 | {two} | {two} / 2.00 | – |" in text
    assert "From `r.json`: a CPU, CUDA 13.0, torch 2.13.0, commit 0123456789, 2026-01-02." in text


def test_readme_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{gpu_tables.BEGIN}\nold\n{gpu_tables.END}\n\nAfter.\n")
    arguments = [str(source), "--readme", str(readme)]
    assert gpu_tables.main([*arguments, "--check"]) == 1
    assert "not what the GPU's results give" in capsys.readouterr().err
    assert gpu_tables.main(arguments) == 0
    assert gpu_tables.main([*arguments, "--check"]) == 0
    assert readme.read_text().count(NO_GPU) == len(TARGETS)
    results_file.save(results_of([row({"clone": 100, "se_ext": 104, "eager_conv": 160})]), source)
    assert gpu_tables.main([*arguments, "--check"]) == 1
    assert gpu_tables.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nAfter.\n")
    assert NO_GPU not in text
    readme.write_text("no markers")
    assert gpu_tables.main(arguments) == 1
    assert readme.read_text() == "no markers"


# ---- make gpu-check ----

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  -c*get_device_capability*) [ "$NO_GPU" ] && exit 1; printf 9.0 > "${@: -1}"; echo "a GPU" >&2;;
  -c*) exit 1;;
  setup.py*) echo "build $TORCH_CUDA_ARCH_LIST $FORCE_CUDA"; exit 1;;
  -m\\ pytest*) echo "pytest $SE_EXT_REQUIRE_CUDA $*"; case "$*" in *test_func.py) exit 1;; esac; echo "7 passed";;
  benchmarks/gpu.py*) echo "| tables |"; echo "{}" > "${@: -1}"; echo "progress" >&2;;
  *) echo "case $PYTORCH_NO_CUDA_MEMORY_CACHING";;
esac
"""
FAKE_SANITIZER = '#!/usr/bin/env bash\necho "checks $2"; shift 6; "$@"\n'


def gpu_check(tmp_path: Path, **environment: str) -> tuple[int, Path, str]:
    """benchmarks/gpu_check.sh in an empty tree, with programs that only say what they are called for."""
    tree, out, tools = tmp_path / "tree", tmp_path / "out", tmp_path / "tools"
    (tree / "benchmarks").mkdir(parents=True)
    tools.mkdir()
    script = tree / "benchmarks" / "gpu_check.sh"
    script.write_text((BENCHMARKS / "gpu_check.sh").read_text())
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
    text = (BENCHMARKS / "gpu_check.sh").read_text()
    listed = set(text.split("tests=(")[1].split(")")[0].split())
    files = {p.stem.removeprefix("test_"): p.read_text() for p in Path(__file__).parent.glob("test_*.py")}
    apart = ("pytestmark = pytest.mark.cpu_only", "pytestmark = pytest.mark.skipif(not emulated_cuda()")
    assert listed == {name for name, source in files.items() if not any(mark in source for mark in apart)}
