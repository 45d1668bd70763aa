"""The project's targets, on two CPU cores and on a GPU, and what the results files say of each."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.experiments import GRAD_INPUT, GRAD_WEIGHT, INFERENCE, LAYOUTS, NETWORK_NAMES, OWN_NETWORK, TRAIN
from benchmarks.measure import allocator
from benchmarks.report import converted, depthwise, whole_networks
from benchmarks.report.blocks import TITLES
from benchmarks.report.markdown import ABSENT, MODES, number, table
from benchmarks.summary import (
    AS_IS,
    COMPILED,
    CONVERTED,
    EAGER,
    FUSED_NETWORK,
    IMPORT,
    LARGE,
    OURS,
    WALL,
    WITH,
    WITHOUT,
    WORKLOADS,
    Row,
    over,
    paired_ratio,
)

Measured = dict[str, list[Row]]

LARGE_SLAB_BYTES = 1_000_000  # of one float32 sample
LARGE_SLAB_VALUES = 100_000
# A slab (one sample) that a cluster of eight multiprocessors holds in shared memory.
ON_CHIP_BYTES = 8 * 220 * 1024


@dataclass(frozen=True)
class Found:
    """The rows that a target speaks of, each with its value, and what of the target nobody measured."""

    values: list[tuple[float, Row]]
    missing: list[str] = field(default_factory=list)


Find = Callable[[Measured], Found]


def geometric_mean(found: Found) -> float:
    return statistics.geometric_mean(value for value, _ in found.values)


def ratio_of_costs(relative_cost: Callable[[Row], float]) -> Callable[[Found], float]:
    """What the SE blocks of all networks cost with se_ext over what they cost as they are, each relative to the time
    without any. A mean of the ratios would be decided by the networks where SE costs next to nothing."""

    def ratio(found: Found) -> float:
        theirs = [relative_cost(row) for _, row in found.values]
        ours = [value * cost for (value, _), cost in zip(found.values, theirs, strict=True)]
        return sum(ours) / sum(theirs)

    return ratio


def by_network(found: Found) -> list[Found]:
    """The rows of each network, which differ in their batch."""
    names = dict.fromkeys(row["name"] for _, row in found.values)
    return [Found([(value, row) for value, row in found.values if row["name"] == name]) for name in names]


def slowest_network(found: Found) -> float:
    return min(map(geometric_mean, by_network(found)))


def slowest_row(found: Found) -> float:
    return min(value for value, _ in found.values)


@dataclass(frozen=True)
class Target:
    """What is required and what is aimed at of one number: `combine` of the values that `find` finds, or the worst."""

    title: str
    required: float
    aim: float
    find: Find
    combine: Callable[[Found], float] | None = geometric_mean
    baseline: str = "better"  # of the speedups that a row has; where every row must reach a target, it is named

    @property
    def at_least(self) -> bool:
        """Whether more is better; else less is."""
        return self.aim > self.required

    def reached(self, value: float, goal: float) -> bool:
        return value >= goal if self.at_least else value <= goal

    def worst(self, found: Found) -> float:
        return (min if self.at_least else max)(value for value, _ in found.values)

    def value(self, found: Found) -> float:
        return self.combine(found) if self.combine else self.worst(found)

    def verdict(self, found: Found, absent: str) -> str:
        """Missed, met, or aim reached; "so far" where a part of the target was not measured."""
        if not found.values:
            return absent
        value = self.value(found)
        if not self.reached(value, self.required):
            judged = "✗ **missed**"
        else:
            judged = "✓ aim reached" if self.reached(value, self.aim) else "✓ met"
            judged += " so far" if found.missing else ""
        return judged + (f" (not measured: {', '.join(found.missing)})" if found.missing else "")


WORST = None  # in the place of `combine`


# ---- the rows that a target speaks of ----


def rows(
    kind: str,
    value: Callable[[Row], float | None],
    *batches: int,
    only: Callable[[Row], bool] = lambda row: True,
    **wanted: Any,
) -> Find:
    """The rows of a kind in which `wanted` holds, where they have the value; of all batches unless some are named."""

    def find(measured: Measured) -> Found:
        mine = [row for row in measured.get(kind, []) if wanted.items() <= row.items() and only(row)]
        mine = [row for row in mine if not batches or row["batch"] in batches]
        missing = [f"batch {batch}" for batch in batches if all(row["batch"] != batch for row in mine)]
        mine.sort(key=lambda row: batches.index(row["batch"]) if batches else 0)
        return Found([(found, row) for row in mine if (found := value(row)) is not None], missing)

    return find


def speedup(baseline: str, ours: str = "speedup") -> Callable[[Row], float | None]:
    return lambda row: over(row, baseline, ours)


def clones(row: Row) -> float:
    """se_ext's time over that of a copy of x."""
    found: float = row["variants"][OURS]["clone_equivalents"]
    return found


