"""Pieces of Markdown that the tables share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MODES = {
    "inference": "inference",
    "train": "forward + backward",
    "grad_input": "gradient of the input",
    "grad_weight": "gradient of the weights",
}
ABSENT = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """`align` has l for a column of words and r for one of numbers; its last letter goes for all that follow."""
    letters = align.ljust(len(head), align[-1])
    rule = "|" + "".join({"l": "---|", "r": "---:|"}[letter] for letter in letters)
    return "\n".join([_line(head), rule, *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def number(value: float | None, digits: int = 2) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"
