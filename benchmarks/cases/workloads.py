"""The SE blocks of real networks, read from workloads.csv."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

CSV = Path(__file__).with_name("workloads.csv")
SKIP_REASON = "hidden = 0: ESE, one C -> C layer instead of two; se_ext has no module for it"


@dataclass(frozen=True)
class Use:
    """Where a workload occurs: `count` times per forward pass of `model`."""

    model: str
    module: str
    count: int


@dataclass(frozen=True)
class Workload:
    """One SE block shape; the same shape in several networks is one workload with several uses."""

    channels: int
    height: int
    width: int
    hidden: int
    activation: str
    gate: str
    uses: tuple[Use, ...]

    @property
    def name(self) -> str:
        shape = f"{self.channels}x{self.height}x{self.width}"
        return f"{shape}-m{self.hidden}-{self.activation}-{self.gate}".lower()

    def __str__(self) -> str:
        return self.name

    @property
    def points(self) -> int:
        return self.height * self.width

    def matches(self, text: str) -> bool:
        """True if `text` is part of the workload's name or of the name of a network that has it."""
        return any(text.lower() in label.lower() for label in (self.name, *(use.model for use in self.uses)))


def read_workloads(path: Path = CSV) -> tuple[list[Workload], list[Workload]]:
    """Returns (workloads to time, workloads skipped for SKIP_REASON), each shape once, in file order."""
    uses: dict[tuple[int, int, int, int, str, str], list[Use]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            channels, height, width, hidden = (int(row[k]) for k in ("channels", "height", "width", "hidden"))
            key = (channels, height, width, hidden, row["activation"], row["gate"])
            uses.setdefault(key, []).append(Use(row["model"], row["module"], int(row["count"])))
    workloads = [Workload(*key, uses=tuple(found)) for key, found in uses.items()]
    return [w for w in workloads if w.hidden > 0], [w for w in workloads if w.hidden == 0]
