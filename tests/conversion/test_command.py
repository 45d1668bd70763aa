"""`python -m se_ext convert-report`: what it prints, how it measures, and what it says of arguments it cannot use."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import ROOT, package
from torch import nn

import se_ext
from se_ext.__main__ import main
from se_ext.conversion import command, measure
from se_ext.conversion.fused_class import is_converted

pytestmark = pytest.mark.cpu_only

SMALL = ["--size", "64", "--batch", "2", "--rounds", "2"]
TIMES = r"[\d.]+ → [\d.]+ ms, [\d.]+ times as fast \([\d.]+ to [\d.]+\)"


@pytest.fixture(autouse=True)
def libraries(restore_threads: None) -> None:
    package("torchvision_shim")  # so that they can be imported
    torch.set_num_threads(1)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["convert-report", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["convert-report", *arguments]) == 1
    return capsys.readouterr().err


# ---- what is printed ----


def test_report_difference_times_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "test_efficientnet", *SMALL, "--layout", "nchw")
    first, _, *lines = out.splitlines()
    assert first == "test_efficientnet of timm, batch 2, images 64x64, float32, nchw, 1 threads"
    assert lines[0].split() == ["path", "class", "shape", "converted"]
    assert sum(line.endswith("SE block") for line in lines) == 2
    (difference,) = re.findall(r"relative to the largest value: (\S+)", out)
    assert 0 < float(difference) < 1e-6
    assert re.fullmatch(f"inference: {TIMES}", lines[-3])
    assert re.fullmatch(f"training step: {TIMES}", lines[-2])
    memory = re.fullmatch(r"peak memory of the training step: ([\d.]+) → ([\d.]+) MB, ([\d.]+) of it", lines[-1])
    assert memory is not None
    before, after, part = map(float, memory.groups())
    assert after < before
    assert part == pytest.approx(after / before, abs=0.02)


@pytest.mark.parametrize(("option", "lines"), [("--train", ["training step", "peak memory"]), ("--inference", ["inf"])])
def test_one_of_both(option: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "torchvision:mobilenet_v3_small", *SMALL, option)
    assert out.startswith("mobilenet_v3_small of torchvision, batch 2, images 64x64, float32, nhwc")
    measured = out.rpartition("\n\n")[2].splitlines()
    assert len(measured) == len(lines)
    assert all(line.startswith(start) for line, start in zip(measured, lines, strict=True))


def test_medians_and_the_ratio_of_before_to_after(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def made_up(steps: Any, rounds: Any) -> dict[str, list[float]]:
        found.append((list(steps), list(rounds)))
        return {"before": [0.2, 0.4, 0.6], "after": [0.1, 0.1, 0.2]}

    monkeypatch.setattr(command, "interleaved", made_up)
    out = printed(capsys, "test_efficientnet", *SMALL, "--inference")
    assert out.endswith("inference: 400.0 → 100.0 ms, 3.00 times as fast (2.20 to 3.80)\n")  # of 2, 4, 3
    assert found == [(["before", "after"], [0, 1])]


def test_the_plain_network_and_the_converted_one_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []

    def watched(model: nn.Module, images: torch.Tensor) -> measure.Step:
        timed.append(any(is_converted(m) for m in model.modules()))
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.is_contiguous(
            memory_format=torch.channels_last
        )
        return measure.training_step(model, images)

    monkeypatch.setattr(command, "training_step", watched)
    printed(capsys, "test_efficientnet", *SMALL, "--train")
    assert timed == [False, True]


def test_a_network_without_blocks_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "timm:test_resnet", *SMALL).endswith(
        "convert: found no SE block that it can convert; nothing was changed\n"
    )


# ---- how it is measured ----


def test_steps_take_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = measure.interleaved(steps, range(3))
    assert calls == ["a", "b", *"ab", *"ba", *"ab"]
    assert [len(found) for found in seconds.values()] == [3, 3]


def test_an_inference_changes_nothing_and_a_training_step_moves_weights_and_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    images = torch.randn(2, 3, 5, 5)
    measure.inference(model, images)()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    measure.training_step(model, images)()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= moved


def test_no_batch_norm_is_zero() -> None:
    """As timm initialises a ResNet, the last batch norm of each block is: it hides the SE block behind it."""
    library, model = command.build("seresnet18")
    assert library == "timm"
    assert all(m.weight.any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_rounds_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert command._progress(3, "inference") == range(3)


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seresnet5"], r"to be a network of timm or torchvision, got 'seresnet5'. Names like it: timm:seresnet50"),
        (["torchvision:seresnet18"], "to be a network of torchvision, got 'torchvision:seresnet18'"),
        (["torchvision:maskrcnn_resnet50_fpn"], "to be a network of torchvision, got"),  # takes no batch of images
        (["keras:resnet"], "expected MODEL to be NAME, timm:NAME or torchvision:NAME, got 'keras:resnet'"),
        (["seresnet18", "--batch", "1"], "expected --batch to be 2 or more for a training step, got 1"),
        (["vit_tiny_patch16_224", "--size", "65"], r"vit_tiny_patch16_224 does not take images of 3x65x65 \(.*65"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.match(f"python -m se_ext convert-report: .*{message}", refused(capsys, *arguments))


@pytest.mark.parametrize("option", ["--size", "--batch", "--rounds"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_are_whole_and_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert-report", "seresnet18", f"{option}={value}"])
    assert f"argument {option}: expected a whole number of 1 or more, got '{value}'" in capsys.readouterr().err


def test_libraries_that_cannot_be_imported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not installed, or broken, is told of only where the other has no such network."""
    errors: dict[str, Exception] = {"timm": ModuleNotFoundError("No module named 'timm'", name="timm")}
    real = importlib.import_module

    def failing(name: str, package: str | None = None) -> Any:
        if name in errors:
            raise errors[name]
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", failing)
    assert command.build("mobilenet_v3_small")[0] == "torchvision"
    assert "timm is not installed (pip install timm)" in refused(capsys, "timm:seresnet18")
    errors["torchvision"] = RuntimeError("operator torchvision::nms does not exist")
    said = refused(capsys, "seresnet18")
    assert "timm is not installed" in said
    assert "torchvision cannot be imported (RuntimeError: operator torchvision::nms does not exist)" in said


def test_libraries_are_imported_where_they_are_needed() -> None:
    program = (
        "import sys, se_ext.__main__; se_ext.__main__.main([]); "
        "print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"se_ext          {se_ext.__version__}\n")
    assert done.stdout.endswith("[]\n")


def test_help_says_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert-report", "--help"])
    out = capsys.readouterr().out
    for words in ("python -m se_ext convert-report seresnet50", "--layout {nhwc,nchw}", "timm:NAME", "the most memory"):
        assert words in out
