"""Interleaved timing: A B C, B C A, C A B, ... in blocks long enough for the clock."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Step = Callable[[], object]

# Untimed calls before every block. Each variant's output lies elsewhere in memory, and the first calls after a turn
# fetch it from far memory while the others' leave the cache: without a lead-in that, not the kernels, decides between
# variants whose blocks are a few calls long.
LEAD_IN_CALLS = 3


@dataclass(frozen=True)
class Plan:
    """How long to measure: `rounds` blocks per variant, each of at least `block_ms` or one call, after a lead-in."""

    rounds: int = 20
    block_ms: float = 5.0
    warmup_ms: float = 20.0
    lead_in_calls: int = LEAD_IN_CALLS


@dataclass(frozen=True)
class Samples:
    """Time per call, one value per round; page faults per call over all rounds."""

    calls_per_block: int
    time_us: list[float]
    page_faults_per_call: float

    def recorded(self) -> dict[str, Any]:
        """As a results file keeps them."""
        return {
            "samples_us": [round(t, 3) for t in self.time_us],
            "calls_per_block": self.calls_per_block,
            "page_faults_per_call": round(self.page_faults_per_call, 4),
        }


class OtherLoad:
    """How much of the CPUs other programs, but for those that this one started and that ended, used since this was
    made: where threads meet at barriers, one busy neighbour turns microseconds into milliseconds."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """0 to 1 of the time of all CPUs, or None where /proc/stat does not tell."""
        if self._start is None:
            return None
        now = self._now()
        assert now is not None, "/proc/stat told before"
        wall, others = (after - before for after, before in zip(now, self._start, strict=True))
        return round(max(0.0, others / (wall * (os.cpu_count() or 1))), 3)

    @staticmethod
    def _now() -> tuple[float, float] | None:
        try:
            words = Path("/proc/stat").read_text().split(maxsplit=9)
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in words[1:9])
        busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), busy_s - time.process_time() - ended.ru_utime - ended.ru_stime


def do_nothing() -> None:
    """A CPU's synchronize."""


def interleave(
    steps: Mapping[str, Step], plan: Plan, synchronize: Callable[[], None] = do_nothing
) -> dict[str, Samples]:
    """Times the steps in turn; block r of one variant is paired in time with block r of every other."""
    calls = {name: _warm_up(step, plan, synchronize) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    faults = dict.fromkeys(steps, 0)
    names = list(steps)
    gc.collect()
    gc.disable()
    try:
        for turn in range(plan.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                _time_block(steps[name], plan.lead_in_calls, synchronize)
                before = _minor_faults()
                times[name].append(_time_block(steps[name], calls[name], synchronize) / calls[name] / 1e3)
                faults[name] += _minor_faults() - before
    finally:
        gc.enable()
    return {name: Samples(calls[name], times[name], faults[name] / (calls[name] * plan.rounds)) for name in names}


def recorded(
    steps: Mapping[str, Step], plan: Plan, synchronize: Callable[[], None] = do_nothing
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """The samples of every step as a results file keeps them, and the part of the CPUs that other programs used
    meanwhile. Each step is called once before: that call may compile, in other processes, which is no disturbance."""
    for step in steps.values():
        step()
    load = OtherLoad()
    samples = interleave(steps, plan, synchronize)
    return {name: found.recorded() for name, found in samples.items()}, load.share()


def _warm_up(step: Step, plan: Plan, synchronize: Callable[[], None]) -> int:
    """Calls the step (the first call may compile) until it is warm; returns how many calls make a block."""
    _time_block(step, plan.lead_in_calls, synchronize)
    calls = 1
    end = time.perf_counter_ns() + plan.warmup_ms * 1e6
    while True:
        elapsed_ms = _time_block(step, calls, synchronize) / 1e6
        if elapsed_ms < plan.block_ms:
            calls = max(calls + 1, min(10 * calls, round(1.05 * calls * plan.block_ms / elapsed_ms)))
        elif time.perf_counter_ns() >= end:
            return calls


def _time_block(step: Step, calls: int, synchronize: Callable[[], None]) -> int:
    """Nanoseconds for `calls` calls. `synchronize` waits for the device; it does nothing on a CPU."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        step()
    synchronize()
    return time.perf_counter_ns() - start


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
