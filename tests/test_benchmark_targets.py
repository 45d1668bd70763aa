"""The targets' table: every number of it worked out by hand, and nothing called met that was not measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from results_header import HEADER

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import report
import results_file
import summary
import targets

pytestmark = pytest.mark.cpu_only

LARGE, SMALL = (256, 56, 56), (64, 7, 7)


def block(
    speedup: float,
    *,
    batch: int = 8,
    mode: str = "inference",
    dtype: str = "float32",
    layout: str = "nchw",
    shape: tuple[int, int, int] = LARGE,
    ours: float = 10.0,
    clone: float = 5.0,
) -> dict[str, Any]:
    samples = {"clone": [clone] * 2, "eager_linear": [speedup * ours] * 2, "se_ext": [ours] * 2}
    channels, height, width = shape
    return summary.add_metrics(
        {
            "name": "x".join(map(str, shape)),
            "device": "cpu",
            "dtype": dtype,
            "batch": batch,
            "layout": layout,
            "mode": mode,
            "workload": {"channels": channels, "height": height, "width": width, "uses": []}
            | {"hidden": 8, "activation": "ReLU", "gate": "Sigmoid"},
            "bytes_x": 1000,
            "other_cpu_share": 0.0,
            "variants": {name: {"samples_us": times} for name, times in samples.items()},
        }
    )


def line(measured: targets.Measured, start: str) -> list[str]:
    lines = [line for line in targets.target_table(measured).splitlines() if line.startswith(f"| {start}")]
    assert lines, start
    return [cell.strip() for cell in lines[0].split("|")[2:-1]]


def test_every_target_is_in_the_table_and_none_is_met_unmeasured() -> None:
    lines = targets.target_table({}).splitlines()[4:]
    assert len(lines) == len(targets.TARGETS) == 16
    assert all(line.endswith("| – | – | – | not measured |") for line in lines)


def test_geometric_mean_over_both_layouts() -> None:
    rows = [
        block(2.0, batch=1),
        block(8.0, batch=1, layout="nhwc"),
        block(9.0, batch=8),
        block(9.0, batch=1, mode="train"),
    ]
    assert line({"blocks": rows}, "inference, batch 1,") == ["≥ 2.5", "≥ 4", "4.00", "2.00", "2", "✓ aim reached"]


def test_between_required_and_aim() -> None:
    assert line({"blocks": [block(3.0)]}, "inference, batch 8,")[-1] == "✓ met"
    assert line({"blocks": [block(2.49)]}, "inference, batch 8,")[-1] == "✗ **missed**"


def test_the_worst_row_and_what_is_missing() -> None:
    rows = [block(3.0), block(1.05, batch=32, layout="nhwc")]
    found = line({"blocks": rows}, "… worst single row")
    assert found == ["≥ 1.1", "≥ 1.3", "1.05", "1.05", "2", "✗ **missed** (not measured: batch 1)"]
    assert (
        line({"blocks": rows[:1]}, "… worst single row")[-1] == "✓ aim reached so far (not measured: batch 1, batch 32)"
    )
    (target, below), (_, below_training) = targets.rows_below({"blocks": rows})
    assert (target.required, below, below_training) == (1.1, rows[1:], [])


def test_rows_of_a_gpu_do_not_count() -> None:
    assert line({"blocks": [block(3.0) | {"device": "cuda"}]}, "inference, batch 8,")[-1] == "not measured"


def test_half_over_float_pairs_rows_of_large_slabs() -> None:
    half = {"dtype": "bfloat16"}
    rows = [
        block(3.0, ours=10.0), block(3.0, ours=6.0, **half),
        block(3.0, ours=10.0, layout="nhwc"), block(3.0, ours=5.4, layout="nhwc", **half),
        block(3.0, ours=1.0, shape=SMALL), block(3.0, ours=9.0, shape=SMALL, **half),
    ]  # fmt: skip
    assert line({"blocks": rows}, "bfloat16 time") == ["≤ 0.7", "≤ 0.55", "0.57", "0.60", "2", "✓ met"]


def test_clones_of_large_samples() -> None:
    rows = [
        block(3.0, ours=10.0, clone=10.0), block(3.0, ours=40.0, clone=10.0, batch=32),
        block(3.0, ours=90.0, clone=10.0, shape=SMALL), block(3.0, ours=90.0, clone=10.0, batch=1),
    ]  # fmt: skip
    assert line({"blocks": rows}, "inference in clones") == ["≤ 1.6", "≤ 1.2", "2.00", "4.00", "2", "✗ **missed**"]


def large_input(environment: str, eager: float, inplace: float) -> dict[str, Any]:
    row = block(3.0, ours=10.0)
    row["variants"] = {
        name: {"samples_us": [time] * 2}
        for name, time in {
            "clone": 5.0,
            "eager_conv": eager,
            "compile": 1.0,
            "se_ext": 10.0,
            "se_ext_inplace": inplace,
        }.items()
    }
    return {"environment": environment, **summary.add_metrics(row)}


def test_in_place_over_eager_under_the_default_allocator() -> None:
    rows = [large_input("default", 60.0, 10.0), large_input("huge pages", 900.0, 10.0)]
    assert rows[0]["speedup_inplace"]["better"]["baseline"] == "compile"
    assert line({"allocators": rows}, "inference in place") == ["≥ 5", "≥ 8", "6.00", "6.00", "1", "✓ met"]


def network(ratio: float | None, share: float = 0.25) -> dict[str, Any]:
    """A network that takes 1 ms without SE; with it, `share` of that more."""
    return {
        "cost_ratio": {"se_ext": ratio, "se_ext_inplace": -9.0},
        "cost_us": {"as_is": {"median": 1e3 * share}},
        "variants": {"no_se": {"time_us": {"median": 1e3}}},
    }


def test_costs_of_networks_are_summed_before_they_are_compared() -> None:
    rows = [network(-0.1, share=0.3), network(0.9, share=0.1), network(None)]
    found = line({"networks": rows}, "what SE costs")
    drowned = "(not measured: 1 rows whose cost drowns in noise)"
    assert found == ["≤ 0.5", "≤ 0.3", "0.15", "0.90", "2", f"✓ aim reached so far {drowned}"]


@pytest.fixture
def results() -> dict[str, Any]:
    return {**HEADER, "rows": [block(3.0), block(1.05, layout="nhwc")]}


def test_several_files_are_one_report(results: dict[str, Any], tmp_path: Path) -> None:
    cost = summary.add_costs(
        {
            **{"name": "net", "device": "cpu", "dtype": "float32", "mode": "inference", "batch": 8, "layout": "nchw"},
            "other_cpu_share": 0.0,
            "variants": {
                name: {"samples_us": [time]} for name, time in {"as_is": 9e3, "se_ext": 5e3, "no_se": 4e3}.items()
            },
        }
    )
    large = large_input("default", 60.0, 10.0)
    for variant in large["variants"].values():
        variant["page_faults_per_call"] = 7.0
    large["variants"]["eager_linear"] = large["variants"]["eager_conv"]
    files = {
        "networks": {**results, "kind": "networks", "rows": [cost]},
        "blocks": results,
        "more": {**results, "kind": "blocks", "rows": [block(4.0, batch=1)]},
        "allocators": {**results, "kind": "allocators", "rows": [large]},
    }
    paths = [tmp_path / f"{name}.json" for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        results_file.save(content, path)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = [*map(str, paths), "--readme", str(readme)]
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    visible = text.split("<details>\n<summary>Every workload")[0]
    for part in (
        "| inference | float32 | 8 | both | 2 |",
        "| inference | float32 | 1 | nchw | 1 |",
        "| inference, batch 1, over the better | ≥ 2.5 | ≥ 4 | 4.00 | 4.00 | 1 | ✓ aim reached |",
        "<summary>Rows below 1.1, what every row must have: 1</summary>",
        "| net | inference | 8 | nchw | 9.0 | 4.0 | 5.0 (5.0 to 5.0) | 1.0 (1.0 to 1.0) | – | 0.20 | – |",
        "| what SE costs in a network, over what it costs as it is | ≤ 0.5 | ≤ 0.3 | 0.20 | 0.20 | 1 | ✓ aim reached |",
        "| default | nchw | 1 | 7 | 7 |",
        *(f"From `{path.name}`" for path in paths),
    ):
        assert part in visible
    assert "**Inputs larger than 64 MB**" in text.removeprefix(visible)


def test_a_quick_run_is_not_judged(results: dict[str, Any]) -> None:
    text = report.markdown([{**results, "settings": {"quick": True}}], ["r.json"])
    assert "| inference, batch 8, over the better | ≥ 2.5 | ≥ 3.5 | – | – | – | not measured |" in text
    assert "whose times mean nothing" in text


def test_the_same_row_in_two_files_is_refused(results: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        results_file.save(results, path)
    assert report.main([*map(str, paths)]) == 1
    assert "more than one file has 256x56x56 cpu float32 8 nchw inference" in capsys.readouterr().err