def slab_values(row: Row) -> int:
    block = row["workload"]
    values: int = block["channels"] * block["height"] * block["width"]
    return values


def half_over_float(batch: int) -> Find:
    """se_ext's bfloat16 time over its float32 time in inference, for slabs of LARGE_SLAB_BYTES and more in float32."""

    def our_time(row: Row) -> float:
        found: float = row["variants"][OURS]["time_us"]["median"]
        return found

    def find(measured: Measured) -> Found:
        half, single = (
            {(row["name"], row["layout"]): row for _, row in block_rows(our_time, batch, dtype=dtype)(measured).values}
            for dtype in ("bfloat16", "float32")
        )
        large = [key for key, row in half.items() if key in single and 4 * slab_values(row) >= LARGE_SLAB_BYTES]
        return Found([(our_time(half[key]) / our_time(single[key]), half[key]) for key in large])

    return find


def block_rows(
    value: Callable[[Row], float | None], *batches: int, mode: str = "inference", dtype: str = "float32", **more: Any
) -> Find:
    return rows("blocks", value, *batches, device="cpu", mode=mode, dtype=dtype, **more)


def cost_ratios(measured: Measured) -> Found:
    """What SE costs with se_ext over what it costs as it is, in whole networks."""
    networks = measured.get("networks", [])
    known = [(ratio, row) for row in networks if (ratio := row["cost_ratio"][OURS]) is not None]
    drowned = len(networks) - len(known)
    return Found(known, [f"{drowned} rows whose cost drowns in noise"] if drowned else [])


def relative_cost(row: Row) -> float:
    """What SE costs as it is, as a part of the time without."""
    found: float = row["cost_us"][AS_IS]["median"] / row["variants"][WITHOUT]["time_us"]["median"]
    return found


def step_speedup(row: Row) -> float | None:
    """A training step of timm's network over that of se_ext.models'."""
    if FUSED_NETWORK not in row["variants"]:
        return None
    theirs, ours = (row["variants"][name]["samples_us"] for name in (AS_IS, FUSED_NETWORK))
    return paired_ratio(theirs, ours)["median"]


def step_memory(row: Row) -> float | None:
    """The peak memory of that step over that of timm's."""
    if FUSED_NETWORK not in row["variants"]:
        return None
    ratio: float = row["peak_bytes"][FUSED_NETWORK] / row["peak_bytes"][AS_IS]
    return ratio


def users_networks(
    value: Callable[[Row], float | None], mode: str, *batches: int, names: Sequence[str] = NETWORK_NAMES
) -> Find:
    """The rows of a user's networks, of which every name is wanted at every batch."""
    find = rows("whole_networks", value, *batches, only=lambda row: row["name"] in names, mode=mode)

    def found(measured: Measured) -> Found:
        values = find(measured).values
        timed = {(row["name"], row["batch"]) for _, row in values}
        missing = [what for what in itertools.product(names, batches) if what not in timed]
        return Found(values, [f"{name} at batch {batch}" for name, batch in missing])

    return found


def users_speedup(form: str, change: str = WITH) -> Callable[[Row], float | None]:
    """Of what a user of se_ext has in place of timm's network."""

    def find(row: Row) -> float | None:
        found = whole_networks.speedup(row, form, change)
        return None if found is None else found["median"]

    return find


def converted_networks(
    value: Callable[[Row], float | None],
    names: Sequence[str] = NETWORK_NAMES,
    layouts: Sequence[str] = LAYOUTS,
    **wanted: Any,
) -> Find:
    """The rows of converted networks, of which every name is wanted in every layout."""
    find = rows(
        "converted", value, only=lambda row: row["name"] in names and row["layout"] in layouts, batch=8, **wanted
    )

    def found(measured: Measured) -> Found:
        values = find(measured).values
        missing = [
            what
            for what in itertools.product(names, layouts)
            if what not in {(row["name"], row["layout"]) for _, row in values}
        ]
        return Found(values, [f"{name} in {layout}" for name, layout in missing])

    return found


def conversion_s(row: Row) -> float:
    found: float = row["conversion_s"]
    return found


