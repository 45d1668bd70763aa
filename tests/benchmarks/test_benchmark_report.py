"""What is said of the results: every number worked out by hand, nothing called met that was not measured, and pages
that are exactly what the results give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up import HEADER, block_row

from benchmarks import __main__ as command
from benchmarks import summary
from benchmarks.measure import results_file
from benchmarks.report import compare, pages, targets
from benchmarks.report.pages import Measured
from benchmarks.report.whole_networks import speedup_table, whole_network_spreads, whole_network_tables

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

LARGE, SMALL = (256, 56, 56), (64, 7, 7)


@pytest.fixture
def results() -> dict[str, Any]:
    """Two rows whose every number below was worked out by hand."""
    behind = block_row(
        {
            "clone": [10.0, 10.0, 20.0],
            "eager_conv": [40.0, 44.0, 80.0],
            "eager_linear": [30.0, 33.0, 10.0],
            "compile": [10.0, 11.0, 30.0],
            "se_ext": [20.0, 22.0, 10.0],
        },
        name="behind",
    )
    times = {"clone": [4.0] * 3, "eager_linear": [54.0] * 3, "se_ext": [9.0] * 3}
    return {**HEADER, "rows": [behind, block_row(times, name="ahead", layout="nhwc")]}


# ---- the arithmetic ----


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


def test_compare_by_hand(results: dict[str, Any]) -> None:
    row = results["rows"][1]
    faster = block_row({"clone": [2.0] * 3, "se_ext": [3.0] * 3}, name="ahead", layout="nhwc")
    found = compare.ratios({**results, "rows": [row]}, {**results, "rows": [faster, results["rows"][0]]})
    assert list(found.values()) == [pytest.approx((3.0, 1.5))]  # 9 us to 3 us, 2.25 clones to 1.5
    assert "| **3.00** | **1.50** |" in compare.markdown({**results, "rows": [row]}, {**results, "rows": [faster]})


# ---- the tables ----


def test_report_shows_the_numbers_and_names_the_slow_row(results: dict[str, Any]) -> None:
    text = pages.tables(results, "r.json")
    four = "1.50 / 3.75 / 3.00 / 6.00"
    compiled, better = "0.50 / 0.50 / 0.50 / 0.50", "0.50 / 3.25 / 1.73 / 6.00"
    assert f"| forward + backward | float32 | 8 | both | 2 | {four} | {compiled} | {better} |" in text
    assert "- behind, nchw, float32, batch 8, forward + backward: 0.50 (0.50 to 2.50) over compile" in text
    assert "- ahead" not in text
    assert "Not to be trusted" not in text
    assert "| ahead | net ×3 | nhwc | 4.0 | – | 54.0 | – | 9.0 | 9.0 to 9.0 | 2.25 | 0.6 |" in text


def test_report_warns_of_other_programs(results: dict[str, Any]) -> None:
    results["rows"][0]["other_cpu_share"] = 0.4
    assert "**Not to be trusted**: during 1 of 2 rows" in pages.tables(results, "r.json")


def network_row(**samples_us: list[float]) -> dict[str, Any]:
    variants = {name: {"samples_us": times} for name, times in samples_us.items()}
    where = {"name": "net", "device": "cpu", "dtype": "float32", "layout": "nhwc", "mode": "train", "batch": 8}
    return summary.add_times({**where, "image_size": 224, "other_cpu_share": 0.0, "variants": variants})


def compiled_row(
    plain: float, ours: float, without: float, *, eager: float = 900.0, name: str = "seresnet50", **where: Any
) -> dict[str, Any]:
    """An inference by the compiled times in ms; eager with se_ext takes half of eager."""
    times = {"eager": eager, "eager_se_ext": eager / 2, "compile": plain, "compile_se_ext": ours}
    times |= {"compile_no_se": without}
    row = network_row(**{variant: [1e3 * time] * 2 for variant, time in times.items()})
    return {**row, "mode": "inference", "name": name, **where}


def test_a_user_s_table_has_networks_and_the_block_at_batch_8_in_float32() -> None:
    network = network_row(
        eager=[900e3, 800e3], eager_se_ext=[600e3, 500e3], compile=[300e3] * 2, compile_se_ext=[400e3] * 2
    )
    blocks = [
        block(4.0),
        block(9.0, layout="nhwc"),
        block(99.0, batch=1),
        block(99.0, dtype="bfloat16"),
        block_row({"clone": [1.0] * 2, "eager_conv": [6.0] * 2, "compile": [4.0] * 2, "se_ext": [2.0] * 2}),
    ]
    lines = speedup_table([network], blocks).splitlines()[2:]
    assert lines == [
        "| net | training step | 850 → 550 ms | 1.55× | 300 → 400 ms | 0.75× |",  # rounds: 1.5 and 1.6
        "| the block alone, 2 cases | inference | – | 6.00× | – | – |",
        "| the block alone, 1 cases | forward + backward | – | 3.00× | – | 2.00× |",
    ]
    (long,) = [line for line in whole_network_spreads([network]).splitlines() if line.startswith("| net |")]
    assert long.startswith(
        "| net | training step | 8 | 224×224 | 850.0 (810.0 to 890.0) | 550.0 (510.0 to 590.0) | 1.55 (1.51 to 1.59) |"
    )


def test_what_se_costs_in_a_compiled_network_and_other_runtimes_beside_it() -> None:
    row = compiled_row(300.0, 270.0, 260.0)
    row["variants"] |= {
        name: {"samples_us": [time * 1e3] * 2, "time_us": summary.spread([time * 1e3] * 2)}
        for name, time in {"compile_se_ext_blocks": 280.0, "onnxruntime": 150.0, "openvino": 330.0}.items()
    }
    lines = [line for line in whole_network_tables([row]).splitlines() if line.startswith("| seresnet50 |")]
    what = "| seresnet50 | inference | 8 | 224×224 |"
    assert lines == [
        f"{what} 900.0 | 450.0 | 2.00 | – | 300.0 | 270.0 | 1.11 | 1.07 |",
        f"{what} 260.0 | 40.0 | 10.0 | 20.0 | 0.25 |",
        f"{what} 300.0 | 0.90 | 150.0 | 0.50 | 330.0 | 1.10 |",
    ]


def test_a_variant_that_was_not_timed_is_absent() -> None:
    """Rows of an older benchmark, of a runtime that is not installed, of a cost in the noise."""
    older = network_row(eager=[9e5], eager_se_ext=[6e5], compile=[3e5], compile_se_ext=[4e5])
    found = whole_network_tables([older])
    assert "What SE costs" not in found
    assert "other runtimes" not in found
    without_eager = network_row(compile=[3e5], compile_no_se=[4e5], openvino=[6e5])
    assert "| net | training step | – | – | – | – |" in speedup_table([without_eager], [])
    lines = [line for line in whole_network_tables([without_eager]).splitlines() if line.startswith("| net |")]
    assert [line.split("224×224 ")[1] for line in lines] == [
        "| – | – | – | – | 300.0 | – | – | – |",
        "| 400.0 | -100.0 | – | – | – |",
        "| 300.0 | – | – | – | 600.0 | 2.00 |",
    ]


# ---- the targets ----


def block(
    speedup: float,
    *,
    mode: str = "inference",
    shape: tuple[int, int, int] = LARGE,
    ours: float = 10.0,
    clone: float = 5.0,
    **other: Any,
) -> dict[str, Any]:
    """A row by its speedup over its only baseline."""
    samples = {"clone": [clone] * 2, "eager_linear": [speedup * ours] * 2, "se_ext": [ours] * 2}
    row = block_row(samples, mode=mode, name="x".join(map(str, shape)), **other)
    row["workload"] |= dict(zip(("channels", "height", "width"), shape, strict=True))
    return row


def line(measured: targets.Measured, start: str) -> list[str]:
    lines = [line for line in targets.cpu_table(measured).splitlines() if line.startswith(f"| {start}")]
    assert lines, start
    return [cell.strip() for cell in lines[0].split("|")[2:-1]]


def test_every_target_is_in_the_table_and_none_is_met_unmeasured() -> None:
    lines = targets.cpu_table({}).splitlines()[4:]
    assert len(lines) == len(targets.CPU) == 48
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
    (target, below), (_, below_training), _ = targets.rows_below({"blocks": rows})
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


def test_the_slowest_network_is_judged_by_its_mean_over_the_batches() -> None:
    rows = [
        compiled_row(90.0, 100.0, 80.0, batch=1), compiled_row(160.0, 100.0, 80.0),  # 0.9 and 1.6: 1.2
        compiled_row(121.0, 100.0, 80.0, name="regnety_008", batch=1),  # 1.21
        compiled_row(100.0, 100.0, 80.0, name="regnety_008"),  # 1: with the one above, 1.1
        compiled_row(1.0, 100.0, 0.5) | {"mode": "train"},
    ]  # fmt: skip
    measured = {"whole_networks": rows}
    cells = line(measured, "compiled inference, batch 1 and 8")
    absent = [f"{name} at batch {batch}" for name in ("efficientnet_b0", "mobilenetv3_large_100") for batch in (1, 8)]
    verdict = f"✓ aim reached so far (not measured: {', '.join(absent)})"
    assert cells == ["≥ 1", "≥ 1.04", "1.10", "0.90", "4", verdict]
    assert line(measured, "compiled training step")[2:5] == ["0.01", "0.01", "1"]
    assert line(measured, "eager inference of SE-ResNet-50") == [
        "≥ 1.03",
        "≥ 1.1",
        "2.00",
        "2.00",
        "2",
        "✓ aim reached",
    ]


def test_a_network_that_misses_is_named_with_its_times() -> None:
    rows = [
        compiled_row(90.0, 100.0, 80.0, batch=1), compiled_row(40.0, 100.0, 30.0),
        compiled_row(100.0, 100.0, 80.0, name="regnety_008"),
    ]  # fmt: skip
    ((target, (below,)),) = targets.networks_below({"whole_networks": rows})
    assert target.title.startswith("compiled inference")
    assert targets.network_line(below) == (
        "seresnet50: 0.60 (batch 1: 90.0 ms, 100.0 ms with se_ext, 80.0 ms without SE; "
        "batch 8: 40.0 ms, 100.0 ms with se_ext, 30.0 ms without SE)"
    )


def test_costs_of_compiled_networks_are_summed_as_parts_of_their_networks() -> None:
    rows = [
        compiled_row(100.0, 90.0, 80.0, batch=1),  # 1/4 of the time without, and half of that
        compiled_row(900.0, 900.0, 800.0),  # 1/8, and all of it
        compiled_row(100.0, 90.0, 110.0, name="regnety_008"),  # drowns in noise
    ]
    cells = line({"whole_networks": rows}, "what SE costs in compiled inference")
    assert cells[:-1] == ["≤ 0.8", "≤ 0.4", "0.67", "1.00", "2"]
    assert cells[-1].startswith("✓ met so far (not measured: efficientnet_b0 at batch 1,")
    assert "regnety_008 at batch 8" in cells[-1]


def test_the_time_of_the_import() -> None:
    row = summary.add_times({"name": "se_ext", "variants": {"import": {"samples_us": [12e3, 20e3, 14e3]}}})
    assert line({"imports": [row]}, "import of se_ext") == ["≤ 30", "≤ 10", "14.00", "14.00", "1", "✓ met"]


def test_a_quick_run_is_not_judged(results: dict[str, Any]) -> None:
    quick = {**results, "rows": [block(3.0)], "settings": {"quick": True}}
    assert not any(Measured({"r.json": quick}).judged().values())
    assert Measured({"r.json": {**quick, "settings": {"quick": False}}}).judged()["blocks"] == quick["rows"]
    assert "whose times mean nothing" in pages.tables(quick, "r.json")


# ---- the pages ----


def all_kinds(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A results file of every kind that a CPU has but the stages'."""
    costs = network_row(as_is=[9e3], se_ext=[5e3], no_se=[4e3])
    large = large_input("default", 60.0, 10.0)
    for variant in large["variants"].values():
        variant["page_faults_per_call"] = 7.0
    large["variants"]["eager_linear"] = large["variants"]["eager_conv"]
    user = network_row(eager=[9e5], eager_se_ext=[6e5], compile=[3e5], compile_se_ext=[4e5])
    slow = compiled_row(90.0, 100.0, 80.0, batch=1)
    imported = summary.add_times({"name": "se_ext", "variants": {"import": {"samples_us": [12e3]}}})
    converted = network_row(eager=[9e5], eager_converted=[6e5])
    depthwise = block_row({"clone": [5.0] * 2, "eager_onednn": [9.0] * 2, "compile": [1.0] * 2, "se_ext": [10.0] * 2})
    convolution = {"kernel": 5, "uses": [{"model": "net", "module": "Conv2d", "count": 2}]}
    depthwise |= {"name": "48x9x9-k5", "mode": "grad_input", "operations": 40_000, "convolution": convolution}
    return {
        "depthwise.json": {**results, "kind": "depthwise", "rows": [summary.add_speeds(depthwise)]},
        "converted.json": {**results, "kind": "converted", "rows": [{**converted, "conversion_s": 0.1}]},
        "networks.json": {**results, "kind": "networks", "rows": [summary.add_costs({**costs, "mode": "inference"})]},
        "blocks.json": {**results, "rows": [block(3.0), block(1.05, layout="nhwc")]},
        "more.json": {**results, "kind": "blocks", "rows": [block(4.0, batch=1)]},
        "allocators.json": {**results, "kind": "allocators", "rows": [large]},
        "whole_networks.json": {
            **results,
            "kind": "whole_networks",
            "rows": [user, slow],
            "runtimes": {"openvino": "2026.4.1"},
            "notes": ["onnxruntime is left out"],
            "failed": ["seresnet50 nhwc train 8: BrokenProcessPool: a process"],
        },
        "imports.json": {**results, "kind": "imports", "rows": [{**imported, "other_cpu_share": 0.0}]},
    }


