"""The tables of the runs over single SE blocks: the summary, the slow rows, every workload."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.markdown import ABSENT, MODES, number, table
from benchmarks.summary import OURS, YARDSTICK, Row, groups, over, summarize

TITLES = {"best_eager": "best eager", "best_compile": "torch.compile", "better": "the better"}
TIMED = {
    "eager_conv": "eager conv",
    "eager_linear": "eager linear",
    "compile": "compile conv",
    "compile_linear": "compile linear",
    OURS: OURS,
}
BARS = [f"over {title}" for title in TITLES.values()]


def summary_table(rows: Sequence[Row]) -> str:
    """One line per mode, dtype, batch and layout, and one for both layouts together."""
    lines = []
    for (mode, dtype, batch), members in groups(rows, "mode", "dtype", "batch").items():
        lines += [[MODES[mode], dtype, batch, *cells] for cells in by_layout(members)]
    head = ["mode", "dtype", "batch", "layout", "rows", *BARS]
    title = "Speedup of se_ext over each baseline, as min / median / geometric mean / max over the workloads:"
    return f"{title}\n\n{table(head, lines, 'llrlr')}"


def by_layout(rows: Sequence[Row]) -> list[list[object]]:
    """The layout, the number of rows and the speedups: of each layout, and of both together."""
    layouts = {layout: found for (layout,), found in groups(rows, "layout").items()}
    if len(layouts) > 1:
        layouts["both"] = list(rows)
    return [
        [layout, len(found), *(four(summarize(found, baseline)) for baseline in TITLES)]
        for layout, found in layouts.items()
    ]


def four(found: dict[str, float] | None) -> str:
    return ABSENT if found is None else " / ".join(f"{found[k]:.2f}" for k in ("min", "median", "geomean", "max"))


def slow_rows(rows: Sequence[Row]) -> str:
    """Names every row below 1.0 with the baseline that beats it."""
    against = [row for row in rows if over(row, "better") is not None]
    slow = [row for row in against if row["speedup"]["better"]["median"] < 1]
    if not against:
        return "No baseline was timed."
    if not slow:
        return "No row is slower than any of its baselines."
    return "\n".join(["Rows below 1.0 (the better of the baselines is faster):", "", *map(against_the_better, slow)])


def against_the_better(row: Row, of: str = "better") -> str:
    """The row's speedup over its hardest baseline, of all or of one of TITLES, as an item of a list."""
    better = row["speedup"][of]
    return (
        f"- {row['name']}, {row['layout']}, {row['dtype']}, batch {row['batch']}, {MODES[row['mode']]}: "
        f"{better['median']:.2f} ({better['p10']:.2f} to {better['p90']:.2f}) over {better['baseline']}"
    )


def workload_tables(rows: Sequence[Row]) -> list[str]:
    """Every row, in a table for each mode, dtype and batch."""
    tables = []
    for (mode, dtype, batch), members in groups(rows, "mode", "dtype", "batch").items():
        timed = [name for name in TIMED if any(name in row["variants"] for row in members)]
        head = ["block", "networks", "layout", "clone µs", *(f"{TIMED[name]} µs" for name in timed)]
        head += ["p10 to p90", "clones", "GB/s", *BARS]
        title = f"**{MODES[mode]}, {dtype}, batch {batch}** (medians; p10 to p90, clones and GB/s are se_ext's)"
        lines = [_workload_line(row, timed) for row in members]
        tables.append(f"{title}\n\n{table(head, lines, 'lllr')}")
    return tables


def _workload_line(row: Row, timed: Sequence[str]) -> list[object]:
    variants, ours = row["variants"], row["variants"][OURS]
    networks = ", ".join(f"{use['model']} ×{use['count']}" for use in row["workload"]["uses"])
    times = [f"{variants[n]['time_us']['median']:.1f}" if n in variants else ABSENT for n in (YARDSTICK, *timed)]
    speedups = [number(over(row, baseline)) for baseline in TITLES]
    spread = f"{ours['time_us']['p10']:.1f} to {ours['time_us']['p90']:.1f}"
    own = [spread, f"{ours['clone_equivalents']:.2f}", f"{ours['gb_per_s']:.1f}"]
    return [row["name"], networks, row["layout"], *times, *own, *speedups]
