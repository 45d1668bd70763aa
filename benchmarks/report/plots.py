"""The pictures of the benchmark: speedup per workload, time against bytes of x, whole networks, large maps of a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.report.gpu import TAILS
from benchmarks.summary import (
    AS_IS,
    FLOOR_PASSES,
    INPLACE,
    LARGE,
    OURS,
    WITHOUT,
    YARDSTICK,
    Row,
    groups,
    over,
)

# Okabe and Ito's palette, which readers with any colour vision can tell apart; shapes differ as well.
LAYOUTS = {"nchw": ("NCHW", "#0072B2", "o"), "nhwc": ("channels_last", "#D55E00", "D")}
VARIANTS = {
    "eager_conv": ("eager, 1×1 conv", "#E69F00", "^"),
    "eager_linear": ("eager, linear", "#CC79A7", "v"),
    "compile": ("torch.compile, 1×1 conv", "#009E73", "s"),
    "compile_linear": ("torch.compile, linear", "#56B4E9", "P"),
    OURS: (OURS, "#0072B2", "o"),
}
NETWORK_VARIANTS = {
    AS_IS: ("as it is", "#E69F00"),
    OURS: (OURS, "#0072B2"),
    INPLACE: ("se_ext in place", "#56B4E9"),
    WITHOUT: ("without SE", "#999999"),
}
MODES = {"inference": "Inference", "train": "Forward + backward"}
NETWORK_MODES = {"inference": "Inference", "train": "Training step"}
SPEEDUP_TICKS = (0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def write(files: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the picture of everything that there are rows for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in pictures(files):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def pictures(files: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """speedup-* (if a baseline was timed) and roofline-* for every dtype and batch size of the blocks, networks-* for
    every dtype, gpu for a GPU's large maps."""
    rows, where = _rows_and_where(files, "blocks")
    for (dtype, batch), members in groups(rows, "dtype", "batch").items():
        case = f"{dtype}, batch {batch}. {where}"
        if any(over(row, "better") for row in members):
            yield f"speedup-{dtype}-batch{batch}", _speedup(members, case)
        yield f"roofline-{dtype}-batch{batch}", _roofline(members, case)
    rows, where = _rows_and_where(files, "networks")
    for (dtype,), members in groups(rows, "dtype").items():
        yield f"networks-{dtype}", _networks(members, f"{dtype}. {where}")
    rows, where = _rows_and_where(files, "gpu")
    large = [row for row in rows if row["group"] == LARGE]
    if large:
        yield "gpu", _large_maps(large, where)


def _rows_and_where(files: Sequence[dict[str, Any]], kind: str) -> tuple[list[Row], str]:
    mine = [results for results in files if results["kind"] == kind]
    rows = [row for results in mine for row in results["rows"]]
    return rows, "; ".join(dict.fromkeys(_where(results) for results in mine))


