"""What an experiment hands to the session: cases, each of which measures one row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure.timing import Plan
from benchmarks.summary import Row


class WrongResult(ValueError):
    """A variant disagrees with the float64 formula; it is not timed."""


class Case(ABC):
    """One row of a results file; a dataclass, whose fields name it in the progress."""

    into = "rows"

    def __str__(self) -> str:
        return " ".join(map(str, vars(self).values()))

    @property
    def kind(self) -> str:
        """What is counted where the budget of time does not reach the case."""
        return type(self).__name__

    @abstractmethod
    def measure(self, plan: Plan) -> Row:
        """Raises WrongResult rather than time a wrong kernel."""

    def fallback(self) -> Case | None:
        """What to measure instead where this fails and the experiment goes on."""
        return None


@dataclass(frozen=True)
class Work:
    """The cases in the order of their rows, and what the results file says besides."""

    cases: Sequence[Case]
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
