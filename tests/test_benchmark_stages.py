"""The stages of the benchmark: each does its part of the block and leaves x as it is; the table adds up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import stage_harness  # noqa: E402
from stage_tables import COLUMNS, stage_table  # noqa: E402
from summary import Row  # noqa: E402
from timing import Plan  # noqa: E402
from workloads import Use, Workload  # noqa: E402

WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Hardsigmoid", (Use("net", "SEModule", 1),))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_stage_does_its_part(layout: str) -> None:
    with torch.inference_mode():
        steps = stage_harness.stages(WORKLOAD, layout, 3)
        x = steps["clone"]()
        assert torch.allclose(steps["squeeze"](), x.mean((2, 3)), atol=1e-6)
        assert torch.equal(steps["mean"](), x.mean((2, 3)))
        assert steps["excite"]().shape == (3, 24)
        for name in ("multiply", "rescale", "fused", "rescale_in_place", "fused_in_place"):
            for _ in range(2):  # again and again, and nothing fades
                assert torch.equal(steps[name](), x), name
                assert steps[name]().stride() == x.stride()


def test_a_row_has_every_column() -> None:
    row = stage_harness.measure_row(WORKLOAD, "nchw", 2, Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0))
    assert set(COLUMNS) < set(row["variants"])
    assert row["variants"]["clone"]["clone_equivalents"] == 1


def fake_row(megabytes: float, layout: str, **clones: float) -> Row:
    variants = {name: {"clone_equivalents": clones.get(name, 1.0)} for name in COLUMNS}
    return {"bytes_x": megabytes * 1e6, "layout": layout, "variants": variants}


def test_the_table_groups_by_size_and_bounds_the_speedup() -> None:
    rows = [
        fake_row(20, "nchw", mean=0.5, multiply=1.0, rescale=0.75),
        fake_row(1, "nchw", mean=2.0, multiply=2.0, rescale=1.0),
        fake_row(1, "nchw", mean=0.5, multiply=0.5, rescale=1.0),
    ]
    small, large = (line for line in stage_table(rows).splitlines() if "nchw" in line)
    assert small.startswith("| up to 2 MB | nchw | 2 | 1.00 | 1.00 |")
    assert small.endswith("| 2.00 |")  # the geometric mean of 4 and 1
    assert large.startswith("| above 16 MB | nchw | 1 | 0.50 | 1.00 |")
    assert large.endswith("| 2.00 |")
