"""Depthwise convolutions in the benchmark: those of the networks, every variant the same formula, a wrong one never
timed, and what is said of the rows worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import summary
from benchmarks.cases import depthwise, depthwise_shapes
from benchmarks.cases.depthwise import BlockCase, ConvolutionCase, aten_s, draw, make_step, ours
from benchmarks.cases.depthwise_shapes import Shape
from benchmarks.cases.networks import timm
from benchmarks.cases.workloads import Use
from benchmarks.experiments import BY_NAME, CONV_BLOCK, PASSES
from benchmarks.measure import session
from benchmarks.measure.case import Work, WrongResult
from benchmarks.measure.timing import Plan
from benchmarks.report import targets
from benchmarks.report.depthwise import block_table, depthwise_table, every_convolution

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

TWO_ROUNDS = Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0)
PLAIN = Shape(20, 9, 8, 5, 2, 2, has_bias=False)
SAME = Shape(20, 9, 8, 3, 2, None, has_bias=False)
BIASED = Shape(20, 9, 8, 7, 1, 3, has_bias=True)
ALONE = tuple(what for what in PASSES if what != CONV_BLOCK)


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def no_form_is_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "is_hopeless", lambda step, other: False)


# ---- the shapes ----


def test_the_convolutions_are_those_of_the_networks() -> None:
    shapes = {shape.name: shape for shape in depthwise_shapes.shapes()}
    assert len(shapes) == len(depthwise_shapes.shapes())
    counts: dict[str, int] = {}
    for shape in shapes.values():
        for use in shape.uses:
            counts[use.model] = counts.get(use.model, 0) + use.count
    depthwise_layers = {name: 15 if "mobilenet" in name else 16 for name in depthwise_shapes.NETWORKS}
    assert counts == {**depthwise_layers, "mnasnet_100": 17, "convnext_tiny": 18}
    assert set(shapes["480x14x14-k3"].uses) == {
        Use("efficientnet_b0", "Conv2d", 2),
        Use("mobilenetv3_large_100", "Conv2d", 1),
        Use("mnasnet_100", "Conv2d", 1),
        Use("tf_efficientnet_b0", "Conv2d", 2),
    }
    same = [shape for shape in shapes.values() if shape.padding is None]
    assert [(s.channels, s.height, s.kernel, s.stride) for s in same] == [
        (96, 112, 3, 2),
        (144, 56, 5, 2),
        (240, 28, 3, 2),
        (672, 14, 5, 2),
    ]
    assert all(shape.uses == (Use("tf_efficientnet_b0", "Conv2dSame", 1),) for shape in same)
    assert {s.name for s in shapes.values() if s.has_bias} == {s.name for s in shapes.values() if s.kernel == 7}
    assert set(depthwise.FEW) <= set(shapes)


def test_the_blocks_are_efficientnet_s_with_the_width_of_their_se_block() -> None:
    found = {shape.name: (shape.hidden, shape.uses[0].count) for shape in depthwise_shapes.blocks()}
    assert sum(count for _, count in found.values()) == 16
    assert found["32x112x112-k3"] == (8, 1)
    assert found["1152x7x7-k5"] == (48, 3)


def test_a_depthwise_convolution_has_a_filter_for_each_channel_and_several_channels() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(1, 1, 3)
    )
    assert [path for path, _ in depthwise_shapes.depthwise_layers(network)] == ["0"]


@pytest.mark.parametrize("option", [{"kernel_size": (3, 5)}, {"kernel_size": 3, "dilation": 2}])
def test_a_convolution_that_a_shape_cannot_say_is_an_error(option: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 4, groups=4, **option)
    with pytest.raises(ValueError, match="square kernels without dilation only, got Conv2d"):
        depthwise_shapes.shape_of(conv, torch.randn(1, 4, 8, 8), None)


def test_the_forms_are_the_networks_own_layers() -> None:
    same = timm.layers.Conv2dSame(20, 20, 3, stride=2, groups=20, bias=False)
    plain = nn.Conv2d(20, 20, 5, 2, 2, groups=20, bias=False)
    for shape, layer in ((SAME, same), (PLAIN, plain)):
        problem = draw(shape, 2, torch.float64)
        x, weight = problem.leaves.values()
        layer.double().weight.data = weight
        for form in (aten_s(shape), ours(shape)):
            torch.testing.assert_close(form(x, weight), layer(x))
        assert depthwise_shapes.shape_of(layer, x, None) == shape


# ---- what is timed ----


@pytest.mark.usefixtures("no_form_is_hopeless")
@pytest.mark.parametrize("shape", [PLAIN, SAME, BIASED], ids=str)
def test_every_variant_of_every_pass_is_checked_and_timed(shape: Shape) -> None:
    for layout in ("nchw", "nhwc"):
        for what in ALONE:
            row = ConvolutionCase(shape, "float32", 2, layout, what).measure(TWO_ROUNDS)
            assert list(row["variants"]) == ["clone", "se_ext", "eager_onednn", "eager_native"]
            assert all(len(variant["samples_us"]) == 2 for variant in row["variants"].values())
            assert (row["name"], row["layout"], row["mode"], row["batch"]) == (shape.name, layout, what, 2)
            products = 2 * draw(shape, 2, torch.float32).grad_output.numel() * shape.kernel**2
            assert row["operations"] == products * (3 if what == "train" else 1)
            assert row["bytes_x"] == 4 * 2 * 20 * 9 * 8


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("inference", ["output"]),
        ("grad_input", ["grad input"]),
        ("grad_weight", ["grad weight", "grad bias"]),
        ("train", ["output", "grad input", "grad weight", "grad bias"]),
    ],
)
def test_a_pass_computes_what_it_says_and_no_more(what: str, named: list[str]) -> None:
    asked = []

    def watched(*leaves: Tensor) -> Tensor:
        asked.append(([leaf.requires_grad for leaf in leaves], torch.is_grad_enabled()))
        return aten_s(BIASED)(*leaves)

    step = make_step(watched, draw(BIASED, 2, torch.float32), what)
    for _ in range(2):
        found = step()
    assert list(found) == named
    gradients = [f"grad {key}" in named for key in ("input", "weight", "bias")]
    assert asked[-1] == (gradients, what != "inference")
    assert len(asked) == (1 if what in ("grad_input", "grad_weight") else 2)


def test_the_native_form_runs_without_onednn() -> None:
    assert torch.backends.mkldnn.enabled
    seen: list[bool] = []

    def make() -> Callable[[], dict[str, Tensor]]:
        seen.append(torch.backends.mkldnn.enabled)

        def step() -> dict[str, Tensor]:
            seen.append(torch.backends.mkldnn.enabled)
            raise KeyError("on purpose")

        return step

    step = depthwise.without_onednn(make)
    assert torch.backends.mkldnn.enabled
    with pytest.raises(KeyError, match="on purpose"):
        step()
    assert seen == [False, False]
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("slower", "is_timed"), [(2.9, True), (3.1, False)])
def test_a_form_that_cannot_be_the_better_is_not_timed(
    slower: float, is_timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [slower, 1.0]
    monkeypatch.setattr(depthwise, "seconds", lambda step: times.pop(0))
    row = ConvolutionCase(PLAIN, "float32", 2, "nchw", "inference").measure(TWO_ROUNDS)
    assert ("eager_native" in row["variants"]) is is_timed


def test_a_few_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def pretend(form: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        found.append(options)
        return form

    monkeypatch.setattr(torch, "compile", pretend)
    row = ConvolutionCase(PLAIN, "float32", 2, "nhwc", "train", compiled=True).measure(TWO_ROUNDS)
    assert "compile" in row["variants"]
    assert found == [{"fullgraph": True, "dynamic": False}]


def test_a_compiler_that_fails_loses_its_own_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    case = ConvolutionCase(PLAIN, "float32", 2, "nhwc", "train", compiled=True)
    monkeypatch.setattr(depthwise, "work", lambda *_, **__: Work([case]))
    results = session.run(BY_NAME["depthwise"], quick=True, plan=TWO_ROUNDS)
    (row,) = results["rows"]
    assert "compile" not in row["variants"]
    assert results["failed"] == [f"{PLAIN} float32 nhwc train 2 compile: RuntimeError: no compiler"]


def test_each_convolution_is_timed_in_both_layouts_and_a_few_in_more_forms() -> None:
    experiment = BY_NAME["depthwise"]
    assert experiment.plan.rounds >= 11
    cases = list(experiment.work("", experiment.axes, quick=False).cases)
    names = [str(case) for case in cases]
    assert len(set(names)) == len(names)
    alone = [case for case in cases if isinstance(case, ConvolutionCase)]
    assert {(c.shape.name, c.layout, c.what) for c in alone if c.dtype == "float32"} == {
        (shape.name, layout, what)
        for shape in depthwise_shapes.shapes()
        for layout in ("nchw", "nhwc")
        for what in ALONE
    }
    assert {c.shape.name for c in alone if c.dtype == "bfloat16"} == set(depthwise.FEW)
    compiled = [(c.shape.name, c.dtype, c.what) for c in alone if c.compiled]
    assert set(compiled) == {(name, "float32", what) for name in depthwise.FEW for what in ("inference", "train")}
    blocks = [case for case in cases if isinstance(case, BlockCase)]
    assert len(blocks) == 2 * len(depthwise_shapes.blocks())
    assert {case.batch for case in [*alone, *blocks]} == {8}
    quick = experiment.work("convnext", experiment.axes, quick=True).cases
    assert {str(case).split(" ")[-1] for case in quick} == {"1"}
    only = experiment.work("", {**experiment.axes, "passes": (CONV_BLOCK,)}, quick=False).cases
    assert [str(case) for case in only] == [str(case) for case in blocks]


# ---- a wrong one ----


class OneValueOff(torch.autograd.Function):
    """Right forward; one value of the gradient is not."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0, 0] += 3
        return gradient


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("what", ALONE)
def test_a_wrong_value_is_never_timed(what: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change = (lambda y: y + 1e-3) if what == "inference" else OneValueOff.apply
    real = depthwise.ours
    monkeypatch.setattr(depthwise, "ours", lambda shape: lambda *leaves: change(real(shape)(*leaves)))
    named = {"inference": "output", "train": "grad input"}.get(what, what.replace("_", " "))
    with pytest.raises(WrongResult, match=f"{PLAIN} float32 {layout} {what} 2 se_ext: {named} is off by"):
        ConvolutionCase(PLAIN, "float32", 2, layout, what).measure(TWO_ROUNDS)


def test_a_wrong_baseline_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padding that is not the network's, say; the float64 formula stays right."""
    depthwise.drawn(PLAIN, 2, torch.float32)
    wrong = aten_s(dataclasses.replace(PLAIN, padding=None))
    monkeypatch.setattr(depthwise, "aten_s", lambda shape: wrong)
    with pytest.raises(WrongResult, match="eager_onednn: output is off by"):
        ConvolutionCase(PLAIN, "float32", 2, "nchw", "inference").measure(TWO_ROUNDS)


@pytest.mark.parametrize(("layout", "other"), [("nchw", torch.channels_last), ("nhwc", torch.contiguous_format)])
def test_another_layout_is_never_timed(layout: str, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = depthwise.ours
    monkeypatch.setattr(
        depthwise, "ours", lambda shape: lambda *leaves: real(shape)(*leaves).contiguous(memory_format=other)
    )
    with pytest.raises(WrongResult, match=f"output has strides .*, which is not {layout}"):
        ConvolutionCase(PLAIN, "float32", 2, layout, "inference").measure(TWO_ROUNDS)


# ---- with what follows ----

BLOCK = Shape(24, 9, 8, 3, 2, 1, has_bias=False, hidden=6)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_block_is_checked_and_timed_beside_eager(layout: str) -> None:
    row = BlockCase(BLOCK, 2, layout).measure(TWO_ROUNDS)
    assert list(row["variants"]) == ["clone", "se_ext", "eager"]
    assert (row["name"], row["mode"], row["layout"]) == (f"conv_bn_silu_se {BLOCK}", "train", layout)
    modules = depthwise.modules_of(BLOCK, layout)
    assert [type(layer).__name__ for layer in modules["eager"]] == ["Conv2d", "BatchNorm2d", "SiLU", "SqueezeExcite"]
    assert all(module.training for module in modules.values())


def test_a_wrong_block_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = depthwise.modules_of

    def wrong(shape: Shape, layout: str) -> dict[str, nn.Module]:
        modules = real(shape, layout)
        with torch.no_grad():
            modules["se_ext"].bn_se.se.fc2.bias[3] += 0.5
        return modules

    monkeypatch.setattr(depthwise, "modules_of", wrong)
    with pytest.raises(WrongResult, match=r"conv_bn_silu_se .* se_ext: output is off by"):
        BlockCase(BLOCK, 2, "nchw").measure(TWO_ROUNDS)


# ---- what is said of them ----


def made_up(
    mode: str = "inference", kernel: int = 3, layout: str = "nhwc", *, ours: float = 10.0, **more: Any
) -> summary.Row:
    """A row by se_ext's time in µs; ATen takes 20 with oneDNN, 40 without, and a clone 5. It has 40 000 operations."""
    times = more.pop("times", {"eager_onednn": 20.0, "eager_native": 40.0})
    times = {"clone": 5.0, "se_ext": ours, **times}
    return summary.add_speeds(
        {
            **{"name": f"48x9x9-k{kernel}", "device": "cpu", "dtype": "float32", "batch": 8, "layout": layout},
            **{"mode": mode, "operations": 40_000, "bytes_x": 1000, "other_cpu_share": 0.0, **more},
            "convolution": {"kernel": kernel, "uses": [{"model": "net", "module": "Conv2d", "count": 2}]},
            "variants": {name: {"samples_us": [time] * 2} for name, time in times.items()},
        }
    )


def block(layout: str, ours: float) -> summary.Row:
    return made_up("train", layout=layout, ours=ours, times={"eager": 60.0}, name="conv_bn_silu_se x", operations=None)


def verdict(start: str, *rows: summary.Row) -> list[str]:
    (line,) = [
        line for line in targets.cpu_table({"depthwise": list(rows)}).splitlines() if line.startswith(f"| {start}")
    ]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_row_by_hand() -> None:
    row = made_up(ours=8.0, times={"eager_onednn": 20.0, "eager_native": 16.0, "compile": 4.0})
    variants = row["variants"]
    assert variants["se_ext"]["clone_equivalents"] == pytest.approx(1.6)
    assert variants["se_ext"]["gflop_per_s"] == pytest.approx(5)  # 40 000 in 8 µs
    assert variants["eager_onednn"]["gflop_per_s"] == pytest.approx(2)
    assert "gflop_per_s" not in variants["clone"]
    assert (row["speedup"]["best_eager"]["baseline"], row["speedup"]["best_eager"]["median"]) == ("eager_native", 2.0)
    assert all("gflop_per_s" not in variant for variant in block("nchw", 20.0)["variants"].values())


def test_the_short_tables_by_hand() -> None:
    rows = [
        made_up(ours=5.0), made_up(kernel=5, ours=20.0), made_up(layout="nchw"),
        made_up("grad_weight", dtype="bfloat16"), block("nchw", 30.0), block("nhwc", 7.5),
    ]  # fmt: skip
    lines = depthwise_table(rows).splitlines()[4:]
    nothing = "| 0 | – | – | – |"
    assert lines == [
        "| inference | float32 | 3×3 | 1 | 2.00 / 2.00 / 2.00 / 2.00 | 2.00 | 4.0 "
        "| 1 | 4.00 / 4.00 / 4.00 / 4.00 | 1.00 | 8.0 |",
        f"| inference | float32 | 5×5 {nothing} 1 | 1.00 / 1.00 / 1.00 / 1.00 | 4.00 | 2.0 |",
        "| inference | float32 | all | 1 | 2.00 / 2.00 / 2.00 / 2.00 | 2.00 | 4.0 "
        "| 2 | 1.00 / 2.50 / 2.00 / 4.00 | 2.00 | 4.0 |",
        f"| gradient of the weights | bfloat16 | 3×3 {nothing} 1 | 2.00 / 2.00 / 2.00 / 2.00 | 2.00 | 4.0 |",
        f"| gradient of the weights | bfloat16 | all {nothing} 1 | 2.00 / 2.00 / 2.00 / 2.00 | 2.00 | 4.0 |",
    ]
    assert block_table(rows).splitlines()[-3:] == [
        "| nchw | 1 | 2.00 / 2.00 / 2.00 / 2.00 |",
        "| nhwc | 1 | 8.00 / 8.00 / 8.00 / 8.00 |",
        "| both | 2 | 2.00 / 5.00 / 4.00 / 8.00 |",
    ]
    assert depthwise_table(rows[4:]) == block_table(rows[:4]) == ""


def test_every_row_by_hand() -> None:
    rows = [made_up(), made_up(times={"eager_onednn": 15.0}, layout="nchw"), block("nchw", 30.0)]
    forward, blocks = every_convolution(rows)
    assert forward.splitlines()[-2:] == [
        "| 48x9x9-k3 | net ×2 | nhwc | 5.0 | 20.0 | 40.0 | 10.0 | 10.0 to 10.0 | 2.00 | 4.0 | 2.00 |",
        "| 48x9x9-k3 | net ×2 | nchw | 5.0 | 15.0 | – | 10.0 | 10.0 to 10.0 | 2.00 | 4.0 | 1.50 |",
    ]
    assert (
        blocks.splitlines()[-1]
        == "| conv_bn_silu_se x | net ×2 | nchw | 5.0 | 60.0 | 30.0 | 30.0 to 30.0 | 6.00 | 2.00 |"
    )
    assert every_convolution([]) == []


@pytest.mark.parametrize(
    ("mode", "layout", "required", "aim"),
    [
        ("inference", "nhwc", "1", "1.3"),
        ("inference", "nchw", "1.5", "2.5"),
        ("grad_input", "nhwc", "1", "1.5"),
        ("grad_input", "nchw", "1.3", "2.5"),
        ("train", "nhwc", "1.8", "2.5"),
        ("train", "nchw", "3", "6"),
    ],
)
def test_each_pass_has_its_target_in_each_layout(mode: str, layout: str, required: str, aim: str) -> None:
    other = {"nhwc": "nchw", "nchw": "nhwc"}[layout]
    rows = [
        made_up(mode, 3, layout, ours=20.0), made_up(mode, 7, layout, ours=5.0),  # 1 and 4
        made_up(mode, 3, other, ours=1.0), made_up("grad_weight", 3, layout, ours=1.0),
        made_up(mode, 3, layout, ours=1.0, dtype="bfloat16"), made_up(mode, 3, layout, ours=1.0, batch=1),
        block(layout, 1.0),
    ]  # fmt: skip
    words = {"inference": "inference", "grad_input": "gradient of the input", "train": "forward + backward"}[mode]
    reached = "✓ aim reached" if float(aim) <= 2 else "✓ met" if float(required) <= 2 else "✗ **missed**"
    assert verdict(f"depthwise convolution, {layout}: {words}", *rows) == [
        f"≥ {required}",
        f"≥ {aim}",
        "2.00",
        "1.00",
        "2",
        reached,
    ]


@pytest.mark.parametrize(("kernel", "required", "aim"), [(5, "3", "6"), (3, "1", "1.5"), (7, "2", "4")])
def test_the_gradient_of_the_weights_has_a_target_for_each_kernel_in_both_layouts(
    kernel: int, required: str, aim: str
) -> None:
    rows = [made_up("grad_weight", k, layout, ours=20.0 / k) for k in (3, 5, 7) for layout in ("nhwc", "nchw")]
    cells = verdict(f"depthwise convolution, {kernel}x{kernel}: gradient of the weights", *rows)
    assert cells[:-1] == [f"≥ {required}", f"≥ {aim}", f"{kernel:.2f}", f"{kernel:.2f}", "2"]


def test_the_worst_row_is_one_of_a_single_pass_over_aten_and_is_named() -> None:
    rows = [
        made_up("train", ours=40.0),  # 0.5, which counts elsewhere
        made_up("grad_input", 5, times={"eager_onednn": 9.0, "compile": 1.0}),
        made_up("inference"),
        block("nchw", 90.0),
    ]
    start = "depthwise convolution, inference or one gradient"
    assert verdict(start, *rows) == ["≥ 0.95", "≥ 1.1", "0.90", "0.90", "2", "✗ **missed**"]
    (target, below) = targets.rows_below({"depthwise": rows})[-1]
    assert (target.title[: len(start)], target.baseline, below) == (start, "best_eager", [rows[1]])


def test_the_block_has_its_target() -> None:
    rows = [block("nchw", 30.0), block("nhwc", 15.0), made_up("train", ours=1.0)]
    cells = verdict("depthwise convolution + batch norm + SiLU + SE", *rows)
    assert cells == ["≥ 2.5", "≥ 4", "2.83", "2.00", "2", "✓ met"]