def import_ms(row: Row) -> float:
    found: float = row["variants"][IMPORT]["time_us"]["median"] / 1e3
    return found


def beyond(key: str, allowed_maps: int) -> Find:
    """Extra memory beyond so many maps, as a part of x."""
    return rows("gpu_memory", lambda row: row[key] / row["bytes_x"] - allowed_maps)


def large_maps(on_chip: bool) -> Find:
    """se_ext's time in copies of x, of slabs that stay on chip, or of those that can't."""
    return rows(
        "gpu", clones, only=lambda row: (row["bytes_slab"] <= ON_CHIP_BYTES) is on_chip, device="cuda", **FORWARD
    )


def pair(
    title: str, required: tuple[float, float], aim: tuple[float, float], wanted: Mapping[str, Any]
) -> list[Target]:
    """One target of a GPU over eager and one over torch.compile."""
    return [
        Target(f"{title}, over {TITLES[baseline]}", must, goal, rows("gpu", speedup(baseline), device="cuda", **wanted))
        for baseline, must, goal in zip(("best_eager", "best_compile"), required, aim, strict=True)
    ]


def tail(name: str) -> Find:
    return rows("tails", BETTER, tail=name, batch=8)


def convolutions(*passes: str, kernel: int | None = None, is_block: bool = False, **wanted: Any) -> Find:
    """The rows of depthwise convolutions in float32 at batch 8, of one kernel size or of all; alone, or with what
    follows them."""

    def wanted_too(row: Row) -> bool:
        size = row["convolution"]["kernel"]
        return row["mode"] in passes and (kernel or size) == size and depthwise.is_block(row) == is_block

    return rows("depthwise", speedup("best_eager"), only=wanted_too, dtype="float32", batch=8, **wanted)


