"""Converted networks in the benchmark: the plain network beside the converted one, a wrong conversion is never timed,
and what is said of the rows was worked out by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import se_ext
from benchmarks import summary
from benchmarks.cases import converted, networks
from benchmarks.cases.converted import ConvertedCase
from benchmarks.experiments import BY_NAME, NETWORK_NAMES
from benchmarks.measure import session
from benchmarks.measure.case import Work, WrongResult
from benchmarks.measure.timing import Plan
from benchmarks.report import targets
from benchmarks.report.converted import converted_table
from se_ext.conversion.fused_class import is_converted

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

SMALL = "mobilenetv3_small_050"
TWO_ROUNDS = Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0)


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """A hundred small layers: on a busy machine their threads wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Any]]:
    """Whether each network that was compiled is a converted one, and the options. Nothing is compiled: a copy takes the
    place of what torch.compile would make of it."""
    found = []

    def pretend(network: nn.Module, **options: Any) -> nn.Module:
        found.append((any(map(is_converted, network.modules())), options))
        return network

    monkeypatch.setattr(torch, "compile", pretend)
    return found


def case(mode: str, compiled: bool = False) -> ConvertedCase:
    return ConvertedCase(SMALL, "nhwc", mode, 2, compiled, quick=True)


def test_a_training_step_is_timed_in_both_forms(compiled: list[tuple[bool, Any]]) -> None:
    row = case("train", compiled=True).measure_here(TWO_ROUNDS)
    assert list(row["variants"]) == ["eager", "eager_converted", "compile", "compile_converted"]
    assert all(len(variant["samples_us"]) == 2 for variant in row["variants"].values())
    assert compiled == [(is_ours, {"isolate_recompiles": True}) for is_ours in (False, True)]
    assert list(row["peak_bytes"]) == ["eager", "eager_converted"]
    assert row["peak_bytes"]["eager_converted"] < row["peak_bytes"]["eager"]
    assert 0 < row["conversion_s"] < 60
    assert (row["batch"], row["mode"], row["image_size"], row["layout"], row["se_blocks"]) == (
        2,
        "train",
        64,
        "nhwc",
        9,
    )


def test_an_inference_is_timed_in_eager(compiled: list[tuple[bool, Any]]) -> None:
    row = case("inference").measure_here(TWO_ROUNDS)
    assert list(row["variants"]) == ["eager", "eager_converted"]
    assert "peak_bytes" not in row
    assert compiled == []


def test_what_is_timed_is_the_plain_network_and_the_converted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    step = networks.make_step

    def watched(network: nn.Module, *given: Any) -> Any:
        timed.append((any(map(is_converted, network.modules())), network.training))
        return step(network, *given)

    monkeypatch.setattr(converted, "make_step", watched)
    case("train").measure_here(TWO_ROUNDS)
    case("inference").measure_here(TWO_ROUNDS)
    assert timed == [(False, True), (True, True), (False, False), (True, False)]


def test_a_block_left_as_it_was_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = se_ext.convert
    network = networks.timm.create_model(SMALL)
    path = networks.se_blocks(network)[1]
    monkeypatch.setattr(se_ext, "convert", lambda m: real(m, where=lambda p, _: p != path))
    with pytest.raises(WrongResult, match=f"convert left SE blocks as they were: {path}$"):
        case("inference").measure_here(TWO_ROUNDS)


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_a_wrong_conversion_is_never_timed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = converted.convert

    def wrong(network: nn.Module) -> tuple[nn.Module, float]:
        ours, seconds = right(network)
        with torch.no_grad():
            ours.get_parameter("classifier.bias").add_(0.5)
        return ours, seconds

    monkeypatch.setattr(converted, "convert", wrong)
    with pytest.raises(WrongResult, match="eager_converted: logits off by"):
        case(mode).measure_here(TWO_ROUNDS)


