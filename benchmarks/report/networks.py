"""The tables of what SE costs in whole networks, as it is and with se_ext."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.markdown import ABSENT, number, table
from benchmarks.summary import AS_IS, FUSED_NETWORK, INPLACE, OURS, WITHOUT, Row, paired_ratio

MODES = {"inference": "inference", "train": "training step"}


def network_table(rows: Sequence[Row]) -> str:
    title = (
        "What SE costs in a whole network: its time minus that of the same network without SE blocks, paired round by "
        "round, as median (p10 to p90) in ms; and se_ext's cost as a part of what it was:"
    )
    head = ["network", "mode", "batch", "layout", "as it is ms", "without SE ms"]
    head += ["SE costs", "se_ext costs", "se_ext in place costs", "ratio", "ratio in place"]
    return f"{title}\n\n{table(head, map(_line, rows), 'llrlr')}"


def fused_table(rows: Sequence[Row]) -> str:
    """The networks that se_ext has itself; empty where none was measured."""
    lines: list[list[object]] = []
    for row in rows:
        if FUSED_NETWORK in row["variants"]:
            theirs, ours = (row["variants"][name] for name in (AS_IS, FUSED_NETWORK))
            peaks = [row["peak_bytes"][name] / 2**20 for name in (AS_IS, FUSED_NETWORK)]
            times = [number(variant["time_us"]["median"] / 1e3, 0) for variant in (theirs, ours)]
            speedup = with_spread(paired_ratio(theirs["samples_us"], ours["samples_us"]))
            cells = [*(number(peak, 0) for peak in peaks), number(peaks[1] / peaks[0])]
            lines.append([row["name"], row["batch"], row["layout"], *times, speedup, *cells])
    head = ["network", "batch", "layout", "timm ms", "se_ext.models ms", "speedup"]
    head += ["timm MB", "se_ext.models MB", "ratio"]
    title = "A training step of whole networks, timm's and se_ext.models', and the most memory that tensors hold in it:"
    return f"{title}\n\n{table(head, lines, 'lrlr')}" if lines else ""


def with_spread(found: dict[str, float], digits: int = 2, scale: float = 1) -> str:
    """The median, and in parentheses p10 to p90."""
    median, low, high = (number(found[key] / scale, digits) for key in ("median", "p10", "p90"))
    return f"{median} ({low} to {high})"


def _line(row: Row) -> list[object]:
    times = [number(row["variants"][name]["time_us"]["median"] / 1e3, 1) for name in (AS_IS, WITHOUT)]
    costs = [_cost(row["cost_us"].get(name)) for name in (AS_IS, OURS, INPLACE)]
    ratios = [number(row["cost_ratio"].get(name)) for name in (OURS, INPLACE)]
    mode = MODES[row["mode"]]
    return [row["name"], mode, row["batch"], row["layout"], *times, *costs, *ratios]


def _cost(cost_us: dict[str, float] | None) -> str:
    return ABSENT if cost_us is None else with_spread(cost_us, 1, 1e3)
