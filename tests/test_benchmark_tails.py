"""The benchmark of the tails: eager and fused are the same formula, a wrong one is never timed, the table adds up."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import summary
import tail_harness
import tails
from problem import WrongResult, draw_problem
from tail_harness import TAILS, Eager, Fused, check, make_step, randomize
from tail_tables import NAMES, tail_table
from variants import build
from workloads import Use, Workload

pytestmark = pytest.mark.cpu_only

WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Sigmoid", (Use("net", "SEModule", 1),))


def made(name: str, layout: str = "nchw") -> tuple:
    tail = TAILS[name]
    problem = draw_problem(WORKLOAD, layout, 3, torch.float32, torch.device("cpu"), 1)
    eager = Eager(tail, build("eager_linear", problem), WORKLOAD.channels)
    fused = Fused(tail, Eager(tail, build("se_ext", problem), WORKLOAD.channels), WORKLOAD)
    randomize(eager)
    randomize(fused)
    return tail, problem, torch.randn_like(problem.x), eager, fused


def test_every_tail_has_a_name_and_a_formula() -> None:
    assert list(TAILS) == list(NAMES) == tails.TAILS


def test_the_shapes_are_those_of_the_two_networks() -> None:
    found = tail_harness.workloads()
    assert {w.name for w in found if w.matches("seresnet50")} >= {"256x56x56-m16-relu-sigmoid"}
    assert all(w.matches("seresnet50") or w.matches("efficientnet_b0") for w in found)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", TAILS)
def test_eager_and_fused_are_the_same_formula(name: str, layout: str) -> None:
    tail, problem, shortcut, eager, fused = made(name, layout)
    check(name, tail, problem, shortcut, eager, fused)
    with torch.inference_mode(tail.mode == "inference"):
        tensors = (problem.x, shortcut, problem.grad_output)
        given = problem.x.clone()
        for module in (eager, fused):
            for _ in range(2):  # in place on what is its own, not on the input
                make_step(module, *tensors, tail)()
        assert torch.equal(problem.x, given)


@pytest.mark.parametrize("name", TAILS)
def test_a_wrong_tail_is_never_timed(name: str) -> None:
    tail, problem, shortcut, eager, fused = made(name)
    wrong = copy.deepcopy(fused)
    with torch.no_grad():
        wrong.module.bn.bias += 0.5
    with pytest.raises(WrongResult, match=f"{name} 24x5x6.*: output off by"):
        check(name, tail, problem, shortcut, eager, wrong)


def test_a_wrong_running_statistic_is_never_timed() -> None:
    tail, problem, shortcut, eager, fused = made("bn_silu_se")
    fused.module.bn.momentum = 0.2
    with pytest.raises(WrongResult, match="running_mean off by"):
        check("bn_silu_se", tail, problem, shortcut, eager, fused)


def row(layout: str, speedup: float) -> summary.Row:
    times = {"clone": 1.0, "eager_conv": 4.0 * speedup, "compile": 3.0 * speedup, "se_ext": 3.0}
    return summary.add_metrics(
        {
            **{"name": "bn_silu_se x", "tail": "bn_silu_se", "mode": "train", "batch": 8, "layout": layout},
            "bytes_x": 8,
            "variants": {name: {"samples_us": [time] * 2} for name, time in times.items()},
        }
    )


def test_the_table_has_each_layout_and_both() -> None:
    lines = tail_table([row("nchw", 2.0), row("nhwc", 8.0)]).splitlines()[-3:]
    start = "| batch norm, SiLU, SE | forward + backward | 8 |"
    assert [line.split(" | ")[3:5] for line in lines] == [["nchw", "1"], ["nhwc", "1"], ["both", "2"]]
    assert all(line.startswith(start) for line in lines)
    assert lines[2].endswith("| 2.00 / 5.00 / 4.00 / 8.00 |")
