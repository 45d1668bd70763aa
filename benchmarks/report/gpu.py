"""The tables of gpu.json: the targets of a GPU, what was measured, and every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.blocks import four
from benchmarks.report.markdown import MODES, number, table
from benchmarks.report.targets import GPU, Found, geometric_mean, target_table
from benchmarks.summary import LARGE, OURS, WALL, WORKLOADS, YARDSTICK, Row, groups, over, summarize

NO_GPU = "not measured: no GPU"
TAILS = {"se": "SE", "se_residual_relu": "SE, shortcut, ReLU", "bn_se_residual_relu": "batch norm, SE, shortcut, ReLU"}
PARTS = {LARGE: "Every large map", WALL: "Every block, one sample", WORKLOADS: "Every block"}

Results = dict[str, Any]


def gpu_target_table(results: Results | None) -> str:
    """The targets judged by the rows of a GPU; not by a quick run, nor without a GPU."""
    measured: dict[str, list[Row]] = {}
    if results and not results["settings"]["quick"]:
        measured = {"gpu": results["rows"], "gpu_memory": results["memory"]}
    absent = NO_GPU if results is None or results["gpu"] is None else "not measured"
    title = (
        "Targets on one NVIDIA H200, float32 and bfloat16, both layouts; geometric means where nothing else is said:"
    )
    return f"{title}\n\n{target_table(GPU, measured, absent)}"


def gpu_parts(results: Results | None) -> list[str]:
    """The targets, what was measured, what was not."""
    if results is None:
        return [gpu_target_table(None)]
    rows = rows_of_the_gpu(results)
    parts = [gpu_target_table(results), *([summary_table(rows)] if rows else [])]
    others = [paths_table(results.get("paths", [])), beside_the_cpu(results["rows"]), left_out(results)]
    return [*parts, *filter(None, others)]


def every_row(results: Results) -> list[str]:
    """A table for each group of rows."""
    found = groups(rows_of_the_gpu(results), "group")
    return [
        f"**{title} ({len(rows)} rows)**\n\n{row_table(rows)}"
        for group, title in PARTS.items()
        if (rows := found.get((group,), []))
    ]


def rows_of_the_gpu(results: Results) -> list[Row]:
    """Without those of the CPU beside it; of a CPU where nothing else was measured."""
    return [row for row in results["rows"] if row["device"] == "cuda"] or list(results["rows"])


def summary_table(rows: Sequence[Row]) -> str:
    """One line per group, tail, mode, batch and dtype."""
    lines = []
    for (group, tail, mode, warm, dtype), members in groups(rows, "group", "tail", "mode", "warm", "dtype").items():
        for batch, found in _by_batch(group, members).items():
            over_each = [four(summarize(found, baseline)) for baseline in ("best_eager", "best_compile")]
            compiled = sum(over(row, "best_compile") is not None for row in found)
            where = {LARGE: "memory", WALL: "host"}.get(group, "cache" if warm else "memory")
            what = [TAILS[tail], MODES[mode], dtype, batch, where]
            lines.append([*what, len(found), compiled, _copies(found), *over_each])
    head = ["what", "mode", "dtype", "batch", "data in", "rows", "compiled", "in copies of x"]
    title = "Speedup of se_ext over each baseline, as min / median / geometric mean / max:"
    return f"{title}\n\n{table([*head, 'over best eager', 'over torch.compile'], lines, 'lllrlr')}"


def _by_batch(group: str, rows: Sequence[Row]) -> dict[object, list[Row]]:
    if group == LARGE:  # the batch follows from the shape
        batches = sorted({row["batch"] for row in rows})
        return {" to ".join(map(str, batches[:: max(1, len(batches) - 1)])): list(rows)}
    return {batch: members for (batch,), members in groups(rows, "batch").items()}


def _copies(rows: Sequence[Row]) -> str:
    found = [(row["variants"][OURS]["clone_equivalents"], row) for row in rows]
    return f"{min(v for v, _ in found):.2f} / {geometric_mean(Found(found)):.2f} / {max(v for v, _ in found):.2f}"


def row_table(rows: Sequence[Row]) -> str:
    """Microseconds per call."""
    timed = {YARDSTICK: "copy", "eager_conv": "eager conv", "eager_linear": "eager linear", "compile_linear": "compile"}
    lines = []
    for row in rows:
        times = [number(_time(row, name), 1) for name in (*timed, OURS)]
        ours = row["variants"][OURS]
        what = [row["name"], f"{TAILS[row['tail']]}, {MODES[row['mode']]}", row["layout"], row["dtype"], row["batch"]]
        speed = [number(over(row, baseline)) for baseline in ("best_eager", "best_compile")]
        lines.append([*what, *times, number(ours["clone_equivalents"]), number(ours["gb_per_s"], 0), *speed])
    head = ["block", "what", "layout", "dtype", "batch", *(f"{title} µs" for title in timed.values()), "se_ext µs"]
    return table([*head, "in copies", "GB/s", "over eager", "over compile"], lines, "llllr")


def _time(row: Row, variant: str) -> float | None:
    found = row["variants"].get(variant)
    return None if found is None else found["time_us"]["median"]


def paths_table(rows: Sequence[Row]) -> str | None:
    """Every path of the CUDA kernels beside the one that they choose."""
    paths = ("auto", "cluster", "chunked", "whole")
    lines = [
        [
            *(row["name"], MODES[row["mode"]]),
            *(row[key] for key in ("layout", "dtype", "batch", "chosen")),
            *(number(time and time["median"], 1) for time in (row["time_us"][path] for path in paths)),
            "yes" if row["time_us"][row["chosen"]]["median"] == _fastest(row) else "**no**",
        ]
        for row in rows
    ]
    title = "The SE block on every path, in µs per call, and whether the kernels choose the fastest:"
    head = ["block", "what", "layout", "dtype", "batch", "chosen", *(f"{path} µs" for path in paths), "the fastest"]
    return f"{title}\n\n{table(head, lines, 'llllrl')}" if lines else None


def _fastest(row: Row) -> float:
    return min(time["median"] for path, time in row["time_us"].items() if time is not None and path != "auto")


def beside_the_cpu(rows: Sequence[Row]) -> str | None:
    """se_ext's own time on the CPU and on the GPU, where both were measured."""
    keys = ("name", "layout", "dtype", "batch", "mode", "tail", "group", "warm")
    on = {device: {tuple(r[k] for k in keys): r for r in rows if r["device"] == device} for device in ("cpu", "cuda")}
    lines = []
    for key, cpu in on["cpu"].items():
        if key in on["cuda"]:
            times = [found["variants"][OURS]["time_us"]["median"] for found in (cpu, on["cuda"][key])]
            lines.append([*key[:2], key[3], *(number(time, 1) for time in (*times, times[0] / times[1]))])
    title = "se_ext on the CPU and on the GPU, inference in float32 with the data in cache:"
    head = ["block", "layout", "batch", "CPU µs", "GPU µs", "CPU over GPU"]
    return f"{title}\n\n{table(head, lines, 'llr')}" if lines else None


def left_out(results: Results) -> str | None:
    """What the budget of time did not reach, and what went wrong."""
    lines = [f"- not timed: {what}" for what in results["failed"]]
    left = results["not_reached"].items()
    lines += [f"- not reached within the budget of time: {count} rows of {what}" for what, count in left]
    return "\n".join(lines) or None
