"""The project's targets for two CPU cores, and what the results files say of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import allocator
from markdown_table import ABSENT, number, table
from summary import AS_IS, FUSED_NETWORK, OURS, WITHOUT, Row, over, paired_ratio

Measured = dict[str, list[Row]]

LARGE_SLAB_BYTES = 1_000_000  # of one float32 sample
LARGE_SLAB_VALUES = 100_000


@dataclass(frozen=True)
class Found:
    """The rows that a target speaks of, each with its value, and what of the target nobody measured."""

    values: list[tuple[float, Row]]
    missing: list[str] = field(default_factory=list)


def geometric_mean(found: Found) -> float:
    return statistics.geometric_mean(value for value, _ in found.values)


def least(found: Found) -> float:
    return min(value for value, _ in found.values)


def ratio_of_costs(found: Found) -> float:
    """What the SE blocks of all networks cost with se_ext over what they cost as they are, each relative to the time
    without any. A mean of the ratios would be decided by the networks where SE costs next to nothing."""
    theirs = [
        row["cost_us"][AS_IS]["median"] / row["variants"][WITHOUT]["time_us"]["median"] for _, row in found.values
    ]
    ours = [ratio * cost for (ratio, _), cost in zip(found.values, theirs, strict=True)]
    return sum(ours) / sum(theirs)


@dataclass(frozen=True)
class Target:
    """What is required and what is aimed at of one number, `combine` of the values that `find` finds."""

    title: str
    required: float
    aim: float
    find: Callable[[Measured], Found]
    combine: Callable[[Found], float] = geometric_mean
    at_least: bool = True

    def reached(self, value: float, goal: float) -> bool:
        return value >= goal if self.at_least else value <= goal

    def worst(self, found: Found) -> float:
        return (min if self.at_least else max)(value for value, _ in found.values)


def speedups(mode: str, dtype: str, *batches: int) -> Callable[[Measured], Found]:
    """Speedups over the better of eager and compile."""

    def find(measured: Measured) -> Found:
        rows = [row for batch in batches for row in _blocks(measured, mode, dtype, batch)]
        return Found(
            [(value, row) for row in rows if (value := over(row, "better")) is not None], _missing(batches, rows)
        )

    return find


def clone_equivalents(*batches: int) -> Callable[[Measured], Found]:
    """se_ext's time over that of x.clone() in float32 inference, where a sample has LARGE_SLAB_VALUES and more."""

    def find(measured: Measured) -> Found:
        rows = [row for batch in batches for row in _blocks(measured, "inference", "float32", batch)]
        large = [row for row in rows if slab_values(row) >= LARGE_SLAB_VALUES]
        return Found([(row["variants"][OURS]["clone_equivalents"], row) for row in large], _missing(batches, large))

    return find


def half_over_float(batch: int) -> Callable[[Measured], Found]:
    """se_ext's bfloat16 time over its float32 time in inference, for slabs of LARGE_SLAB_BYTES and more."""

    def find(measured: Measured) -> Found:
        half, single = (
            {(row["name"], row["layout"]): row for row in _blocks(measured, "inference", dtype, batch)}
            for dtype in ("bfloat16", "float32")
        )
        large = [key for key, row in half.items() if key in single and slab_bytes(row) >= LARGE_SLAB_BYTES]
        return Found([(_our_time(half[key]) / _our_time(single[key]), half[key]) for key in large])

    return find


def in_place_over_eager(measured: Measured) -> Found:
    """Speedups of se_ext in place over the best eager form on large inputs, nothing set for the allocator."""
    rows = [row for row in measured.get("allocators", []) if row["environment"] == allocator.DEFAULT]
    return Found([(value, row) for row in rows if (value := over(row, "best_eager", "speedup_inplace")) is not None])


def cost_ratios(measured: Measured) -> Found:
    """What SE costs with se_ext over what it costs as it is, in whole networks."""
    rows = [(row["cost_ratio"][OURS], row) for row in measured.get("networks", [])]
    known = [(ratio, row) for ratio, row in rows if ratio is not None]
    drowned = len(rows) - len(known)
    return Found(known, [f"{drowned} rows whose cost drowns in noise"] if drowned else [])


def tail_speedups(tail: str) -> Callable[[Measured], Found]:
    """Speedups over the better of eager and compile of a block with what stands around it."""

    def find(measured: Measured) -> Found:
        rows = [row for row in measured.get("tails", []) if row["tail"] == tail and row["batch"] == 8]
        return Found([(over(row, "better"), row) for row in rows])

    return find


def _fused_networks(measured: Measured) -> list[Row]:
    return [row for row in measured.get("networks", []) if FUSED_NETWORK in row["variants"]]


def step_speedups(measured: Measured) -> Found:
    """A training step of timm's network over that of se_ext.models'."""

    def speedup(row: Row) -> float:
        theirs, ours = (row["variants"][name]["samples_us"] for name in (AS_IS, FUSED_NETWORK))
        return paired_ratio(theirs, ours)["median"]

    return Found([(speedup(row), row) for row in _fused_networks(measured)])


