"""The tables of whole networks as a user runs them: without and with se_ext, eager, compiled and in other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.report.markdown import ABSENT, number, table
from benchmarks.report.networks import MODES, with_spread
from benchmarks.summary import (
    BARE,
    COMPILED,
    CONVERTED,
    EAGER,
    ONLY_BLOCKS,
    ONNX_RUNTIME,
    OPENVINO,
    PLAIN,
    WITH,
    Row,
    paired_difference,
    paired_ratio,
    summarize,
)

FORMS = {EAGER: "eager", COMPILED: "compiled"}
RUNTIMES = {ONNX_RUNTIME: "ONNX Runtime", OPENVINO: "OpenVINO"}
# The README's rows, of networks and of the block, are those at this batch.
BATCH = 8
BLOCK_MODES = {"inference": "inference", "train": "forward + backward"}

Spread = dict[str, float] | None
# How a table shows a number that has a spread: with so many digits, divided by a scale.
Show = Callable[[Spread, int, float], str]


# ---- what follows from a row; None where a variant of it was not timed ----


def ratio(row: Row, numerator: str, denominator: str) -> Spread:
    """Of the times of two variants, round by round."""
    found = [row["variants"].get(name) for name in (numerator, denominator)]
    return None if None in found else paired_ratio(*(variant["samples_us"] for variant in found))


def speedup(row: Row, form: str, change: str = WITH) -> Spread:
    return ratio(row, form + PLAIN, form + change)


def compiled_cost(row: Row, change: str) -> Spread:
    """What the SE blocks cost in the compiled network, in microseconds: its time minus that without any."""
    found = [row["variants"].get(COMPILED + name) for name in (change, BARE)]
    return None if None in found else paired_difference(*(variant["samples_us"] for variant in found))


def compiled_cost_ratio(row: Row) -> float | None:
    """What they cost with se_ext over what they cost as they are; None also where the latter drowns in noise."""
    theirs, ours = (compiled_cost(row, change) for change in (PLAIN, WITH))
    return ours["median"] / theirs["median"] if theirs and ours and theirs["median"] > 0 else None


def relative_compiled_cost(row: Row) -> float:
    """What they cost as they are, as a part of the time without any; of a row that has the ratio above."""
    cost = compiled_cost(row, PLAIN)
    assert cost is not None
    without: float = row["variants"][COMPILED + BARE]["time_us"]["median"]
    return cost["median"] / without


def compiled_times(row: Row) -> str:
    """In words: what of a compiled network's time is SE, without and with se_ext."""
    words = {PLAIN: "", WITH: " with se_ext", BARE: " without SE"}
    times = [
        f"{show} ms{what}"
        for change, what in words.items()
        if (show := median(_time(row, COMPILED + change), 1, 1e3)) != ABSENT
    ]
    return f"batch {row['batch']}: {', '.join(times)}"


# ---- the README's table ----


def speedup_table(networks: Sequence[Row], blocks: Sequence[Row]) -> str:
    """In a user's terms. The block's rows are geometric means. A network with se_ext is a converted one, in rows that
    have one."""
    lines = []
    for row in networks:
        change = CONVERTED if EAGER + CONVERTED in row["variants"] else WITH
        cells = [cell for form in FORMS for cell in _times_and_speedup(row, form, change)]
        lines.append([row["name"], MODES[row["mode"]], *cells])
    same = [row for row in blocks if (row["batch"], row["dtype"], row["device"]) == (BATCH, "float32", "cpu")]
    for mode, words in BLOCK_MODES.items():
        members = [row for row in same if row["mode"] == mode]
        if members:
            bold = [_geometric_mean(members, baseline) for baseline in ("best_eager", "best_compile")]
            lines.append([f"the block alone, {len(members)} cases", words, ABSENT, bold[0], ABSENT, bold[1]])
    head = ["network", "what"]
    for title in FORMS.values():
        head += [f"{title}: without → with", "speed-up"]
    return table(head, lines, "llr")


def _times_and_speedup(row: Row, form: str, change: str) -> list[str]:
    found = speedup(row, form, change)
    if found is None:
        return [ABSENT, ABSENT]
    times = [number(row["variants"][form + name]["time_us"]["median"] / 1e3, 0) for name in (PLAIN, change)]
    return [f"{times[0]} → {times[1]} ms", f"{number(found['median'])}×"]


