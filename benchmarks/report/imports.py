"""What is said of the import of se_ext."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.networks import with_spread
from benchmarks.summary import IMPORT, Row


def import_lines(rows: Sequence[Row]) -> str:
    """One line per package."""
    title = "The import of a package after that of torch, in fresh processes, as median (p10 to p90):"
    lines = "\n".join(
        f"- `{row['name']}`: {with_spread(row['variants'][IMPORT]['time_us'], 1, 1e3)} ms" for row in rows
    )
    return f"{title}\n\n{lines}"
