"""The table of whole networks before and after se_ext.convert."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.markdown import ABSENT, number, table
from benchmarks.report.networks import MODES, with_spread
from benchmarks.report.whole_networks import FORMS, speedup
from benchmarks.summary import CONVERTED, EAGER, PLAIN, Row

# ---- what follows from a row; None where it was not measured ----


def peak_ratio(row: Row) -> float | None:
    """The peak memory of the converted network's training step over that of the plain one's."""
    peaks = row.get("peak_bytes")
    return None if peaks is None else peaks[EAGER + CONVERTED] / peaks[EAGER + PLAIN]


# ---- the table ----


def converted_table(rows: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for row in rows:
        cells = [cell for form in FORMS for cell in _times_and_speedup(row, form)]
        lines.append(
            [row["name"], MODES[row["mode"]], row["batch"], row["layout"], *cells, *_peaks(row), _conversion(row)]
        )
    head = ["network", "what", "batch", "layout"]
    for title in FORMS.values():
        head += [f"{title}: plain → converted ms", "speed-up"]
    head += ["peak: plain → converted MB", "ratio", "conversion ms"]
    title = (
        "Whole networks of timm before and after `se_ext.convert`. A speed-up is the median of the ratios round by "
        "round, with p10 to p90 in parentheses; the peak is the most memory that tensors hold in a training step; the "
        "conversion is the first in its process:"
    )
    return f"{title}\n\n{table(head, lines, 'llrlr')}"


def _times_and_speedup(row: Row, form: str) -> list[str]:
    found = speedup(row, form, CONVERTED)
    if found is None:
        return [ABSENT, ABSENT]
    times = [number(row["variants"][form + change]["time_us"]["median"] / 1e3, 1) for change in (PLAIN, CONVERTED)]
    return [" → ".join(times), with_spread(found)]


def _peaks(row: Row) -> list[str]:
    if "peak_bytes" not in row:
        return [ABSENT, ABSENT]
    peaks = [number(row["peak_bytes"][EAGER + change] / 2**20, 0) for change in (PLAIN, CONVERTED)]
    return [" → ".join(peaks), number(peak_ratio(row))]


def _conversion(row: Row) -> str:
    return number(1e3 * row["conversion_s"], 0)
