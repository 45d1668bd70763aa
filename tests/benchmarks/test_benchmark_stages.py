"""The stages of the benchmark: each does its part of the block and leaves x as it is; the table adds up."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import stages
from benchmarks.cases.workloads import Use, Workload
from benchmarks.measure.timing import Plan
from benchmarks.report.stages import BOUNDS, stage_tables
from benchmarks.summary import Row

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Hardsigmoid", (Use("net", "SEModule", 1),))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_stage_does_its_part(layout: str) -> None:
    with torch.inference_mode():
        steps = stages.stages(WORKLOAD, layout, 3, "inference")
        x = steps["clone"]()
        assert torch.allclose(steps["squeeze"](), x.mean((2, 3)), atol=1e-6)
        assert torch.equal(steps["mean"](), x.mean((2, 3)))
        assert steps["excite"]().shape == (3, 24)
        for name in ("multiply", "rescale", "fused", "rescale_in_place", "fused_in_place"):
            for _ in range(2):  # again and again, and nothing fades
                assert torch.equal(steps[name](), x), name
                assert steps[name]().stride() == x.stride()


def test_the_stages_of_training_are_those_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "COMPILED", "eager_linear")  # compiling is not what this tests
    steps = stages.stages(WORKLOAD, "nchw", 3, "train")
    output, _, hidden, scale = steps["forward"]()
    assert torch.equal(output, steps["se_ext"]())
    assert torch.equal(output, steps["rescale"]())
    assert all(map(torch.equal, steps["excite"](), (scale, hidden)))
    of_x, *of_weights = steps["backward"]()[:5]
    assert all(grad is not None for grad in of_weights)
    assert torch.equal(of_x, steps["backward_of_x"]()[0])
    assert all(grad is None for grad in steps["backward_of_x"]()[1:])
    assert all(grad is not None for grad in steps["excite_backward"]())
    assert steps["rescale_backward"]()[1].shape == scale.shape


@pytest.mark.parametrize("mode", BOUNDS)
def test_a_row_has_every_column(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "make_step", lambda *_: (lambda: None, None))  # nothing to compile
    plan = Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0)
    row = stages.StageCase(mode, 2, WORKLOAD, "nchw").measure(plan)
    assert {*BOUNDS[mode].columns, *BOUNDS[mode].theirs, *BOUNDS[mode].ours} < set(row["variants"])
    assert row["variants"]["clone"]["clone_equivalents"] == 1


def fake_row(megabytes: float, layout: str, mode: str = "inference", **clones: float) -> Row:
    variants = {name: {"clone_equivalents": clones.get(name, 1.0)} for name in BOUNDS[mode].columns}
    return {"bytes_x": megabytes * 1e6, "layout": layout, "mode": mode, "variants": variants}


def test_the_table_groups_by_size_and_bounds_the_speedup() -> None:
    rows = [
        fake_row(20, "nchw", mean=0.5, multiply=1.0, rescale=0.75),
        fake_row(1, "nchw", mean=2.0, multiply=2.0, rescale=1.0),
        fake_row(1, "nchw", mean=0.5, multiply=0.5, rescale=1.0),
    ]
    train = fake_row(1, "nchw", "train", compile_linear=9.0, rescale=1.0, rescale_backward=2.0)
    inference, training = stage_tables([*rows, train])
    small, large = (line for line in inference.splitlines() if "nchw" in line)
    assert small.startswith("| up to 2 MB | nchw | 2 | 1.00 | 1.00 |")
    assert small.endswith("| 2.00 |")  # the geometric mean of 4 and 1
    assert large.startswith("| above 16 MB | nchw | 1 | 0.50 | 1.00 |")
    assert large.endswith("| 2.00 |")
    assert training.splitlines()[-1].endswith("| 1.00 | 2.00 | 3.00 |")