def _geometric_mean(rows: Sequence[Row], baseline: str) -> str:
    found = summarize(rows, baseline)
    return ABSENT if found is None else f"{number(found['geomean'])}×"


# ---- all rows ----


def whole_network_tables(rows: Sequence[Row]) -> str:
    """For the page of all experiments."""
    return _tables(rows, median)


def whole_network_spreads(rows: Sequence[Row]) -> str:
    """For the page of every row."""
    return f"Each number is a median, with p10 to p90 in parentheses.\n\n{_tables(rows, spread)}"


def median(found: Spread, digits: int = 2, scale: float = 1) -> str:
    return number(None if found is None else found["median"] / scale, digits)


def spread(found: Spread, digits: int = 2, scale: float = 1) -> str:
    return ABSENT if found is None else with_spread(found, digits, scale)


def _tables(rows: Sequence[Row], show: Show) -> str:
    """Without and with se_ext; what SE costs in the compiled networks; other runtimes beside them."""
    return "\n\n".join(filter(None, [make(rows, show) for make in (_speedups, _costs, _runtimes)]))


def _speedups(rows: Sequence[Row], show: Show) -> str:
    lines: list[list[object]] = []
    for row in rows:
        cells = []
        for form in FORMS:
            cells += [show(_time(row, form + change), 1, 1e3) for change in (PLAIN, WITH)]
            cells += [show(speedup(row, form, change), 2, 1) for change in (WITH, ONLY_BLOCKS)]
        lines.append([*_what(row), *cells])
    head = list(WHAT)
    for title in FORMS.values():
        head += [f"{title} ms", f"{title} with se_ext ms", "speed-up", "of the blocks only"]
    title = (
        "Whole networks without and with se_ext; a speed-up is the median of the ratios round by round. Of the blocks "
        "only: where se_ext.models has the network, the speed-up of timm's network with se_ext's blocks:"
    )
    return f"{title}\n\n{table(head, lines, 'llr')}"


def _costs(rows: Sequence[Row], show: Show) -> str:
    """Empty where no compiled network without SE was timed."""
    lines: list[list[object]] = []
    for row in rows:
        if COMPILED + BARE in row["variants"]:
            costs = [show(compiled_cost(row, change), 1, 1e3) for change in (PLAIN, WITH, ONLY_BLOCKS)]
            lines.append(
                [*_what(row), show(_time(row, COMPILED + BARE), 1, 1e3), *costs, number(compiled_cost_ratio(row))]
            )
    head = [*WHAT, "without SE ms", "SE costs ms", "with se_ext ms", "with its blocks only ms", "ratio"]
    title = (
        "What SE costs in the compiled networks: the time minus that of the compiled network without SE blocks, paired "
        "round by round; and its cost with se_ext as a part of what it was:"
    )
    return f"{title}\n\n{table(head, lines, 'llr')}" if lines else ""


def _runtimes(rows: Sequence[Row], show: Show) -> str:
    """Empty where no other runtime was timed."""
    lines: list[list[object]] = []
    for row in rows:
        if any(name in row["variants"] for name in RUNTIMES):
            cells = []
            for name in RUNTIMES:
                cells += [show(_time(row, name), 1, 1e3), show(ratio(row, name, COMPILED + PLAIN), 2, 1)]
            ours = ratio(row, COMPILED + WITH, COMPILED + PLAIN)
            lines.append([*_what(row), show(_time(row, COMPILED + PLAIN), 1, 1e3), show(ours, 2, 1), *cells])
    head = [*WHAT, "compiled ms", "with se_ext: over it"]
    for title in RUNTIMES.values():
        head += [f"{title} ms", "over compiled"]
    title = "timm's network in other runtimes, and their times over that of timm's network compiled (below 1: faster):"
    return f"{title}\n\n{table(head, lines, 'llr')}" if lines else ""


WHAT = ("network", "what", "batch", "image")


def _what(row: Row) -> list[object]:
    return [row["name"], MODES[row["mode"]], row["batch"], f"{row['image_size']}×{row['image_size']}"]


def _time(row: Row, variant: str) -> Spread:
    found = row["variants"].get(variant)
    return None if found is None else found["time_us"]
