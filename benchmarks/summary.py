"""The arithmetic of the benchmark: from samples to ratios, from ratios to one line. No torch needed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

YARDSTICK = "clone"
OURS = "se_ext"
INPLACE = "se_ext_inplace"
# Groups of a GPU's rows: large maps; the networks' blocks; one sample, timed at the host.
LARGE, WORKLOADS, WALL = "large", "workloads", "wall"
AS_IS, WITHOUT = "as_is", "no_se"
FUSED_NETWORK = "se_ext_models"
# A user's network: its form, and what was done to timm's; a variant is called by both.
EAGER, COMPILED = "eager", "compile"
PLAIN, WITH, ONLY_BLOCKS, BARE = "", "_se_ext", "_se_ext_blocks", "_no_se"
CONVERTED = "_converted"
ONNX_RUNTIME, OPENVINO = "onnxruntime", "openvino"
IMPORT = "import"
# Of the block by itself; what stands around it adds to them.
FLOOR_PASSES = {"inference": 2, "train": 5}

Row = dict[str, Any]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "p10": percentile(values, 10),
        "p90": percentile(values, 90),
    }


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios round by round, so that a slow moment of the machine hits both sides."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def paired_difference(minuend: Sequence[float], subtrahend: Sequence[float]) -> dict[str, float]:
    """The spread of the differences round by round."""
    return spread([a - b for a, b in zip(minuend, subtrahend, strict=True)])


def variant_metrics(samples_us: Sequence[float], clone_us: Sequence[float], floor_bytes: int) -> dict[str, Any]:
    time_us = spread(samples_us)
    return {
        "time_us": time_us,
        "clone_equivalents": paired_ratio(samples_us, clone_us)["median"],
        "gb_per_s": floor_bytes / time_us["median"] / 1e3,
    }


def speedups(samples_us: dict[str, Sequence[float]], ours: str = OURS) -> dict[str, Any]:
    """How many times faster `ours` is than each baseline, the best eager and compiled form, and all.

    The better of several baselines is the one over which the median of se_ext's speedup is smallest.
    """
    baselines = [name for name in samples_us if name not in (YARDSTICK, OURS, INPLACE)]
    over: dict[str, Any] = {name: paired_ratio(samples_us[name], samples_us[ours]) for name in baselines}

    def hardest(names: Iterable[str]) -> dict[str, Any] | None:
        name = min(names, key=lambda n: over[n]["median"], default=None)
        return None if name is None else {**over[name], "baseline": name}

    return {
        **over,
        "best_eager": hardest(name for name in baselines if name.startswith("eager")),
        "best_compile": hardest(name for name in baselines if name.startswith("compile")),
        "better": hardest(baselines),
    }


def add_metrics(row: Row) -> Row:
    """Fills in what follows from the samples of a row: per variant, and the speedups."""
    samples = {name: variant["samples_us"] for name, variant in row["variants"].items()}
    for name, variant in row["variants"].items():
        passes = 2 if name == YARDSTICK else FLOOR_PASSES[row["mode"]]
        variant.update(variant_metrics(samples[name], samples[YARDSTICK], passes * row["bytes_x"]))
    row["speedup"] = speedups(samples)
    if INPLACE in samples:
        row["speedup_inplace"] = speedups(samples, INPLACE)
    return row


def add_times(row: Row) -> Row:
    """Fills in the time per variant."""
    for variant in row["variants"].values():
        variant["time_us"] = spread(variant["samples_us"])
    return row


def add_speeds(row: Row) -> Row:
    """Fills in what follows from the samples of a row that says how many floating-point operations its pass has, or
    None: the time per variant, in clones, in operations per second, and the speedups."""
    samples = {name: variant["samples_us"] for name, variant in add_times(row)["variants"].items()}
    for name, variant in row["variants"].items():
        variant["clone_equivalents"] = paired_ratio(samples[name], samples[YARDSTICK])["median"]
        if row["operations"] is not None and name != YARDSTICK:
            variant["gflop_per_s"] = row["operations"] / variant["time_us"]["median"] / 1e3
    row["speedup"] = speedups(samples)
    return row


def add_costs(row: Row) -> Row:
    """Fills in what follows from the samples of a network's row: time per variant, and what its SE blocks cost.

    A cost is the time with SE blocks minus the time without any, round by round. cost_ratio is the ratio of the median
    costs, against the network as it is: a ratio round by round would divide by costs near zero. It is None where even
    the median cost of the network as it is drowns in noise.
    """
    add_times(row)
    samples = {name: variant["samples_us"] for name, variant in row["variants"].items()}
    costs = {name: paired_difference(times, samples[WITHOUT]) for name, times in samples.items() if name != WITHOUT}
    theirs = costs[AS_IS]["median"]
    row["cost_us"] = costs
    row["cost_ratio"] = {
        name: cost["median"] / theirs if theirs > 0 else None for name, cost in costs.items() if name != AS_IS
    }
    return row


def over(row: Row, baseline: str, ours: str = "speedup") -> float | None:
    """The median speedup over `baseline`, or None where it was not timed; `ours` is "speedup" or "speedup_inplace"."""
    found = row[ours].get(baseline)
    return None if found is None else found["median"]


def summarize(rows: Sequence[Row], baseline: str, ours: str = "speedup") -> dict[str, float] | None:
    """Minimum, median, geometric mean and maximum of the rows' speedups over `baseline`; None without any."""
    values = [value for row in rows if (value := over(row, baseline, ours)) is not None]
    if not values:
        return None
    return {
        "min": min(values),
        "median": statistics.median(values),
        "geomean": statistics.geometric_mean(values),
        "max": max(values),
    }


def row_key(row: Row) -> tuple[Any, ...]:
    """What tells rows of a kind apart; None for what a kind does not vary."""
    return tuple(row.get(key) for key in ("name", "device", "dtype", "batch", "layout", "mode"))


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `keys`, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
