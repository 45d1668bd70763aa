"""One SE block in the benchmark: workloads, variants that compute the same, and no wrong one is ever timed."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import blocks
from benchmarks.cases.problem import check, draw_problem, reference
from benchmarks.cases.workloads import CSV, SKIP_REASON, Use, Workload, read_workloads
from benchmarks.experiments import LAYOUTS, QUICK
from benchmarks.measure.case import WrongResult

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

SMALL = {
    "relu-sigmoid": Workload(24, 5, 6, 8, "ReLU", "Sigmoid", (Use("net", "SEModule", 2),)),
    "silu-hardsigmoid": Workload(24, 5, 6, 8, "SiLU", "Hardsigmoid", (Use("net", "SEModule", 1),)),
}


def test_workloads_are_timed_once_and_keep_their_networks() -> None:
    with CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed, skipped = read_workloads()
    assert len(rows) == 43
    assert sum(len(w.uses) for w in timed + skipped) == 43
    assert len({w.name for w in timed + skipped}) == len(timed) + len(skipped)
    shared = next(w for w in timed if w.name == "1024x14x14-m64-relu-sigmoid")
    assert [(use.model, use.count) for use in shared.uses] == [
        ("seresnet50", 6),
        ("seresnext50_32x4d", 6),
        ("legacy_senet154", 36),
    ]
    assert shared.matches("senet154")
    assert shared.matches("14X14")
    assert not shared.matches("regnety")


def work(text: str, **axes: tuple[object, ...]) -> blocks.Work:
    one = {"dtype": ("float32",), "batch": (8,), "mode": ("train",), "variants": (), "device": ("cpu",)}
    return blocks.work(text, **{**one, "layout": LAYOUTS, **axes}, quick=False)


def test_ese_is_skipped_with_a_note() -> None:
    timed, skipped = read_workloads()
    assert all(w.hidden > 0 for w in timed)
    assert {use.model for w in skipped for use in w.uses} == {"ese_vovnet19b_dw"}
    assert len(skipped) == 4
    (note,) = work("").notes
    assert note.startswith("skipped 256x56x56-m0-none-hardsigmoid, ")
    assert note.endswith(f"1024x7x7-m0-none-hardsigmoid: {SKIP_REASON}")
    with pytest.raises(ValueError, match="one C -> C layer instead of two"):
        work("vovnet")


def test_a_case_for_every_value_of_every_axis() -> None:
    found = work("512x7x7", batch=(1, 32), dtype=("float32", "bfloat16"), mode=("inference", "train")).cases
    assert len(set(found)) == len(found) == 16
    for wanted in ("cpu 32 ", " nhwc ", " bfloat16 ", " inference "):
        assert sum(wanted in str(case) for case in found) == 8
    assert not work("no such block").cases


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("workload", SMALL.values(), ids=SMALL)
def test_variants_compute_the_same(workload: Workload, layout: str) -> None:
    # ATen multiplies hardsigmoid's gradient by a float32 1/6 in float64 too: eager is no better than float32 there.
    dtype = torch.float32 if workload.gate == "Hardsigmoid" else torch.float64
    problem = draw_problem(workload, layout, 3, dtype, torch.device("cpu"), seed=1)
    expected = reference(problem)
    for name in ("eager_conv", "eager_linear", "se_ext"):
        for mode in blocks.MODES:
            with torch.inference_mode(mode == "inference"):
                _, found = blocks.make_step(name, problem, mode)
                check(problem, expected, found())


class WrongOutput(blocks.EagerConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class NoGradientThroughTheSqueeze(blocks.EagerConv):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.activation(self.fc1(x.detach().mean((2, 3), keepdim=True)))))


class LosesMemoryFormat(blocks.EagerConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


@pytest.mark.parametrize(
    ("module", "mode", "message"),
    [
        (WrongOutput, "inference", "output is off by"),
        (WrongOutput, "train", "output is off by"),
        (NoGradientThroughTheSqueeze, "train", "grad input is off by"),
        (LosesMemoryFormat, "inference", "output has strides"),
    ],
)
def test_a_wrong_kernel_is_never_timed(
    module: type[nn.Module], mode: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocks.MODULES, "se_ext", module)
    case = blocks.BlockCase("cpu", 2, SMALL["relu-sigmoid"], "nhwc", "float32", mode, ())
    with pytest.raises(WrongResult, match=message):
        case.measure(QUICK)