def a_place_for_pages(root: Path) -> Path:
    (root / "docs").mkdir()
    for path, name in (("README.md", "speed"), ("docs/gpu.md", "gpu")):
        (root / path).write_text(f"# Title\n\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n\nAfter.\n")
    return root


def test_every_question_has_its_page(results: dict[str, Any], tmp_path: Path) -> None:
    files = all_kinds(results)
    pages.update(check=False, measured=Measured(files), root=a_place_for_pages(tmp_path))
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.md")}
    user = "| net | training step | 900 → 600 ms | 1.50× | – | – |"
    for name, parts in {
        "README.md": [
            user,
            "float32, channels_last, batch 8, images of 224×224",
            "The block alone (avx2): ",
            "blocks of 1 networks",
        ],
        "docs/benchmarks.md": [
            user,
            "| inference | float32 | 8 | both | 2 |",
            "| inference | float32 | 1 | nchw | 1 |",
            "| default | nchw | 1 | 7 | 7 |",
            *(f"- `{file}`: a CPU, 2 threads, instruction set avx2, torch 2.13.0, " for file in files),
            "torch 2.13.0, commit 0123456789, 2026-01-02.",
            "torch 2.13.0, openvino 2026.4.1, commit 0123456789, 2026-01-02. Onnxruntime is left out. Not timed: "
            "seresnet50 nhwc train 8: BrokenProcessPool: a process.",
            "| seresnet50 | inference | 1 | 224×224 | 80.0 | 10.0 | 20.0 | – | 2.00 |",
            "- `se_ext`: 12.0 (12.0 to 12.0) ms",
            "## Depthwise convolutions",
            "| gradient of the input | float32 | 5×5 | 1 | 0.90 / 0.90 / 0.90 / 0.90 | 2.00 | 4.0 | 0 |",
            "## Converted networks",
            "| net | training step | 8 | nhwc | 900.0 → 600.0 | 1.50 (1.50 to 1.50) | – | – | – | – | 100 |",
            "(results/inference.md)",
        ],
        "docs/targets.md": [
            "| inference, batch 1, over the better | ≥ 2.5 | ≥ 4 | 4.00 | 4.00 | 1 | ✓ aim reached |",
            "Rows below 1.1, what every row must have: 1\n\n- 256x56x56, nhwc",
            "| what SE costs in a network, over what it costs as it is | ≤ 0.5 | ≤ 0.3 | 0.20 | 0.20 | 1 | ✓ aim",
            "Networks below 1 of the target “compiled inference, batch 1 and 8, over the plain network compiled, every "
            "network”: 1\n\n- seresnet50: 0.90 (batch 1: 90.0 ms, 100.0 ms with se_ext, 80.0 ms without SE)",
            "every row must have: 1\n\n- 48x9x9-k5, nchw, float32, batch 8, gradient of the input: 0.90 (0.90 to 0.90) "
            "over eager_onednn",
            "not measured: no GPU",
        ],
        "docs/gpu.md": ["not measured: no GPU", "After."],
        "docs/results/inference.md": ["| 256x56x56 | net ×3 | nhwc |"],
        "docs/results/depthwise.md": ["| 48x9x9-k5 | net ×2 | nchw | 5.0 | 9.0 | 1.0 | 10.0 |"],
        "docs/results/networks.md": [
            "| net | inference | 8 | nhwc | 9.0 | 4.0 | 5.0 (5.0 to 5.0) | 1.0 (1.0 to 1.0) |"
        ],
        "docs/results/large-inputs.md": ["**Inputs larger than 64 MB**"],
        "docs/results/whole-networks.md": ["| net | training step | 8 | 224×224 | 900.0 (900.0 to 900.0) |"],
    }.items():
        for part in parts:
            assert part in found[name], name
    assert "| seresnet50 |" not in found["README.md"]  # it has the rows at batch 8
    assert "docs/results/training.md" not in found
    assert "(results/training.md)" not in found["docs/benchmarks.md"]


