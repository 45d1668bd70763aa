"""The tables of whole networks as a user runs them: without and with se_ext, eager and compiled."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.markdown import ABSENT, number, table
from benchmarks.report.networks import MODES, with_spread
from benchmarks.summary import Row, paired_ratio, summarize

FORMS = {"eager": "eager", "compile": "compiled"}
# The block's rows in the README, of those at this batch.
BATCH = 8
BLOCK_MODES = {"inference": "inference", "train": "forward + backward"}


def speedup_table(networks: Sequence[Row], blocks: Sequence[Row]) -> str:
    """For the README: at most eight rows in a user's terms. The block's are geometric means."""
    lines = [
        [row["name"], MODES[row["mode"]], *(cell for form in FORMS for cell in _times_and_speedup(row, form))]
        for row in networks
    ]
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


def _times_and_speedup(row: Row, form: str) -> list[str]:
    theirs, ours = (row["variants"][name] for name in (form, f"{form}_se_ext"))
    times = [number(variant["time_us"]["median"] / 1e3, 0) for variant in (theirs, ours)]
    ratio = paired_ratio(theirs["samples_us"], ours["samples_us"])
    return [f"{times[0]} → {times[1]} ms", f"{number(ratio['median'])}×"]


def _geometric_mean(rows: Sequence[Row], baseline: str) -> str:
    found = summarize(rows, baseline)
    return ABSENT if found is None else f"{number(found['geomean'])}×"


def whole_network_table(rows: Sequence[Row]) -> str:
    """Every time and speedup with its spread."""
    lines: list[list[object]] = []
    for row in rows:
        cells = []
        for form in FORMS:
            theirs, ours = (row["variants"][name] for name in (form, f"{form}_se_ext"))
            cells += [with_spread(variant["time_us"], 1, 1e3) for variant in (theirs, ours)]
            cells.append(with_spread(paired_ratio(theirs["samples_us"], ours["samples_us"])))
        size = f"{row['image_size']}×{row['image_size']}"
        lines.append([row["name"], MODES[row["mode"]], row["batch"], size, *cells])
    head = ["network", "what", "batch", "image"]
    for title in FORMS.values():
        head += [f"{title} ms", f"{title} with se_ext ms", "speed-up"]
    title = (
        "Whole networks without and with se_ext, as median (p10 to p90); a speed-up is the median of the ratios round "
        "by round:"
    )
    return f"{title}\n\n{table(head, lines, 'llr')}"