BETTER = speedup("better")
COMPILED_SPEEDUP, EAGER_SPEEDUP = users_speedup(COMPILED), users_speedup(EAGER)
# Where every network must reach a target, the slowest one's mean over its batches is judged.
USERS = (
    Target(
        "compiled inference, batch 1 and 8, over the plain network compiled, every network",
        1,
        1.04,
        users_networks(COMPILED_SPEEDUP, INFERENCE, 1, 8),
        slowest_network,
    ),
    Target(
        "what SE costs in compiled inference, batch 1 and 8, over what it costs in the plain network compiled",
        0.8,
        0.4,
        users_networks(whole_networks.compiled_cost_ratio, INFERENCE, 1, 8),
        ratio_of_costs(whole_networks.relative_compiled_cost),
    ),
    Target(
        "compiled training step, batch 8, over the plain network compiled, every network",
        1.03,
        1.1,
        users_networks(COMPILED_SPEEDUP, TRAIN, 8),
        slowest_network,
    ),
    Target(
        "eager inference of SE-ResNet-50, batch 1 and 8, over timm's",
        1.03,
        1.1,
        users_networks(EAGER_SPEEDUP, INFERENCE, 1, 8, names=(OWN_NETWORK,)),
    ),
)
# Network, layout: required and aimed at of the training step's speed-up.
STEPS = {
    ("efficientnet_b0", "nhwc"): (1.25, 1.4),
    ("efficientnet_b0", "nchw"): (1.2, 1.3),
    ("mobilenetv3_large_100", "nhwc"): (1.15, 1.25),
    ("mobilenetv3_large_100", "nchw"): (1.12, 1.2),
    ("regnety_008", "nhwc"): (1.1, 1.2),
    ("regnety_008", "nchw"): (1.12, 1.2),
    ("seresnet50", "nhwc"): (1.15, 1.25),
    ("seresnet50", "nchw"): (1.15, 1.25),
}
# The same where convert takes the depthwise convolutions too.
STEPS_WITH_CONVOLUTIONS = {
    ("efficientnet_b0", "nhwc"): (1.45, 1.8),
    ("efficientnet_b0", "nchw"): (1.8, 2.3),
    ("mobilenetv3_large_100", "nhwc"): (1.3, 1.5),
    ("mobilenetv3_large_100", "nchw"): (1.4, 1.8),
}
CONVERTED_NETWORKS = (
    *(
        Target(
            f"converted {name}, {layout}: training step, over the plain network's",
            *goals,
            converted_networks(users_speedup(EAGER, CONVERTED), (name,), (layout,), mode=TRAIN),
        )
        for (name, layout), goals in STEPS.items()
    ),
    *(
        Target(
            f"converted {name}, {layout}, depthwise convolutions too: training step, over the plain network's",
            *goals,
            converted_networks(users_speedup(EAGER, CONVERTED), (name,), (layout,), mode=TRAIN),
        )
        for (name, layout), goals in STEPS_WITH_CONVOLUTIONS.items()
    ),
    Target(
        "converted efficientnet_b0: peak memory of the training step, over the plain network's",
        0.75,
        0.6,
        converted_networks(converted.peak_ratio, ("efficientnet_b0",), mode=TRAIN),
    ),
    Target(
        "converted networks: eager inference, over the plain network's, every network and layout",
        1.03,
        1.15,
        converted_networks(users_speedup(EAGER, CONVERTED), mode=INFERENCE),
        slowest_row,
    ),
    Target(
        "converted networks: compiled training step, over the plain network compiled, every network",
        1.05,
        1.15,
        converted_networks(users_speedup(COMPILED, CONVERTED), layouts=("nhwc",), mode=TRAIN),
        slowest_row,
    ),
    Target("conversion of seresnet50, in s", 1, 0.2, converted_networks(conversion_s, (OWN_NETWORK,))),
)
# Pass, layout: required and aimed at, over all kernel sizes. Pass, kernel size: the same, in both layouts.
BY_LAYOUT = {
    (INFERENCE, "nhwc"): (1.0, 1.3),
    (INFERENCE, "nchw"): (1.5, 2.5),
    (GRAD_INPUT, "nhwc"): (1.0, 1.5),
    (GRAD_INPUT, "nchw"): (1.3, 2.5),
    (TRAIN, "nhwc"): (1.8, 2.5),
    (TRAIN, "nchw"): (3, 6),
}
BY_KERNEL = {5: (3, 6), 3: (1, 1.5), 7: (2, 4)}
DEPTHWISE = (
    *(
        Target(
            f"depthwise convolution, {layout}: {MODES[what]}, over ATen's better form",
            *goals,
            convolutions(what, layout=layout),
        )
        for (what, layout), goals in BY_LAYOUT.items()
    ),
    *(
        Target(
            f"depthwise convolution, {size}x{size}: {MODES[GRAD_WEIGHT]}, over ATen's better form",
            *goals,
            convolutions(GRAD_WEIGHT, kernel=size),
        )
        for size, goals in BY_KERNEL.items()
    ),
    Target(
        "depthwise convolution, inference or one gradient, over ATen's better form: worst single row",
        0.95,
        1.1,
        convolutions(INFERENCE, GRAD_INPUT, GRAD_WEIGHT),
        WORST,
        "best_eager",
    ),
    Target(
        "depthwise convolution + batch norm + SiLU + SE, forward + backward, over eager",
        2.5,
        4,
        convolutions(TRAIN, is_block=True),
    ),
)
IN_PLACE = rows("allocators", speedup("best_eager", "speedup_inplace"), environment=allocator.DEFAULT)
LARGE_IN_CLONES = block_rows(clones, 8, 32, only=lambda row: slab_values(row) >= LARGE_SLAB_VALUES)
CPU = (
    Target("inference, batch 1, over the better", 2.5, 4, block_rows(BETTER, 1)),
    Target("inference, batch 8, over the better", 2.5, 3.5, block_rows(BETTER, 8)),
    Target("inference, batch 32, over the better", 1.7, 2.2, block_rows(BETTER, 32)),
    Target("… worst single row of these", 1.1, 1.3, block_rows(BETTER, 1, 8, 32), WORST),
    Target("forward + backward, batch 8 and 32, over the better", 2.2, 3, block_rows(BETTER, 8, 32, mode="train")),
    Target("… worst single row of these", 1.2, 1.5, block_rows(BETTER, 8, 32, mode="train"), WORST),
    Target("bfloat16 inference, batch 8, over the better", 2.5, 4, block_rows(BETTER, 8, dtype="bfloat16")),
    Target("bfloat16 time over float32 time, slabs of 1 MB and more, batch 8", 0.7, 0.55, half_over_float(8)),
    Target("inference in place on more than 64 MB, default allocator, over best eager", 5, 8, IN_PLACE),
    Target("inference in clones, C·P of 100k and more, batch 8 and 32", 1.6, 1.2, LARGE_IN_CLONES),
    Target(
        "what SE costs in a network, over what it costs as it is", 0.5, 0.3, cost_ratios, ratio_of_costs(relative_cost)
    ),
    Target("batch norm + SE + shortcut + ReLU, forward + backward, over the better", 4, 6, tail("bn_se_residual_relu")),
    Target("batch norm + SiLU + SE, forward + backward, over the better", 3, 5, tail("bn_silu_se")),
    Target("bias + SiLU + SE, inference, over the better", 2.5, 4, tail("bias_silu_se")),
    Target("training step of SE-ResNet-50, over timm's", 1.15, 1.3, rows("networks", step_speedup)),
    Target("peak memory of that step, over timm's", 0.85, 0.7, rows("networks", step_memory)),
    *USERS,
    *CONVERTED_NETWORKS,
    *DEPTHWISE,
    Target("import of se_ext after torch, in ms", 30, 10, rows("imports", import_ms)),
)