def test_pages_round_trip(results: dict[str, Any], tmp_path: Path) -> None:
    measured, root = Measured(all_kinds(results)), a_place_for_pages(tmp_path)
    every = {root / path for path in ("README.md", "docs/gpu.md", "docs/benchmarks.md", "docs/targets.md")}
    assert every < set(pages.update(True, measured, root))
    assert (root / "README.md").read_text().count("old") == 1
    assert every < set(pages.update(False, measured, root))
    assert pages.update(True, measured, root) == []
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    for path in every:
        page = path.read_text()
        path.write_text(page.replace("1", "2"))
        assert pages.update(True, measured, root) == [path]
        path.write_text(page)
    (root / "docs/targets.md").unlink()
    assert pages.update(True, measured, root) == [root / "docs/targets.md"]


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
@pytest.mark.parametrize("text", [None, "no markers", "<!-- {0}:end --> <!-- {0}:begin -->"])
def test_a_page_without_its_markers_is_an_error_that_says_so(page: str, text: str | None, tmp_path: Path) -> None:
    root = a_place_for_pages(tmp_path)
    name = {"README.md": "speed", "docs/gpu.md": "gpu"}[page]
    (root / page).unlink() if text is None else (root / page).write_text(text.format(name))
    with pytest.raises(ValueError, match=f"{page}: expected <!-- {name}:begin --> and, after it, <!-- {name}:end -->"):
        pages.update(False, Measured({}), root)
    assert not (root / "docs/benchmarks.md").exists()


def test_the_same_row_in_two_files_is_refused(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="more than one file has behind cpu float32 8 nchw train"):
        Measured({"a.json": results, "b.json": results}).rows("blocks")


def test_the_command_prints_the_tables_and_draws_the_pictures_of_some_files(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    results_file.save(results, path)
    assert command.main(["report", str(path), "--plots", str(tmp_path / "pictures")]) == 0
    assert "| forward + backward | float32 | 8 | both | 2 |" in capsys.readouterr().out
    drawn = sorted(picture.name for picture in (tmp_path / "pictures").iterdir())
    assert drawn == ["roofline-float32-batch8.png", "speedup-float32-batch8.png"]
    assert command.main(["compare", str(path), str(path)]) == 0
    assert "| **1.00** | **1.00** |" in capsys.readouterr().out


def test_the_command_checks_and_writes_the_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = [[tmp_path / "a.md"], []]
    monkeypatch.setattr(pages, "update", lambda check: stale.pop(0))
    assert command.main(["report", "--check"]) == 1
    assert "a.md: not what the results give; `make readme` writes it" in capsys.readouterr().err
    assert command.main(["report", "--check"]) == 0
