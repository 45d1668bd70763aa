"""The digits demo: its numbers, pictures and exit codes, and nothing half-written after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT

pytestmark = pytest.mark.cpu_only

OUTPUTS = {"results.json", "training.png", "gates.png"}
TINY = ("--quick", "--epochs", "2")

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
plt_image = pytest.importorskip("matplotlib.image", reason="the demo needs matplotlib")


@pytest.fixture(autouse=True)
def demo_in_process(monkeypatch):
    """Make `examples` importable, and undo the thread count that an in-process demo sets."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.digits", *TINY, "--out", str(out)]
    return out, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def expected_parameters(with_se: bool) -> int:
    """Count by hand: 3x3, 3x3, 1x1 convs without bias, three batch norms, the SE layers, the classifier."""
    total = 128 * 10 + 10
    for c_in, c in ((1, 32), (32, 64), (64, 128)):
        total += 9 * c_in * c + 9 * c * c + c_in * c + 3 * 2 * c
        total += (2 * c * (c // 8) + c // 8 + c) * with_se
    return total


def test_results_hold_three_variants_with_their_parameters(demo_run):
    out, finished = demo_run
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in out.iterdir()} == OUTPUTS
    results = json.loads((out / "results.json").read_text())
    parameters = {name: row["parameters"] for name, row in results["variants"].items()}
    assert parameters == {
        "without SE": expected_parameters(with_se=False),
        "SE, plain PyTorch": expected_parameters(with_se=True),
        "SE, se_ext": expected_parameters(with_se=True),
    }
    assert results["seeds"] == [0]
    assert results["epochs"] == 2
    for row in results["variants"].values():
        assert row["test_accuracy_mean"] > 0.8  # guessing gives 0.1
        assert row["epoch_ms_median"] > 0
        # A step holds at least both convolution outputs of the first block: 64 images x 32 channels x 8 x 8.
        assert row["peak_step_bytes"] > 2 * 4 * 64 * 32 * 8 * 8


def test_both_se_variants_reach_the_same_accuracy(demo_run):
    out, finished = demo_run
    agreement = json.loads((out / "results.json").read_text())["agreement"]
    assert agreement["holds"]
    assert abs(agreement["mean_difference"]) <= agreement["tolerance"]
    assert "same seed, same accuracy: plain PyTorch and se_ext: seed 0" in finished.stdout


@pytest.mark.parametrize("name", ["training.png", "gates.png"])
def test_picture_shows_lines_in_several_colours(demo_run, name):
    pixels = plt_image.imread(demo_run[0] / name)
    assert min(pixels.shape[:2]) >= 400
    saturated = np.ptp(pixels[..., :3], axis=-1) > 0.3
    assert len(np.unique((pixels[saturated][:, :3] * 7).astype(int), axis=0)) >= 5


def test_agreement_tells_noise_from_a_worse_variant():
    from examples.digits.train import agreement

    right = torch.ones(360, dtype=torch.bool)
    one_flip_each, ten_lost = right.clone(), right.clone()
    one_flip_each[0] = False
    other_flip = right.clone()
    other_flip[1] = False
    ten_lost[:10] = False
    assert agreement([right], [right]).tolerance == 0
    assert agreement([one_flip_each], [other_flip]).flips == [2]
    assert agreement([one_flip_each], [other_flip]).holds
    assert agreement([right, right], [ten_lost, right]).mean_difference == pytest.approx(-10 / 720)
    assert not agreement([right, right], [ten_lost, right]).holds


def test_disagreement_is_exit_code_1(tmp_path, monkeypatch, capsys):
    from examples.digits import __main__, train

    apart = train.Agreement([(0.99, 0.9)], flips=[32], mean_difference=-0.09, tolerance=0.047)
    monkeypatch.setattr(train, "agreement", lambda *correct: apart)
    assert __main__.main([*TINY, "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "SAME SEED, DIFFERENT ACCURACY" in capsys.readouterr().out


def test_same_seed_starts_all_variants_alike():
    from examples.digits.model import FUSED, NO_SE, PLAIN, build

    none, plain, fused = (build(variant, 3).state_dict() for variant in (NO_SE, PLAIN, FUSED))
    assert plain.keys() == fused.keys() > none.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    assert all(torch.equal(plain[name], none[name]) for name in none)


def test_gates_match_the_plain_module():
    from examples.digits.model import FUSED, build, gates

    net = build(FUSED, 0).eval()
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = net.blocks[0].body(images).double()
    fc1, fc2 = net.blocks[0].tail.double().fc1, net.blocks[0].tail.fc2
    h = torch.relu(x.mean((2, 3)) @ fc1.weight.flatten(1).T + fc1.bias)
    expected = torch.sigmoid(h @ fc2.weight.flatten(1).T + fc2.bias)
    net.float()
    # The longest sum has 64 terms of order one: sqrt(64) float32 roundings of 2**-24 each.
    torch.testing.assert_close(gates(net, images)[0].double(), expected.detach(), rtol=0, atol=8 * 2**-24)


def test_interrupt_while_writing_leaves_no_file(tmp_path, monkeypatch, capsys):
    from examples.digits import __main__, plots

    def interrupted(gates, labels, whose, path):
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "plot_gates", interrupted)
    assert __main__.main([*TINY, "--epochs", "1", "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.endswith("interrupted: no half-written file is left\n")


def heed_sigint():
    """Undo an inherited "ignore SIGINT", which is what a shell's background job hands down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_training_keeps_the_old_files_only(tmp_path):
    (tmp_path / "results.json").write_text("an earlier run's")
    command = [sys.executable, "-m", "examples.digits", "--epochs", "1000", "--out", str(tmp_path)]
    piped = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_sigint, **piped) as demo:
        shown = ""
        while "1/9000" not in shown and (character := demo.stderr.read(1)):
            shown += character
        demo.send_signal(signal.SIGINT)
        shown += demo.communicate(timeout=60)[1]
    assert demo.returncode == 130, shown
    assert shown.endswith("interrupted: no half-written file is left\n")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "an earlier run's"
