"""What a conversion did and did not do, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Row(NamedTuple):
    path: str
    """of the module in the model ("" is the model itself)"""
    kind: str
    """its class"""
    shape: str
    """of an SE block: channels → squeezed width; of a depthwise convolution: channels × kernel"""
    outcome: str
    """what was done, or why nothing was"""


@dataclass
class ConversionReport:
    """What `convert` did. Prints as a table.

    Attributes:
        converted: a Row for each module that has a fused forward now: SE blocks, batch norms with an activation inside,
            and the modules in whose forward neighbours are fused.
        skipped: a Row for each module that could have been one, with the reason why it is not.
        verified: the largest difference that verify=True found, relative to the largest value; None if nothing was
            compared.
    """

    converted: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    verified: float | None = None
    message: str = ""

    def __str__(self) -> str:
        parts = [self.message] if self.message else []
        if self.converted:
            parts.append(table("converted", self.converted))
        if self.skipped:
            parts.append(table("left as it was", self.skipped))
        if self.verified is not None:
            parts.append(
                f"largest difference of outputs and gradients, relative to the largest value: {self.verified:.1e}"
            )
        return "\n\n".join(parts)


def table(title: str, rows: Sequence[Row]) -> str:
    """The rows below each other, in columns."""
    cells = [("path", "class", "shape", title), *((row.path or "(the model)", *row[1:]) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]) for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
