"""The table of the stages: what bounds the speedup, by the size of the map."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from markdown_table import number, table
from summary import Row, groups

# Up to here, in MB of x: what fits the second-level caches, what fits the last one together with its output, the rest.
SIZES = (2.0, 16.0)
COLUMNS = ("mean", "multiply", "squeeze", "excite", "rescale", "fused", "rescale_in_place", "fused_in_place")


def stage_table(rows: Sequence[Row]) -> str:
    """One line per size class and layout, in clone-equivalents."""
    sized = [{**row, "size": _size(row)} for row in rows]
    lines = []
    for (size, layout), members in sorted(groups(sized, "size", "layout").items()):
        times = {name: _geomean([row["variants"][name]["clone_equivalents"] for row in members]) for name in COLUMNS}
        bound = _geomean([_eager(row) / row["variants"]["rescale"]["clone_equivalents"] for row in members])
        cells = [number(value) for value in (*times.values(), bound)]
        lines.append([_title(size), layout, len(members), *cells])
    title = (
        "What bounds inference: each stage by itself, float32, batch 8 and 32, in clone-equivalents (geometric means). "
        "Mean and multiply are eager's two passes. The last column is what the speedup would be if all but the rescale "
        "into a fresh output were free, and eager's small kernels too:"
    )
    head = ["x", "layout", "rows", *(name.replace("_", " ") for name in COLUMNS), "(mean + multiply) / rescale"]
    return f"{title}\n\n{table(head, lines, 'llr')}"


def _eager(row: Row) -> float:
    return sum(row["variants"][name]["clone_equivalents"] for name in ("mean", "multiply"))


def _size(row: Row) -> int:
    return sum(row["bytes_x"] / 1e6 > limit for limit in SIZES)


def _title(size: int) -> str:
    return (f"up to {SIZES[0]:g} MB", f"{SIZES[0]:g} to {SIZES[1]:g} MB", f"above {SIZES[1]:g} MB")[size]


def _geomean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
