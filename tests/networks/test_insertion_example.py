"""The example that asks whether inserted SE blocks are worth it: its numbers, its words and its pictures."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import ROOT

pytestmark = pytest.mark.cpu_only

pytest.importorskip("matplotlib", reason="the example needs matplotlib")
pytest.importorskip("sklearn", reason="the example writes its version down")


@pytest.fixture(autouse=True)
def example_in_process(monkeypatch, restore_threads):
    monkeypatch.syspath_prepend(str(ROOT))


def row(*accuracies: float) -> dict:
    return {"test_accuracy_per_seed": list(accuracies)}


def test_the_verdict_tells_chance_from_a_difference():
    from examples.insertion.report import difference, verdict

    rows = {
        "plain": row(0.80, 0.82, 0.81),
        "plain + inserted SE": row(0.83, 0.85, 0.845),
        "twice the depth": row(0.80, 0.85, 0.79),
    }
    mean, error = difference(rows["plain + inserted SE"], rows["plain"])
    assert mean == pytest.approx(0.095 / 3)
    assert error == pytest.approx(torch.tensor([0.03, 0.03, 0.035]).std().item() / 3**0.5)
    assert verdict(rows) == (
        "plain + inserted SE: more accurate than the plain network; twice the depth: no difference from the plain "
        "network that these seeds can tell from chance"
    )
    rows["plain + inserted SE"] = row(0.75, 0.77, 0.75)
    assert "plain + inserted SE: less accurate" in verdict(rows)
    assert "one seed shows nothing" in verdict({name: row(0.8) for name in rows})


def test_the_variants_start_as_they_should():
    from examples.insertion.model import DEEPER, PLAIN, WITH_SE, build

    plain, with_se, deeper = (build(variant, 3) for variant in (PLAIN, WITH_SE, DEEPER))
    x = torch.randn(2, 1, 32, 32)
    assert torch.allclose(plain.eval()(x), with_se.eval()(x), rtol=1e-5, atol=1e-6)
    state = with_se.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert (len(plain.blocks), len(deeper.blocks)) == (3, 6)
    assert sum(".se." in key for key in state) == 4 * 3


def test_a_split_keeps_the_share_of_the_classes():
    from examples.insertion.data import Cells

    cells = Cells(torch.zeros(200, 1, 4, 4), (torch.arange(200) % 5 == 0).long())
    train, test = cells.split(0)
    assert sorted(torch.cat((train, test)).tolist()) == list(range(200))
    assert (len(test), int(cells.labels[test].sum())) == (50, 10)
    assert not torch.equal(test, cells.split(1)[1])


def test_example(tmp_path, capsys):
    pytest.importorskip("elpv_dataset", reason="the example's images come with elpv-dataset")
    from examples.insertion.__main__ import main

    assert main(["--quick", "--epochs", "1", "--size", "24", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "training.png", "cost.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 2624
    plain, with_se, deeper = results["variants"].values()
    assert plain["parameters"] < with_se["parameters"] < deeper["parameters"]
    assert plain["multiply_adds"] < with_se["multiply_adds"] < deeper["multiply_adds"]
    assert all(0.3 < variant["test_accuracy_mean"] < 1 for variant in (plain, with_se, deeper))
    assert "one seed shows nothing" in capsys.readouterr().out
