"""The tables of the runs over large inputs: the same SE blocks under three settings of the allocator."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.report.markdown import number, table
from benchmarks.summary import INPLACE, OURS, YARDSTICK, Row, groups, over, summarize

TIMED = {
    YARDSTICK: "clone",
    "eager_conv": "eager conv",
    "eager_linear": "eager linear",
    "compile": "compile",
    OURS: OURS,
    INPLACE: "se_ext in place",
}


def allocator_table(rows: Sequence[Row]) -> str:
    """One line per environment and layout."""
    lines = []
    for (environment, layout), members in groups(rows, "environment", "layout").items():
        faults = [_faults(members, name) for name in (OURS, INPLACE)]
        speedups = [
            number((summarize(members, baseline, ours) or {}).get("geomean"))
            for ours in ("speedup", "speedup_inplace")
            for baseline in ("best_eager", "better")
        ]
        lines.append([environment, layout, len(members), *faults, *speedups])
    title = (
        "Inference on inputs larger than 64 MB, by the allocator's settings: page faults per call (median), and "
        "speedup as geometric mean over the rows:"
    )
    head = ["allocator", "layout", "rows", "se_ext faults", "in place faults"]
    head += [f"{who} over {whom}" for who in (OURS, "in place") for whom in ("best eager", "the better")]
    return f"{title}\n\n{table(head, lines, 'llr')}"


def _faults(rows: Sequence[Row], variant: str) -> str:
    return f"{statistics.median(row['variants'][variant]['page_faults_per_call'] for row in rows):.0f}"


def large_input_table(rows: Sequence[Row]) -> str:
    """One line per row, in ms."""
    head = ["allocator", "block", "layout", "batch", "x MB", *(f"{title} ms" for title in TIMED.values())]
    head += ["se_ext over the better", "in place over the better", "in place over best eager"]
    return f"**Inputs larger than 64 MB** (medians)\n\n{table(head, map(_line, rows), 'lllr')}"


def _line(row: Row) -> list[object]:
    times = [number(row["variants"][name]["time_us"]["median"] / 1e3) for name in TIMED]
    speedups = [over(row, "better"), over(row, "better", "speedup_inplace"), over(row, "best_eager", "speedup_inplace")]
    megabytes = number(row["bytes_x"] / 1e6, 0)
    return [row["environment"], row["name"], row["layout"], row["batch"], megabytes, *times, *map(number, speedups)]
