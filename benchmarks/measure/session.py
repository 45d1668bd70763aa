"""One run of an experiment: cases in, a results file's content out."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.experiments import Experiment
from benchmarks.measure import facts, results_file
from benchmarks.measure.case import Case, WrongResult
from benchmarks.measure.timing import Plan

SAVE_EVERY_S = 10.0


def run(
    experiment: Experiment,
    workload: str = "",
    axes: dict[str, Any] | None = None,
    plan: Plan | None = None,
    quick: bool = False,
    budget_s: float | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures the cases whose workload or network has `workload` in its name; `axes` replaces the experiment's own.

    No row begins after `budget_s` seconds. Raises ValueError where there is nothing to measure. Raises WrongResult, and
    writes nothing, unless the experiment keeps going.
    """
    plan = plan or experiment.plan
    budget_s = experiment.budget_s if budget_s is None else budget_s
    chosen = {**experiment.axes, **(axes or {})}
    work = experiment.work(workload, chosen, quick=quick)
    if not work.cases:
        raise ValueError(f"--workload {workload}: no workload and no network has this in its name")
    settings = {**asdict(plan), "budget_s": budget_s, "workload": workload, **chosen, "quick": quick}
    results = {**facts.header(experiment, work, settings), "failed": [], "not_reached": {}, "rows": []}
    for note in results["notes"]:
        print(note, file=sys.stderr)
    _measure(work.cases, experiment.keep_going, plan, budget_s, results, out)
    if out:
        results_file.save(results, out)
    return results


def _measure(
    cases: Sequence[Case],
    keep_going: bool,
    plan: Plan,
    budget_s: float | None,
    results: dict[str, Any],
    out: Path | None,
) -> None:
    """Fills in the rows. An experiment that keeps going writes them every few seconds: what is measured is kept,
    however the run ends."""
    start = saved = time.monotonic()
    left: Counter[str] = Counter()
    for number, case in enumerate(cases, 1):
        seconds = time.monotonic() - start
        if budget_s is not None and seconds > budget_s:
            left[case.kind] += 1
            results["not_reached"] = dict(left)
            continue
        print(f"{seconds:6.1f} s  {number}/{len(cases)}  {case}", file=sys.stderr, flush=True)
        if not keep_going:
            results[case.into].append(case.measure(plan))
            continue
        before = len(results[case.into])
        results["failed"] += _measure_if_it_works(case, plan, results)
        for row in results[case.into][before:]:
            print(f"          {_told(row)}", file=sys.stderr, flush=True)
        if out and time.monotonic() - saved > SAVE_EVERY_S:
            saved = time.monotonic()
            results_file.save(results, out)


def _told(row: dict[str, Any]) -> str:
    """The times of a row in a line, or what else it has: all that is left where a run is cut off."""
    times = {name: found.get("time_us") for name, found in row.get("variants", {}).items()} or row.get("time_us", {})
    told = [f"{name} {time['median']:.1f} us" for name, time in times.items() if time]
    if "chosen" in row:
        told.append(f"chosen: {row['chosen']}")
    return ", ".join(told or [f"{key} {value}" for key, value in row.items() if key.startswith("bytes_")])


def _measure_if_it_works(case: Case | None, plan: Plan, results: dict[str, Any]) -> list[str]:
    """Adds the row of the case, or of the first fallback that works. Returns what failed."""
    failed = []
    while case is not None:
        try:
            results[case.into].append(case.measure(plan))
            break
        except Exception as error:  # an experiment that keeps going tells whatever goes wrong, and measures the rest
            kind = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
            failed.append(f"{case}: {kind}{(str(error).splitlines() or [''])[0][:200]}")
            print(f"NOT TIMED: {failed[-1]}", file=sys.stderr, flush=True)
            case = case.fallback()
    return failed
