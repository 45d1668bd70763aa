"""The benchmark of the tails: eager and fused are the same formula, a wrong one is never timed, the table adds up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import experiments, summary
from benchmarks.cases import tails
from benchmarks.cases.problem import Problem, draw_problem
from benchmarks.cases.tails import TAILS, check, make_step, maps_of, module_of
from benchmarks.cases.workloads import Use, Workload
from benchmarks.measure.case import WrongResult
from benchmarks.report.tails import NAMES, tail_table

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

WORKLOAD = Workload(24, 5, 6, 8, "SiLU", "Sigmoid", (Use("net", "SEModule", 1),))


def made(name: str, layout: str = "nchw") -> tuple[Problem, tuple[Tensor, ...], nn.Module, nn.Module]:
    """The problem, its maps, eager and fused."""
    problem = draw_problem(WORKLOAD, layout, 3, torch.float32, torch.device("cpu"), 1)
    maps = maps_of(TAILS[name], problem.x, torch.randn_like(problem.x))
    eager, fused = (module_of(variant, TAILS[name], problem) for variant in ("eager_linear", "se_ext"))
    return problem, maps, eager, fused


def checked(name: str, problem: Problem, maps: tuple[Tensor, ...], eager: nn.Module, fused: nn.Module) -> None:
    check(name, TAILS[name].mode, fused, eager, maps, problem.grad_output, tails.ALLOWED)


def test_every_tail_has_a_name_and_a_formula() -> None:
    assert tuple(TAILS) == tuple(NAMES) == experiments.TAILS


def test_the_shapes_are_those_of_the_two_networks() -> None:
    found = tails.workloads()
    assert {w.name for w in found if w.matches("seresnet50")} >= {"256x56x56-m16-relu-sigmoid"}
    assert all(w.matches("seresnet50") or w.matches("efficientnet_b0") for w in found)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", TAILS)
def test_eager_and_fused_are_the_same_formula(name: str, layout: str) -> None:
    problem, maps, eager, fused = made(name, layout)
    checked(name, problem, maps, eager, fused)
    mode = TAILS[name].mode
    with torch.inference_mode(mode == "inference"):
        given = [t.clone() for t in maps]
        for module in (eager, fused):
            for _ in range(2):  # in place on what is its own, not on the input
                make_step(module, mode, maps, problem.grad_output)()
        assert all(map(torch.equal, maps, given))


@pytest.mark.parametrize("name", TAILS)
def test_a_wrong_tail_is_never_timed(name: str) -> None:
    problem, maps, eager, fused = made(name)
    with torch.no_grad():
        fused.module.bn.bias += 0.5
    with pytest.raises(WrongResult, match=f"{name}: output is off by"):
        checked(name, problem, maps, eager, fused)


def test_a_wrong_running_statistic_is_never_timed() -> None:
    problem, maps, eager, fused = made("bn_silu_se")
    fused.module.bn.momentum = 0.2
    with pytest.raises(WrongResult, match="running_mean is off by"):
        checked("bn_silu_se", problem, maps, eager, fused)


def test_every_variant_has_the_batch_norm_of_the_others() -> None:
    _, _, eager, fused = made("bn_silu_se")
    assert torch.equal(eager.bn.weight, fused.module.bn.weight)
    assert torch.equal(eager.bn.bias, fused.module.bn.bias)
    assert eager.bn.weight.std() > 0.1


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
