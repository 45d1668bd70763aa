"""Two results files side by side: what became faster, what slower."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.summary import OURS, row_key


def ratios(older: dict[str, Any], newer: dict[str, Any]) -> dict[tuple[Any, ...], tuple[float, float]]:
    """For the rows in both: older / newer of se_ext's time, and of its clone-equivalents.

    Above 1 is faster now. The second cancels a machine that was slower as a whole in one of the runs.
    """
    before = {row_key(row): row["variants"][OURS] for row in older["rows"]}
    return {
        key: (
            before[key]["time_us"]["median"] / now["time_us"]["median"],
            before[key]["clone_equivalents"] / now["clone_equivalents"],
        )
        for key, now in ((row_key(row), row["variants"][OURS]) for row in newer["rows"])
        if key in before
    }


def markdown(older: dict[str, Any], newer: dict[str, Any]) -> str:
    found = ratios(older, newer)
    if not found:
        return "No row is in both results files."
    lines = [
        f"se_ext against {older['date']} (commit {older['git']['commit']}); above 1 is faster now:",
        "",
        "| workload | time, older / now | clone-equivalents, older / now |",
        "|---|---:|---:|",
    ]
    lines += [f"| {' '.join(map(str, key))} | {time:.2f} | {clones:.2f} |" for key, (time, clones) in found.items()]
    times, clones = (statistics.geometric_mean(column) for column in zip(*found.values(), strict=True))
    return "\n".join([*lines, f"| **geometric mean of {len(found)}** | **{times:.2f}** | **{clones:.2f}** |"])