def test_each_network_is_run_in_both_layouts_and_compiled_in_one() -> None:
    experiment = BY_NAME["converted"]
    cases = experiment.work("", experiment.axes, quick=False).cases
    assert sorted(map(str, cases)) == sorted(
        f"{name} {what}"
        for name in NETWORK_NAMES
        for what in ("nchw inference 8", "nchw train 8", "nhwc inference 8", "nhwc train 8 compile")
    )
    assert experiment.plan.rounds >= 25
    assert {c.image_size for c in cases if isinstance(c, ConvertedCase)} == {224}
    quick = experiment.work("regnety", {**experiment.axes, "batch": (1, 2)}, quick=True).cases
    assert {c.image_size for c in quick if isinstance(c, ConvertedCase)} == {64}
    assert [str(c) for c in quick if " 1" in str(c)] == [
        f"regnety_008 {where} inference 1" for where in ("nchw", "nhwc")
    ]


def test_a_compiler_that_fails_loses_its_own_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has a fresh process; where one ends, the row is measured again in eager."""
    real, processes = converted.in_environment, []

    def in_environment(name: str, function: Callable[..., Any], plan: Plan) -> dict[str, Any]:
        one = function.__self__  # type: ignore[attr-defined]
        processes.append((name, str(one)))
        return real(name, os._exit, 1) if one.compiled else {"row": one.name}

    monkeypatch.setattr(converted, "in_environment", in_environment)
    monkeypatch.setattr(converted, "work", lambda *_, **__: Work([case("train", compiled=True), case("inference")]))
    results = session.run(BY_NAME["converted"], quick=True)
    assert processes == [("default", f"{SMALL} nhwc {what}") for what in ("train 2 compile", "train 2", "inference 2")]
    assert results["rows"] == [{"row": SMALL}] * 2
    (failed,) = results["failed"]
    assert failed.startswith(f"{SMALL} nhwc train 2 compile: BrokenProcessPool")


# ---- what is said of them ----


def made_up(name: str = "seresnet50", layout: str = "nhwc", mode: str = "train", **times: float) -> dict[str, Any]:
    """A row by its times in ms; of a training step, the converted network's peak is 60 % of the plain one's 100 MB."""
    peaks = {"eager": 100 * 2**20, "eager_converted": 60 * 2**20}
    return summary.add_times(
        {
            **{"name": name, "device": "cpu", "dtype": "float32", "batch": 8, "layout": layout, "mode": mode},
            **({"peak_bytes": peaks} if mode == "train" else {}),
            "conversion_s": 0.25,
            "variants": {variant: {"samples_us": [1e3 * time] * 3} for variant, time in times.items()},
        }
    )


def verdict(start: str, *rows: dict[str, Any]) -> list[str]:
    (line,) = [
        line for line in targets.cpu_table({"converted": list(rows)}).splitlines() if line.startswith(f"| {start}")
    ]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_table_by_hand() -> None:
    step = made_up(eager=30.0, eager_converted=20.0, compile=24.0, compile_converted=20.0)
    inference = made_up(mode="inference", layout="nchw", eager=10.0, eager_converted=8.0)
    lines = converted_table([step, inference]).splitlines()
    assert lines[-2:] == [
        "| seresnet50 | training step | 8 | nhwc | 30.0 → 20.0 | 1.50 (1.50 to 1.50) | 24.0 → 20.0 "
        "| 1.20 (1.20 to 1.20) | 100 → 60 | 0.60 | 250 |",
        "| seresnet50 | inference | 8 | nchw | 10.0 → 8.0 | 1.25 (1.25 to 1.25) | – | – | – | – | 250 |",
    ]


@pytest.mark.parametrize(
    ("name", "layout", "required", "aim"),
    [
        ("efficientnet_b0", "nhwc", "1.25", "1.4"),
        ("efficientnet_b0", "nchw", "1.2", "1.3"),
        ("mobilenetv3_large_100", "nhwc", "1.15", "1.25"),
        ("mobilenetv3_large_100", "nchw", "1.12", "1.2"),
        ("regnety_008", "nhwc", "1.1", "1.2"),
        ("regnety_008", "nchw", "1.12", "1.2"),
        ("seresnet50", "nhwc", "1.15", "1.25"),
        ("seresnet50", "nchw", "1.15", "1.25"),
    ],
)
def test_each_training_step_has_its_target(name: str, layout: str, required: str, aim: str) -> None:
    rows = [
        made_up(name, layout, eager=100.0, eager_converted=80.0),
        made_up(name, {"nhwc": "nchw", "nchw": "nhwc"}[layout], eager=900.0, eager_converted=80.0),
        made_up(name, layout, "inference", eager=900.0, eager_converted=80.0),
    ]
    reached = "✓ aim reached" if float(aim) <= 1.25 else "✓ met"
    assert verdict(f"converted {name}, {layout}: training step", *rows) == [
        f"≥ {required}",
        f"≥ {aim}",
        "1.25",
        "1.25",
        "1",
        reached,
    ]


@pytest.mark.parametrize(
    ("name", "layout", "required", "aim"),
    [
        ("efficientnet_b0", "nhwc", "1.45", "1.8"),
        ("efficientnet_b0", "nchw", "1.8", "2.3"),
        ("mobilenetv3_large_100", "nhwc", "1.3", "1.5"),
        ("mobilenetv3_large_100", "nchw", "1.4", "1.8"),
    ],
)
def test_two_networks_have_a_target_with_their_depthwise_convolutions(
    name: str, layout: str, required: str, aim: str
) -> None:
    rows = [
        made_up(name, layout, eager=160.0, eager_converted=100.0),
        made_up(name, {"nhwc": "nchw", "nchw": "nhwc"}[layout], eager=900.0, eager_converted=80.0),
        made_up(name, layout, "inference", eager=900.0, eager_converted=80.0),
    ]
    reached = "✗ **missed**" if float(required) > 1.6 else "✓ aim reached" if float(aim) <= 1.6 else "✓ met"
    assert verdict(f"converted {name}, {layout}, depthwise convolutions too: training step", *rows) == [
        f"≥ {required}",
        f"≥ {aim}",
        "1.60",
        "1.60",
        "1",
        reached,
    ]


def test_the_memory_is_efficientnet_s_in_both_layouts() -> None:
    rows = [made_up("efficientnet_b0", layout, eager=1.0, eager_converted=1.0) for layout in ("nhwc", "nchw")]
    start = "converted efficientnet_b0: peak memory"
    assert verdict(start, *rows, made_up(eager=1.0, eager_converted=1.0)) == [
        "≤ 0.75",
        "≤ 0.6",
        "0.60",
        "0.60",
        "2",
        "✓ aim reached",
    ]
    assert verdict(start, rows[0])[-1].endswith("so far (not measured: efficientnet_b0 in nchw)")


def test_the_slowest_network_decides_on_inference_and_on_compiled_training() -> None:
    rows = [
        *(
            made_up(n, w, "inference", eager=20.0, eager_converted=10.0)
            for n in NETWORK_NAMES[1:]
            for w in ("nhwc", "nchw")
        ),
        made_up("efficientnet_b0", "nhwc", "inference", eager=102.0, eager_converted=100.0),
        made_up("efficientnet_b0", "nchw", "inference", eager=120.0, eager_converted=100.0),
        *(made_up(n, eager=9.0, eager_converted=1.0, compile=20.0, compile_converted=10.0) for n in NETWORK_NAMES[:-1]),
        made_up(eager=9.0, eager_converted=1.0, compile=110.0, compile_converted=100.0),
    ]
    assert verdict("converted networks: eager inference", *rows) == [
        "≥ 1.03",
        "≥ 1.15",
        "1.02",
        "1.02",
        "8",
        "✗ **missed**",
    ]
    assert verdict("converted networks: compiled training", *rows) == ["≥ 1.05", "≥ 1.15", "1.10", "1.10", "4", "✓ met"]


def test_the_time_of_the_conversion() -> None:
    rows = [made_up(layout=layout, eager=1.0, eager_converted=1.0) for layout in ("nhwc", "nchw")]
    assert verdict("conversion of seresnet50", *rows) == ["≤ 1", "≤ 0.2", "0.25", "0.25", "2", "✓ met"]
