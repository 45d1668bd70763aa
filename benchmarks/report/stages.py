"""The tables of the stages: what bounds the speedup, by the size of the map."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.markdown import number, table
from benchmarks.summary import OURS, Row, groups

# Up to here, in MB of x: what fits the second-level caches, what fits the last one together with its output, the rest.
SIZES = (2.0, 16.0)


@dataclass(frozen=True)
class Bound:
    """The columns of one mode's table; and its last, the time of `theirs` over that of `ours`, the passes over the map
    that nothing can avoid."""

    title: str
    columns: Sequence[str]
    theirs: Sequence[str]
    ours: Sequence[str]

    def of(self, row: Row) -> float:
        return _sum(row, self.theirs) / _sum(row, self.ours)


BOUNDS = {
    "inference": Bound(
        "What bounds inference: each stage by itself, float32, batch 8 and 32, in clone-equivalents (geometric means). "
        "Mean and multiply are eager's two passes. The last column is what the speedup would be if all but the rescale "
        "into a fresh output were free, and eager's small kernels too:",
        ("mean", "multiply", "squeeze", "excite", "rescale", "fused", "rescale_in_place", "fused_in_place"),
        ("mean", "multiply"),
        ("rescale",),
    ),
    "train": Bound(
        "What bounds forward + backward: se_ext's stages, each an op by itself without autograd, float32, batch 8 and "
        "32, in clone-equivalents (geometric means). The last column is what the speedup over torch.compile would be "
        "if all were free but the rescale into a fresh output and its backward (reads x and the gradient, writes the "
        "gradient of x):",
        (
            "compile_linear",
            "se_ext",
            "forward",
            "backward",
            "backward_of_x",
            "excite",
            "excite_backward",
            "rescale",
            "rescale_backward",
        ),
        ("compile_linear",),
        ("rescale", "rescale_backward"),
    ),
}


def stage_tables(rows: Sequence[Row]) -> list[str]:
    return [_table(BOUNDS[mode], members) for (mode,), members in groups(rows, "mode").items()]


def _table(bound: Bound, rows: Sequence[Row]) -> str:
    """One line per size class and layout, in clone-equivalents."""
    sized = [{**row, "size": _size(row)} for row in rows]
    lines = []
    for (size, layout), members in sorted(groups(sized, "size", "layout").items()):
        times = [statistics.geometric_mean(_sum(row, [name]) for row in members) for name in bound.columns]
        cells = [number(value) for value in (*times, statistics.geometric_mean(map(bound.of, members)))]
        lines.append([_title(size), layout, len(members), *cells])
    head = ["x", "layout", "rows", *bound.columns, f"{_joined(bound.theirs)} / {_joined(bound.ours)}"]
    return f"{bound.title}\n\n{table([_words(name) for name in head], lines, 'llr')}"


def _words(name: str) -> str:
    return name if name == OURS else name.replace("_", " ")


def _sum(row: Row, stages: Sequence[str]) -> float:
    return sum(row["variants"][name]["clone_equivalents"] for name in stages)


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({' + '.join(names)})"


def _size(row: Row) -> int:
    return sum(row["bytes_x"] / 1e6 > limit for limit in SIZES)


def _title(size: int) -> str:
    return (f"up to {SIZES[0]:g} MB", f"{SIZES[0]:g} to {SIZES[1]:g} MB", f"above {SIZES[1]:g} MB")[size]