BIG = "x of 256 MB and more"
IN_COPIES = "in copies of x (worst row)"
FORWARD = {"group": LARGE, "tail": "se", "mode": "inference"}
TAIL_FORWARD = {**FORWARD, "tail": "se_residual_relu"}
TRAINING = {**FORWARD, "mode": "train"}
IN_CACHE = {**FORWARD, "group": WORKLOADS, "in_l2": True}
ONE_SAMPLE = {**FORWARD, "group": WALL}
GPU = (
    Target(f"SE forward, {BIG}, slabs beyond 8 × 220 KB, {IN_COPIES}", 1.5, 1.05, large_maps(on_chip=False), WORST),
    Target(f"SE forward, {BIG}, slabs up to that, {IN_COPIES}", 1.15, 1.05, large_maps(on_chip=True), WORST),
    *pair(f"SE forward, {BIG}", (1.35, 1.3), (1.45, 1.45), FORWARD),
    *pair(f"SE + shortcut + ReLU forward, {BIG}", (2.2, 1.2), (2.5, 1.3), TAIL_FORWARD),
    *pair(f"SE forward + backward, {BIG}", (2.2, 1.2), (2.5, 1.35), TRAINING),
    *pair("SE forward, batches 8 to 64 of the networks' blocks, in the L2 cache", (2, 1.3), (4, 2), IN_CACHE),
    *pair("SE forward, one sample, time at the host", (4, 2), (8, 4), ONE_SAMPLE),
    Target("inference: memory beyond the output, over x (worst row)", 0.001, 0.001, beyond("bytes_output", 1), WORST),
    Target("inference in place: extra memory, over x (worst row)", 0.001, 0.001, beyond("bytes_in_place", 0), WORST),
)


# ---- the tables ----


def cpu_table(measured: Measured) -> str:
    title = (
        "Targets on two cores, float32 where nothing else is said; geometric means over the workloads in both layouts, "
        "what SE costs in a network: the ratio of the summed costs, each as a part of its network's time without SE; "
        "where every network must reach a target: the mean of the slowest:"
    )
    return f"{title}\n\n{target_table(CPU, measured)}"


def target_table(targets: Sequence[Target], measured: Measured, absent: str = "not measured") -> str:
    """A line per target; `absent` is the verdict where there is no row."""
    head = ["target", "required", "aim", "measured", "worst row", "rows", "verdict"]
    return table(head, [_line(target, target.find(measured), absent) for target in targets], "lrrrrrl")


def _line(target: Target, found: Found, absent: str) -> list[object]:
    sign = "≥" if target.at_least else "≤"
    digits = 2 if target.required >= 0.01 else 5
    cells: list[object] = [f"{sign} {goal:g}" for goal in (target.required, target.aim)]
    cells += [number(of(found) if found.values else None, digits) for of in (target.value, target.worst)]
    return [target.title, *cells, len(found.values) or ABSENT, target.verdict(found, absent)]


def networks_below(measured: Measured) -> list[tuple[Target, list[Found]]]:
    """For each target of the slowest network: the rows of the networks that miss what is required of each."""
    return [
        (target, [found for found in networks if not target.reached(geometric_mean(found), target.required)])
        for target in USERS
        if target.combine is slowest_network and (networks := by_network(target.find(measured)))
    ]


def network_line(found: Found) -> str:
    """A network's mean, and the compiled times that it comes from: with SE, with se_ext, without SE."""
    rows = [row for _, row in found.values]
    mean = number(geometric_mean(found))
    return f"{rows[0]['name']}: {mean} ({'; '.join(map(whole_networks.compiled_times, rows))})"


def rows_below(measured: Measured) -> list[tuple[Target, list[Row]]]:
    """For each target of a worst single row: the rows that miss what is required of every row."""
    return [
        (target, [row for value, row in target.find(measured).values if not target.reached(value, target.required)])
        for target in CPU
        if target.combine is WORST
    ]
