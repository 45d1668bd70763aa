"""The tables of the depthwise convolutions, alone and with what follows them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.experiments import LAYOUTS
from benchmarks.report.blocks import four
from benchmarks.report.markdown import ABSENT, MODES, number, table
from benchmarks.summary import EAGER, OURS, YARDSTICK, Row, groups, over, summarize

TIMED = {
    "eager_onednn": "ATen with oneDNN",
    "eager_native": "ATen without",
    "compile": "torch.compile",
    OURS: OURS,
}
ALL = "all"


def is_block(row: Row) -> bool:
    """Whether batch norm, SiLU and SE follow the convolution."""
    return EAGER in row["variants"]


# ---- the short tables, each empty where nothing was measured ----


def depthwise_table(rows: Sequence[Row]) -> str:
    """One line per pass, dtype and kernel size, and one for all sizes; the layouts side by side."""
    lines: list[list[object]] = []
    for (mode, dtype), members in groups(_alone(rows), "mode", "dtype").items():
        kernels: dict[int, list[Row]] = {}
        for row in members:
            kernels.setdefault(row["convolution"]["kernel"], []).append(row)
        for size, of_size in [*((f"{k}×{k}", kernels[k]) for k in sorted(kernels)), (ALL, members)]:
            cells = [cell for layout in LAYOUTS for cell in _of_layout(of_size, layout)]
            lines.append([MODES[mode], dtype, size, *cells])
    head = ["what", "dtype", "kernel"]
    for layout in LAYOUTS:
        head += [f"{layout}: rows", "over ATen's better form", "clones", "GFLOP/s"]
    title = (
        "Speedup of `depthwise_conv` over the better of ATen's forms (with oneDNN, without) in the same layout, as min "
        "/ median / geometric mean / max over the convolutions; geometric means of se_ext's time in copies of x and of "
        "its speed:"
    )
    return f"{title}\n\n{table(head, lines, 'lllr')}" if lines else ""


def _of_layout(rows: Sequence[Row], layout: str) -> list[str]:
    mine = [row for row in rows if row["layout"] == layout]
    if not mine:
        return ["0", ABSENT, ABSENT, ABSENT]
    ours = [row["variants"][OURS] for row in mine]
    means = [statistics.geometric_mean(v[key] for v in ours) for key in ("clone_equivalents", "gflop_per_s")]
    return [str(len(mine)), four(summarize(mine, "best_eager")), number(means[0]), number(means[1], 1)]


def block_table(rows: Sequence[Row]) -> str:
    """One line per layout, and one for both."""
    blocks = [row for row in rows if is_block(row)]
    layouts = {layout: found for (layout,), found in groups(blocks, "layout").items()}
    lines = [
        [layout, len(found), four(summarize(found, "best_eager"))]
        for layout, found in {**layouts, "both": blocks}.items()
    ]
    title = (
        "Convolution, batch norm, SiLU and SE, forward + backward: speedup of se_ext over eager, as min / median / "
        "geometric mean / max over the blocks of efficientnet_b0:"
    )
    return f"{title}\n\n{table(['layout', 'rows', 'speedup'], lines, 'lr')}" if blocks else ""


# ---- every row ----


def every_convolution(rows: Sequence[Row]) -> list[str]:
    """A table for each pass, dtype and batch, and one of the blocks."""
    tables = []
    for (mode, dtype, batch), members in groups(_alone(rows), "mode", "dtype", "batch").items():
        timed = [name for name in TIMED if any(name in row["variants"] for row in members)]
        head = ["convolution", "networks", "layout", "clone µs", *(f"{TIMED[name]} µs" for name in timed)]
        head += ["p10 to p90", "clones", "GFLOP/s", "over ATen's better form"]
        title = f"**{MODES[mode]}, {dtype}, batch {batch}** (medians; p10 to p90, clones and GFLOP/s are se_ext's)"
        tables.append(f"{title}\n\n{table(head, [_line(row, timed) for row in members], 'lllr')}")
    blocks = [row for row in rows if is_block(row)]
    if blocks:
        head = ["convolution", "networks", "layout", "clone µs", "eager µs", f"{OURS} µs", "p10 to p90", "clones"]
        title = "**Convolution, batch norm, SiLU and SE, forward + backward** (medians)"
        lines = [_line(row, (EAGER, OURS)) for row in blocks]
        tables.append(f"{title}\n\n{table([*head, 'over eager'], lines, 'lllr')}")
    return tables


def _line(row: Row, timed: Sequence[str]) -> list[object]:
    variants, ours = row["variants"], row["variants"][OURS]
    networks = ", ".join(f"{use['model']} ×{use['count']}" for use in row["convolution"]["uses"])
    times = [number(variants[n]["time_us"]["median"], 1) if n in variants else ABSENT for n in (YARDSTICK, *timed)]
    own = [f"{ours['time_us']['p10']:.1f} to {ours['time_us']['p90']:.1f}", number(ours["clone_equivalents"])]
    own += [number(ours["gflop_per_s"], 1)] if "gflop_per_s" in ours else []
    return [row["name"], networks, row["layout"], *times, *own, number(over(row, "best_eager"))]


def _alone(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not is_block(row)]