def step_memory(measured: Measured) -> Found:
    """The peak memory of that step over that of timm's."""
    return Found(
        [(row["peak_bytes"][FUSED_NETWORK] / row["peak_bytes"][AS_IS], row) for row in _fused_networks(measured)]
    )


def slab_values(row: Row) -> int:
    block = row["workload"]
    return block["channels"] * block["height"] * block["width"]


def slab_bytes(row: Row) -> int:
    """Bytes of one sample, were it float32."""
    return 4 * slab_values(row)


def _our_time(row: Row) -> float:
    return row["variants"][OURS]["time_us"]["median"]


def _blocks(measured: Measured, mode: str, dtype: str, batch: int) -> list[Row]:
    wanted = {"device": "cpu", "mode": mode, "dtype": dtype, "batch": batch}
    return [row for row in measured.get("blocks", []) if wanted.items() <= row.items()]


def _missing(batches: Sequence[int], rows: Sequence[Row]) -> list[str]:
    return [f"batch {batch}" for batch in batches if all(row["batch"] != batch for row in rows)]


INFERENCE, TRAIN = "inference", "train"
TARGETS = (
    Target("inference, batch 1, over the better", 2.5, 4, speedups(INFERENCE, "float32", 1)),
    Target("inference, batch 8, over the better", 2.5, 3.5, speedups(INFERENCE, "float32", 8)),
    Target("inference, batch 32, over the better", 1.7, 2.2, speedups(INFERENCE, "float32", 32)),
    Target("… worst single row of these", 1.1, 1.3, speedups(INFERENCE, "float32", 1, 8, 32), least),
    Target("forward + backward, batch 8 and 32, over the better", 2.2, 3, speedups(TRAIN, "float32", 8, 32)),
    Target("… worst single row of these", 1.2, 1.5, speedups(TRAIN, "float32", 8, 32), least),
    Target("bfloat16 inference, batch 8, over the better", 2.5, 4, speedups(INFERENCE, "bfloat16", 8)),
    Target(
        "bfloat16 time over float32 time, slabs of 1 MB and more, batch 8",
        0.7,
        0.55,
        half_over_float(8),
        at_least=False,
    ),
    Target("inference in place on more than 64 MB, default allocator, over best eager", 5, 8, in_place_over_eager),
    Target(
        "inference in clones, C·P of 100k and more, batch 8 and 32", 1.6, 1.2, clone_equivalents(8, 32), at_least=False
    ),
    Target(
        "what SE costs in a network, over what it costs as it is",
        0.5,
        0.3,
        cost_ratios,
        ratio_of_costs,
        at_least=False,
    ),
    Target(
        "batch norm + SE + shortcut + ReLU, forward + backward, over the better",
        4,
        6,
        tail_speedups("bn_se_residual_relu"),
    ),
    Target("batch norm + SiLU + SE, forward + backward, over the better", 3, 5, tail_speedups("bn_silu_se")),
    Target("bias + SiLU + SE, inference, over the better", 2.5, 4, tail_speedups("bias_silu_se")),
    Target("training step of SE-ResNet-50, over timm's", 1.15, 1.3, step_speedups),
    Target("peak memory of that step, over timm's", 0.85, 0.7, step_memory, at_least=False),
)


def verdict(target: Target, found: Found) -> str:
    """Missed, met, or aim reached; "so far" where a part of the target was not measured."""
    if not found.values:
        return "not measured"
    value = target.combine(found)
    if not target.reached(value, target.required):
        return "✗ **missed**"
    reached = "✓ aim reached" if target.reached(value, target.aim) else "✓ met"
    return f"{reached} so far" if found.missing else reached


def target_table(measured: Measured) -> str:
    head = ["target", "required", "aim", "measured", "worst row", "rows", "verdict"]
    title = (
        "Targets on two cores, float32 where nothing else is said; geometric means over the workloads in both layouts, "
        "what SE costs in a network: the ratio of the summed costs, each as a part of its network's time without SE:"
    )
    return f"{title}\n\n{table(head, [_line(target, target.find(measured)) for target in TARGETS], 'lrrrrrl')}"


def _line(target: Target, found: Found) -> list[object]:
    sign = "≥" if target.at_least else "≤"
    goals = [f"{sign} {goal:g}" for goal in (target.required, target.aim)]
    value = target.combine(found) if found.values else None
    worst = target.worst(found) if found.values else None
    without = f" (not measured: {', '.join(found.missing)})" if found.values and found.missing else ""
    rows = len(found.values) or ABSENT
    return [target.title, *goals, number(value), number(worst), rows, verdict(target, found) + without]


def rows_below(measured: Measured) -> list[tuple[Target, list[Row]]]:
    """For each target of a worst single row: the rows that miss what is required of every row."""
    found = []
    for target in TARGETS:
        if target.combine is least:
            values = target.find(measured).values
            found.append((target, [row for value, row in values if not target.reached(value, target.required)]))
    return found
