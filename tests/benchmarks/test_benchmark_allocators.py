"""Large inputs in the benchmark: environments are what they are called, and a block in place is timed fairly."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import se_ext
from benchmarks.cases import allocators, blocks
from benchmarks.cases.problem import Problem, draw_problem
from benchmarks.cases.workloads import Use, Workload, read_workloads
from benchmarks.measure import allocator
from benchmarks.measure.case import WrongResult
from benchmarks.measure.timing import Plan
from benchmarks.report.allocators import allocator_table, large_input_table

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

ONE_CALL = Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0)
WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Sigmoid", (Use("net", "SEModule", 1),))


@pytest.fixture
def problem() -> Problem:
    return draw_problem(WORKLOAD, "nhwc", 3, torch.float32, torch.device("cpu"), seed=1)


@pytest.mark.parametrize("name", allocator.ENVIRONMENTS)
def test_an_environment_has_its_settings_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        **allocator.SETTINGS,
        "MALLOC_ARENA_MAX": "1",
        "THP_MEM_ALLOC_ENABLE": "0",
        "KEPT": "yes",
    }.items():
        monkeypatch.setenv(key, value)
    found = allocator.environment(name)
    settings = {key: value for key, value in found.items() if key.startswith(("MALLOC", "GLIBC", "THP"))}
    assert settings == allocator.ENVIRONMENTS[name]
    assert found["KEPT"] == "yes"


def test_every_input_is_just_larger_than_the_limit() -> None:
    found = [workload for workload in read_workloads()[0] if workload.name in allocators.NAMES]
    assert len(found) == len(allocators.NAMES)
    for workload in found:
        batch = allocators.large_batch(workload)
        bytes_per_sample = 4 * workload.channels * workload.points
        assert batch % allocators.BATCH_STEP == 0
        assert batch * bytes_per_sample > allocators.LARGE_BYTES
        assert (batch - allocators.BATCH_STEP) * bytes_per_sample <= allocators.LARGE_BYTES


def test_in_place_again_and_again_leaves_x_as_it_is(problem: Problem) -> None:
    timed = allocators.open_gate(problem)
    step, _ = blocks.make_step("se_ext_inplace", timed, "inference")
    with torch.inference_mode():
        x = timed.x.clone()
        outputs = [step() for _ in range(3)]
    assert all(y is timed.x for y in outputs)
    assert torch.equal(timed.x, x)


def test_a_row_has_both_speedups(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("clone", "eager_conv", "eager_linear", "se_ext", "se_ext_inplace")
    monkeypatch.setattr(allocators, "VARIANTS", names)
    x = problem.x.clone()
    row = allocators.measure_row(problem, ONE_CALL)
    assert torch.equal(problem.x, x)
    assert tuple(row["variants"]) == names
    for speedups, ours in (("speedup", "se_ext"), ("speedup_inplace", "se_ext_inplace")):
        assert row[speedups].keys() == {"eager_conv", "eager_linear", "best_eager", "best_compile", "better"}
        times = [row["variants"][name]["samples_us"] for name in ("eager_conv", ours)]
        rounds = [theirs / mine for theirs, mine in zip(*times, strict=True)]
        assert row[speedups]["eager_conv"]["median"] == pytest.approx(sum(rounds) / 2)


class WrongInPlace(se_ext.SqueezeExcitation):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(input).mul_(1.001)


def test_a_wrong_kernel_in_place_is_never_timed(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> nn.Module:
        return WrongInPlace(*arguments, inplace=True)  # type: ignore[arg-type]

    monkeypatch.setitem(blocks.MODULES, "se_ext_inplace", wrong)
    with pytest.raises(WrongResult, match="output is off by"):
        allocators.measure_row(problem, ONE_CALL)


def test_tables_by_hand() -> None:
    def variant(time_us: float, faults: float) -> dict[str, object]:
        return {"time_us": {"median": time_us}, "page_faults_per_call": faults}

    def row(better: float, in_place: float) -> dict[str, object]:
        timed = {"clone": 1e3, "eager_conv": 8e3, "eager_linear": 6e3, "compile": 7e3, "se_ext": 2e3}
        return {
            "environment": "default",
            "name": "block",
            "layout": "nhwc",
            "batch": 96,
            "bytes_x": 77_000_000,
            "variants": {name: variant(time, 100.0) for name, time in timed.items()}
            | {"se_ext_inplace": variant(1e3, 0.0)},
            "speedup": {name: {"median": better} for name in ("best_eager", "better")},
            "speedup_inplace": {name: {"median": in_place} for name in ("best_eager", "better")},
        }

    rows = [row(2.0, 4.0), row(8.0, 9.0)]
    assert "| default | nhwc | 2 | 100 | 0 | 4.00 | 4.00 | 6.00 | 6.00 |" in allocator_table(rows)
    line = "| default | block | nhwc | 96 | 77 | 1.00 | 8.00 | 6.00 | 7.00 | 2.00 | 1.00 | 2.00 | 4.00 | 4.00 |"
    assert line in large_input_table(rows)


def test_every_environment_has_every_row() -> None:
    work = allocators.work("56x56", environment=["default", "huge pages"], layout=["nchw"], quick=False)
    assert [str(case) for case in work.cases] == [
        f"{environment} {block}-m{hidden}-relu-sigmoid nchw"
        for environment in ("default", "huge pages")
        for block, hidden in (("64x56x56", 8), ("256x56x56", 16))
    ]
    assert work.notes == ["default: nothing set", "huge pages: THP_MEM_ALLOC_ENABLE=1"]


def test_a_row_comes_from_a_fresh_process_with_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    assert allocator.in_environment("default", os.getenv, "MALLOC_MMAP_MAX_") is None
    assert allocator.in_environment("page faults out", os.getenv, "MALLOC_MMAP_MAX_") == "0"
    assert allocator.in_environment("default", os.getpid) != os.getpid()
    assert os.environ["MALLOC_MMAP_MAX_"] == "7"
    with pytest.raises(ZeroDivisionError):
        allocator.in_environment("default", divmod, 1, 0)