def _where(results: dict[str, Any]) -> str:
    machine = results["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    return f"{device}, torch {results['software']['torch']}"


def _present(rows: Sequence[Row], key: str, known: Iterable[str]) -> list[str]:
    return [value for value in known if any(row[key] == value for row in rows)]


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _speedup(rows: Sequence[Row], case: str) -> Figure:
    """One line per workload, one panel per mode, one marker per layout, bars from p10 to p90."""
    rows = [row for row in rows if over(row, "better") is not None]
    ordered = sorted(rows, key=lambda row: (row["bytes_x"], row["name"]))
    places = {name: place for place, name in enumerate(dict.fromkeys(row["name"] for row in ordered))}
    labels = [_label(row) for row in {row["name"]: row for row in ordered}.values()]
    modes = _present(rows, "mode", MODES)
    size = (4.0 + 4.2 * len(modes), 2.6 + 0.23 * len(places))
    figure, axes = plt.subplots(
        1, len(modes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        members = [row for row in rows if row["mode"] == mode]
        _speedup_panel(axis, members, places)
        medians = [row["speedup"]["better"]["median"] for row in members]
        axis.set_title(
            f"{MODES[mode]}: {sum(median > 1 for median in medians)} of {len(members)} faster,\n"
            f"geometric mean {statistics.geometric_mean(medians):.2f}×, lowest {min(medians):.2f}×",
            fontsize=10,
        )
    medians = [row["speedup"]["better"]["median"] for row in rows]
    axes[0][0].set_xlim(0.8 * min(1, *medians), 1.25 * max(1, *medians))
    axes[0][0].set_yticks(list(places.values()), labels, fontsize=8)
    axes[0][0].set_ylim(-0.7, len(places) - 0.3)
    axes[0][0].set_ylabel("C×H×W, M, activation/gate (ordered by bytes of x)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    names = [VARIANTS[name][0] for name in VARIANTS if name != OURS and over(rows[0], name) is not None]
    figure.suptitle(f"Speedup of se_ext over the fastest of: {'; '.join(names)}\n{case}", fontsize=11)
    return figure


def _label(row: Row) -> str:
    block = row["workload"]
    shape = f"{block['channels']}×{block['height']}×{block['width']}"
    return f"{shape}, {block['hidden']}, {block['activation']}/{block['gate']}"


def _speedup_panel(axis: Axes, rows: Sequence[Row], places: dict[str, int]) -> None:
    for offset, layout in zip((0.16, -0.16), LAYOUTS, strict=True):
        label, colour, marker = LAYOUTS[layout]
        members = [row for row in rows if row["layout"] == layout]
        if not members:
            continue
        spreads = [row["speedup"]["better"] for row in members]
        heights = [places[row["name"]] + offset for row in members]
        axis.hlines(heights, [s["p10"] for s in spreads], [s["p90"] for s in spreads], colour, alpha=0.45, lw=1.5)
        axis.plot([s["median"] for s in spreads], heights, marker, color=colour, ms=5, label=label)
    axis.axvline(1, color="black", lw=1.2, label="as fast as the baseline")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(SPEEDUP_TICKS))
    axis.xaxis.set_major_formatter(FuncFormatter(_plain))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("speedup (median; bar: p10 to p90), log scale")
    axis.grid(axis="x", color="0.85")
    axis.set_axisbelow(True)


def _roofline(rows: Sequence[Row], case: str) -> Figure:
    """Time against bytes of x: a panel per mode and layout, a marker per variant, lines from x.clone()."""
    modes, layouts = _present(rows, "mode", MODES), _present(rows, "layout", LAYOUTS)
    size = (1.0 + 5.0 * len(layouts), 1.6 + 3.7 * len(modes))
    figure, axes = plt.subplots(
        len(modes), len(layouts), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for line, mode in zip(axes, modes, strict=True):
        for axis, layout in zip(line, layouts, strict=True):
            members = [row for row in rows if row["mode"] == mode and row["layout"] == layout]
            _roofline_panel(axis, members, mode)
            clones = statistics.median(row["variants"][OURS]["clone_equivalents"] for row in members)
            axis.set_title(
                f"{MODES[mode]}, {LAYOUTS[layout][0]}: se_ext takes {clones:.2g} clones (median)", fontsize=10
            )
        line[0].set_ylabel("time per call, µs")
    for axis in axes[-1]:
        axis.set_xlabel("x, MB")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Time against size: how far each variant is from a plain copy\n{case}", fontsize=11)
    return figure


def _roofline_panel(axis: Axes, rows: Sequence[Row], mode: str) -> None:
    clone = {
        bytes_x: statistics.median(row["variants"][YARDSTICK]["time_us"]["median"] for row in members)
        for (bytes_x,), members in sorted(groups(rows, "bytes_x").items())
    }
    sizes_mb = [bytes_x / 1e6 for bytes_x in clone]
    axis.plot(sizes_mb, list(clone.values()), color="black", lw=1.5, label="x.clone(), measured")
    if FLOOR_PASSES[mode] != FLOOR_PASSES["inference"]:
        clones = FLOOR_PASSES[mode] / FLOOR_PASSES["inference"]
        floor = [clones * time for time in clone.values()]
        axis.plot(sizes_mb, floor, "--", color="black", lw=1.2, label=f"floor of training: {clones:g} clones")
    for name, (label, colour, marker) in VARIANTS.items():
        members = [row for row in rows if name in row["variants"]]
        if members:
            sizes = [row["bytes_x"] / 1e6 for row in members]
            times = [row["variants"][name]["time_us"]["median"] for row in members]
            axis.plot(sizes, times, marker, color=colour, ms=5.5, mec="white", mew=0.5, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FuncFormatter(_plain))
    axis.grid(color="0.88")
    axis.set_axisbelow(True)


def _networks(rows: Sequence[Row], case: str) -> Figure:
    """A panel per mode and batch, a group of bars per network and layout, a bar per variant, in parts of as_is."""
    panels = groups(rows, "mode", "batch")
    labels = list(dict.fromkeys(_network_label(row) for row in rows))
    size = (max(7.0, 2.0 + 1.1 * len(labels)), 1.4 + 2.4 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, ((mode, batch), members) in zip(axes[:, 0], panels.items(), strict=True):
        _networks_panel(axis, members, labels)
        axis.set_title(f"{NETWORK_MODES[mode]}, batch {batch}", fontsize=10)
        axis.set_ylabel("time, of as it is")
    axes[-1][0].set_xticks(range(len(labels)), labels, fontsize=8)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(f"Whole networks; above the bars: median ms\n{case}", fontsize=11)
    return figure


def _network_label(row: Row) -> str:
    return f"{row['name']}\n{LAYOUTS[row['layout']][0]}"


def _networks_panel(axis: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    timed = [name for name in NETWORK_VARIANTS if any(name in row["variants"] for row in rows)]
    width = 0.85 / len(timed)
    for place, name in enumerate(timed):
        label, colour = NETWORK_VARIANTS[name]
        members = [row for row in rows if name in row["variants"]]
        times = [row["variants"][name]["time_us"]["median"] for row in members]
        parts = [time / row["variants"][AS_IS]["time_us"]["median"] for time, row in zip(times, members, strict=True)]
        middle = (place - (len(timed) - 1) / 2) * width
        lefts = [labels.index(_network_label(row)) + middle for row in members]
        bars = axis.bar(lefts, parts, width, color=colour, label=label)
        axis.bar_label(bars, [f"{time / 1e3:.{0 if time >= 1e5 else 1}f}" for time in times], fontsize=6.5)
    axis.margins(y=0.12)
    axis.grid(axis="y", color="0.88")
    axis.set_axisbelow(True)


def _large_maps(rows: Sequence[Row], case: str) -> Figure:
    """A panel per tail and mode, a group of bars per map, a bar per variant, in copies of x."""
    panels = groups(rows, "tail", "mode")
    size = (11, 1 + 3.2 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, ((tail, mode), members) in zip(axes[:, 0], panels.items(), strict=True):
        names = [name for name in VARIANTS if any(name in row["variants"] for row in members)]
        for place, name in enumerate(names):
            found = [(k, row["variants"][name]) for k, row in enumerate(members) if name in row["variants"]]
            lefts = [k + 0.8 * place / len(names) for k, _ in found]
            heights = [variant["clone_equivalents"] for _, variant in found]
            label, colour, _ = VARIANTS[name]
            axis.bar(lefts, heights, 0.8 / len(names), color=colour, label=label)
        labels = [f"{row['name'].split('-')[0]}\n{row['layout']} {row['dtype']}" for row in members]
        axis.set_xticks([k + 0.4 for k in range(len(members))], labels, fontsize=5)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{TAILS[tail]}, {MODES[mode].lower()}", fontsize=9)
        axis.set_ylabel("time, in copies of x", fontsize=8)
        axis.legend(fontsize=7)
    figure.suptitle(f"Large maps\n{case}", fontsize=11)
    return figure
