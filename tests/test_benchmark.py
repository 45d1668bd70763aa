"""The benchmark times what it says it times, and its arithmetic is right."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from results_header import HEADER
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import results_file  # noqa: E402
import run  # noqa: E402
import session  # noqa: E402
import summary  # noqa: E402
import variants  # noqa: E402
from problem import WrongResult, check, draw_problem, reference  # noqa: E402
from timing import LEAD_IN_CALLS, Plan, interleave  # noqa: E402
from workloads import CSV, SKIP_REASON, Use, Workload, read_workloads  # noqa: E402

pytestmark = pytest.mark.cpu_only

SMALL = {
    "relu-sigmoid": Workload(24, 5, 6, 8, "ReLU", "Sigmoid", (Use("net", "SEModule", 2),)),
    "silu-hardsigmoid": Workload(24, 5, 6, 8, "SiLU", "Hardsigmoid", (Use("net", "SEModule", 1),)),
}
ONE_CALL = Plan(rounds=3, block_ms=0.0, warmup_ms=0.0)


def make_row(name: str, layout: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    return summary.add_metrics(
        {
            "name": name,
            "device": "cpu",
            "dtype": "float32",
            "batch": 8,
            "layout": layout,
            "mode": "train",
            "workload": {"uses": [{"model": "net", "module": "SEModule", "count": 3}]},
            "bytes_x": 1000,
            "other_cpu_share": 0.0,
            "variants": {variant: {"samples_us": times} for variant, times in samples.items()},
        }
    )


@pytest.fixture
def results() -> dict[str, Any]:
    """Two rows whose every number below was worked out by hand."""
    behind = make_row(
        "behind",
        "nchw",
        {
            "clone": [10.0, 10.0, 20.0],
            "eager_conv": [40.0, 44.0, 80.0],
            "eager_linear": [30.0, 33.0, 10.0],
            "compile": [10.0, 11.0, 30.0],
            "se_ext": [20.0, 22.0, 10.0],
        },
    )
    ahead = make_row("ahead", "nhwc", {"clone": [4.0] * 3, "eager_linear": [54.0] * 3, "se_ext": [9.0] * 3})
    return {**HEADER, "rows": [behind, ahead]}


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


def test_ese_is_skipped_with_a_note() -> None:
    timed, skipped = read_workloads()
    assert all(w.hidden > 0 for w in timed)
    assert {use.model for w in skipped for use in w.uses} == {"ese_vovnet19b_dw"}
    assert len(skipped) == 4
    note = session._notes(skipped)[1]
    assert note.startswith("skipped 256x56x56-m0-none-hardsigmoid, ")
    assert note.endswith(f"1024x7x7-m0-none-hardsigmoid: {SKIP_REASON}")


def test_row_metrics_by_hand(results: dict[str, Any]) -> None:
    behind = results["rows"][0]
    ours = behind["variants"]["se_ext"]
    assert ours["time_us"] == pytest.approx({"median": 20.0, "p10": 12.0, "p90": 21.6})
    assert ours["clone_equivalents"] == pytest.approx(2.0)  # rounds: 2, 2.2, 0.5
    assert ours["gb_per_s"] == pytest.approx(0.25)  # 5 x 1000 bytes in 20 us
    assert behind["variants"]["clone"]["gb_per_s"] == pytest.approx(0.2)  # 2 x 1000 bytes in 10 us
    speedup = {name: found["median"] for name, found in behind["speedup"].items()}
    assert speedup == pytest.approx(
        {
            "eager_conv": 2.0,
            "eager_linear": 1.5,
            "compile": 0.5,
            "best_eager": 1.5,
            "best_compile": 0.5,
            "better": 0.5,
        }
    )
    assert behind["speedup"]["best_eager"]["baseline"] == "eager_linear"
    assert behind["speedup"]["better"]["baseline"] == "compile"


def test_summary_by_hand(results: dict[str, Any]) -> None:
    found = summary.summarize(results["rows"], "best_eager")  # 1.5 and 6
    assert found == pytest.approx({"min": 1.5, "median": 3.75, "geomean": 3.0, "max": 6.0})
    assert summary.summarize(results["rows"], "compile") == pytest.approx(dict.fromkeys(found, 0.5))
    assert summary.summarize(results["rows"][1:], "compile") is None


def test_report_shows_the_numbers_and_names_the_slow_row(results: dict[str, Any]) -> None:
    text = report.markdown([results], ["r.json"])
    four = "1.50 / 3.75 / 3.00 / 6.00"
    compiled, better = "0.50 / 0.50 / 0.50 / 0.50", "0.50 / 3.25 / 1.73 / 6.00"
    assert f"| forward + backward | float32 | 8 | both | 2 | {four} | {compiled} | {better} |" in text
    assert "- behind, nchw, float32, batch 8, forward + backward: 0.50 (0.50 to 2.50) over compile" in text
    assert "- ahead" not in text
    assert "Not to be trusted" not in text
    assert "| ahead | net ×3 | nhwc | 4.0 | – | 54.0 | – | 9.0 | 9.0 to 9.0 | 2.25 | 0.6 |" in text


def test_report_warns_of_other_programs(results: dict[str, Any]) -> None:
    results["rows"][0]["other_cpu_share"] = 0.4
    assert "**Not to be trusted**: during 1 of 2 rows" in report.markdown([results], ["r.json"])


def test_readme_round_trip(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, readme = tmp_path / "r.json", tmp_path / "README.md"
    results_file.save(results, source)
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    arguments = [str(source), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert "not what the results give" in capsys.readouterr().err
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    readme.write_text(text.replace("3.75", "4.75"))
    assert report.main([*arguments, "--check"]) == 1


def test_readme_without_markers_is_left_alone(results: dict[str, Any], tmp_path: Path) -> None:
    source, readme = tmp_path / "r.json", tmp_path / "README.md"
    results_file.save(results, source)
    readme.write_text("no markers")
    assert report.main([str(source), "--readme", str(readme)]) == 1
    assert readme.read_text() == "no markers"


def test_a_failed_save_keeps_the_old_results(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results_file.save(results, path)
    assert results_file.load(path) == results
    with pytest.raises(TypeError):
        results_file.save({"rows": [object()]}, path)
    assert results_file.load(path) == results
    assert list(tmp_path.iterdir()) == [path]


def test_compare_by_hand(results: dict[str, Any]) -> None:
    row = results["rows"][1]
    faster = make_row("ahead", "nhwc", {"clone": [2.0] * 3, "se_ext": [3.0] * 3})
    found = compare.ratios({**results, "rows": [row]}, {**results, "rows": [faster, results["rows"][0]]})
    assert list(found.values()) == [pytest.approx((3.0, 1.5))]  # 9 us to 3 us, 2.25 clones to 1.5
    assert "| **3.00** | **1.50** |" in compare.markdown({**results, "rows": [row]}, {**results, "rows": [faster]})


def test_variants_take_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    samples = interleave(steps, ONE_CALL, lambda: None)
    turn = [name for name in "ABCBCACAB" for _ in range(LEAD_IN_CALLS + 1)]
    assert calls[-len(turn) :] == turn
    assert [found.calls_per_block for found in samples.values()] == [1, 1, 1]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("workload", SMALL.values(), ids=SMALL)
def test_variants_compute_the_same(workload: Workload, layout: str) -> None:
    # ATen multiplies hardsigmoid's gradient by a float32 1/6 in float64 too: eager is no better than float32 there.
    dtype = torch.float32 if workload.gate == "Hardsigmoid" else torch.float64
    problem = draw_problem(workload, layout, 3, dtype, torch.device("cpu"), seed=1)
    expected = reference(problem)
    for name in ("eager_conv", "eager_linear", "se_ext"):
        for mode in variants.MODES:
            with torch.inference_mode(mode == "inference"):
                _, found = variants.make_step(name, problem, mode)
                check(problem, expected, found())


class WrongOutput(variants.EagerConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class NoGradientThroughTheSqueeze(variants.EagerConv):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.activation(self.fc1(x.detach().mean((2, 3), keepdim=True)))))


class LosesMemoryFormat(variants.EagerConv):
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
    monkeypatch.setitem(variants.MODULES, "se_ext", module)
    problem = draw_problem(SMALL["relu-sigmoid"], "nhwc", 2, torch.float32, torch.device("cpu"), seed=1)
    with pytest.raises(WrongResult, match=message):
        harness.measure_row(problem, reference(problem), mode, ["clone", "se_ext"], ONE_CALL)


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 1
    assert "this torch finds no CUDA device" in capsys.readouterr().err


def test_unknown_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--workload", "no such block"]) == 1
    assert "no workload and no network has this in its name" in capsys.readouterr().err


def test_run_writes_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.json"
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--workload", "512x7x7", "--batch", "2"]
    command += ["--variants", "eager_conv", "eager_linear", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "page faults taken out" in done.stderr
    assert "4/4" in done.stderr
    assert "| inference | float32 | 2 | both | 2 |" in done.stdout

    results = json.loads(out.read_text())
    assert results["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert results["environment"]["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
    assert results["notes"][0].startswith("page faults taken out")
    assert results["machine"]["cpu"]
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["threads"] >= 1
    assert results["machine"]["isa"] in ("baseline", "avx2", "avx512")
    assert results["software"]["torch"] == torch.__version__
    assert {"caches", "load_average"} <= results["machine"].keys()
    assert {"python", "compiler"} <= results["software"].keys()
    assert results["git"].keys() == {"commit", "dirty"}
    assert results["date"]
    assert results["settings"]["quick"]

    assert [(row["layout"], row["mode"]) for row in results["rows"]] == [
        (layout, mode) for layout in ("nchw", "nhwc") for mode in ("inference", "train")
    ]
    for row in results["rows"]:
        assert row["workload"]["uses"] == [{"model": "seresnet18", "module": "SEModule", "count": 2}]
        assert row["bytes_x"] == 2 * 512 * 49 * 4
        assert row["floor_bytes"] == row["bytes_x"] * (2 if row["mode"] == "inference" else 5)
        assert row["working_set_bytes"] > 2 * row["bytes_x"]
        assert list(row["variants"]) == ["clone", "eager_conv", "eager_linear", "se_ext"]
        for variant in row["variants"].values():
            numbers = [*variant["samples_us"], *variant["time_us"].values(), variant["clone_equivalents"]]
            assert all(math.isfinite(n) and n > 0 for n in [*numbers, variant["gb_per_s"]])
            assert len(variant["samples_us"]) == 3
            assert variant["calls_per_block"] >= 1
        medians = {name: row["speedup"][name]["median"] for name in ("eager_conv", "eager_linear", "better")}
        assert medians["better"] == min(medians.values()) > 0
