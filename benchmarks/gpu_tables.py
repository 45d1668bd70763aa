"""The tables of gpu.json: the targets of a GPU and what was measured of each. No torch needed.

python benchmarks/gpu_tables.py [benchmarks/results/gpu.json]
python benchmarks/gpu_tables.py --readme README.md [--check]
python benchmarks/gpu_tables.py benchmarks/results/gpu.json --plot gpu.png

Without a results file every target is "not measured: no GPU".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results_file
from block_tables import TITLES, four
from markdown_table import ABSENT, MODES, folded, number, table
from summary import OURS, YARDSTICK, Row, groups, over, summarize
from targets import Found, Measured, Target, geometric_mean, verdict

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
NO_GPU = "not measured: no GPU"

LARGE, WORKLOADS, WALL = "large", "workloads", "wall"
SE, SHORTCUT, BN = "se", "se_residual_relu", "bn_se_residual_relu"
TAILS = {SE: "SE", SHORTCUT: "SE, shortcut, ReLU", BN: "batch norm, SE, shortcut, ReLU"}
# A slab (one sample) that a cluster of eight multiprocessors holds in shared memory.
ON_CHIP_BYTES = 8 * 220 * 1024

Results = dict[str, Any]


# ---- the targets ----


def worst_of_all(found: Found) -> float:
    return max(value for value, _ in found.values)


def _rows(measured: Measured, **wanted: Any) -> list[Row]:
    return [row for row in measured.get("gpu", []) if {"device": "cuda", **wanted}.items() <= row.items()]


def copies(on_chip: bool) -> Callable[[Measured], Found]:
    """se_ext's time over that of the best copy of x, of slabs that stay on chip, or of those that can't."""

    def find(measured: Measured) -> Found:
        rows = _rows(measured, group=LARGE, tail=SE, mode="inference")
        mine = [row for row in rows if (row["bytes_slab"] <= ON_CHIP_BYTES) is on_chip]
        return Found([(row["variants"][OURS]["clone_equivalents"], row) for row in mine])

    return find


def speedups(baseline: str, **wanted: Any) -> Callable[[Measured], Found]:
    """Speedups over the best eager or compiled form, where it was timed."""

    def find(measured: Measured) -> Found:
        rows = _rows(measured, **wanted)
        return Found([(value, row) for row in rows if (value := over(row, baseline)) is not None])

    return find


def beyond(key: str, allowed_maps: int) -> Callable[[Measured], Found]:
    """Extra memory beyond so many maps, as a part of x."""

    def find(measured: Measured) -> Found:
        rows = measured.get("gpu_memory", [])
        return Found([(row[key] / row["bytes_x"] - allowed_maps, row) for row in rows])

    return find


def pair(title: str, required: tuple[float, float], aim: tuple[float, float], **wanted: Any) -> list[Target]:
    """One target over eager and one over torch.compile."""
    return [
        Target(f"{title}, over {TITLES[baseline]}", must, goal, speedups(baseline, **wanted))
        for baseline, must, goal in zip(("best_eager", "best_compile"), required, aim, strict=True)
    ]


BIG = "x of 256 MB and more"
TARGETS = (
    Target(
        f"SE forward, {BIG}, slabs beyond 8 × 220 KB, in copies of x (worst row)",
        1.5,
        1.05,
        copies(on_chip=False),
        worst_of_all,
        at_least=False,
    ),
    Target(
        f"SE forward, {BIG}, slabs up to that, in copies of x (worst row)",
        1.15,
        1.05,
        copies(on_chip=True),
        worst_of_all,
        at_least=False,
    ),
    *pair(f"SE forward, {BIG}", (1.35, 1.3), (1.45, 1.45), group=LARGE, tail=SE, mode="inference"),
    *pair(f"SE + shortcut + ReLU forward, {BIG}", (2.2, 1.2), (2.5, 1.3), group=LARGE, tail=SHORTCUT, mode="inference"),
    *pair(f"SE forward + backward, {BIG}", (2.2, 1.2), (2.5, 1.35), group=LARGE, tail=SE, mode="train"),
    *pair(
        "SE forward, batches 8 to 64 of the networks' blocks, in the L2 cache",
        (2, 1.3),
        (4, 2),
        group=WORKLOADS,
        tail=SE,
        mode="inference",
        in_l2=True,
    ),
    *pair("SE forward, one sample, time at the host", (4, 2), (8, 4), group=WALL, tail=SE, mode="inference"),
    Target(
        "inference: memory beyond the output, over x (worst row)",
        0.001,
        0.001,
        beyond("bytes_output", 1),
        worst_of_all,
        at_least=False,
    ),
    Target(
        "inference in place: extra memory, over x (worst row)",
        0.001,
        0.001,
        beyond("bytes_in_place", 0),
        worst_of_all,
        at_least=False,
    ),
)


def target_table(results: Results | None) -> str:
    """Targets are not judged by quick runs."""
    measured: Measured = {}
    if results is not None and not _is_quick(results):
        measured = {"gpu": results["rows"], "gpu_memory": results["memory"]}
    absent = NO_GPU if results is None or results["gpu"] is None else "not measured"
    head = ["target", "required", "aim", "measured", "worst row", "rows", "verdict"]
    title = (
        "Targets on one NVIDIA H200, float32 and bfloat16, both layouts; geometric means where nothing else is said:"
    )
    return f"{title}\n\n{table(head, [_line(target, measured, absent) for target in TARGETS], 'lrrrrrl')}"


def _line(target: Target, measured: Measured, absent: str) -> list[object]:
    found = target.find(measured)
    sign = "≥" if target.at_least else "≤"
    value, worst = (target.combine(found), target.worst(found)) if found.values else (None, None)
    judged = verdict(target, found) if found.values else absent
    goals = [f"{sign} {goal:g}" for goal in (target.required, target.aim)]
    digits = 2 if target.required >= 0.01 else 5
    return [target.title, *goals, number(value, digits), number(worst, digits), len(found.values) or ABSENT, judged]


# ---- the other tables ----


def summary_table(rows: Sequence[Row]) -> str:
    """One line per group, tail, mode, batch and dtype."""
    lines = []
    for (group, tail, mode, warm, dtype), members in groups(rows, "group", "tail", "mode", "warm", "dtype").items():
        for batch, found in _by_batch(group, members).items():
            over_each = [four(summarize(found, baseline)) for baseline in ("best_eager", "best_compile")]
            compiled = sum(over(row, "best_compile") is not None for row in found)
            where = {LARGE: "memory", WALL: "host"}.get(group, "cache" if warm else "memory")
            what = [TAILS[tail], MODES[mode], dtype, batch, where]
            lines.append([*what, len(found), compiled, _copies(found), *over_each])
    head = ["what", "mode", "dtype", "batch", "data in", "rows", "compiled", "in copies of x"]
    title = "Speedup of se_ext over each baseline, as min / median / geometric mean / max:"
    return f"{title}\n\n{table([*head, 'over best eager', 'over torch.compile'], lines, 'lllrlr')}"


def _by_batch(group: str, rows: Sequence[Row]) -> dict[object, list[Row]]:
    if group == LARGE:  # the batch follows from the shape
        batches = sorted({row["batch"] for row in rows})
        return {" to ".join(map(str, batches[:: max(1, len(batches) - 1)])): list(rows)}
    return {batch: members for (batch,), members in groups(rows, "batch").items()}


def _copies(rows: Sequence[Row]) -> str:
    found = [(row["variants"][OURS]["clone_equivalents"], row) for row in rows]
    return f"{min(v for v, _ in found):.2f} / {geometric_mean(Found(found)):.2f} / {max(v for v, _ in found):.2f}"


def row_table(rows: Sequence[Row]) -> str:
    """Every row: microseconds per call."""
    timed = {YARDSTICK: "copy", "eager_conv": "eager conv", "eager_linear": "eager linear", "compile_linear": "compile"}
    lines = []
    for row in rows:
        times = [number(_time(row, name), 1) for name in (*timed, OURS)]
        ours = row["variants"][OURS]
        what = [row["name"], f"{TAILS[row['tail']]}, {MODES[row['mode']]}", row["layout"], row["dtype"], row["batch"]]
        speed = [number(over(row, baseline)) for baseline in ("best_eager", "best_compile")]
        lines.append([*what, *times, number(ours["clone_equivalents"]), number(ours["gb_per_s"], 0), *speed])
    head = ["block", "what", "layout", "dtype", "batch", *(f"{title} µs" for title in timed.values()), "se_ext µs"]
    return table([*head, "in copies", "GB/s", "over eager", "over compile"], lines, "llllr")


def _time(row: Row, variant: str) -> float | None:
    found = row["variants"].get(variant)
    return None if found is None else found["time_us"]["median"]


def beside_the_cpu(rows: Sequence[Row]) -> str | None:
    """se_ext's own time on the CPU and on the GPU, where both were measured."""
    keys = ("name", "layout", "dtype", "batch", "mode", "tail", "group", "warm")
    on = {"cpu": {}, "cuda": {}}
    for row in rows:
        on.setdefault(row["device"], {})[tuple(row[key] for key in keys)] = row
    lines = []
    for key, cpu in on["cpu"].items():
        if key in on["cuda"]:
            times = [_time(found, OURS) for found in (cpu, on["cuda"][key])]
            lines.append([*key[:2], key[3], number(times[0], 1), number(times[1], 1), number(times[0] / times[1], 1)])
    if not lines:
        return None
    title = "se_ext on the CPU and on the GPU, inference in float32 with the data in cache:"
    head = ["block", "layout", "batch", "CPU µs", "GPU µs", "CPU over GPU"]
    return f"{title}\n\n{table(head, lines, 'llr')}"


def markdown(results: Results | None, name: str = RESULTS.name) -> str:
    """The targets; with results, also what was measured, what was not, and where it comes from."""
    parts = [target_table(results)]
    if results is None:
        return parts[0]
    gpu = [row for row in results["rows"] if row["device"] == "cuda"] or results["rows"]
    if gpu:
        parts.append(summary_table(gpu))
    parts += filter(None, [beside_the_cpu(results["rows"]), _left_out(results), _origin(results, name)])
    for group, title in ((LARGE, "Every large map"), (WALL, "Every block, one sample"), (WORKLOADS, "Every block")):
        rows = [row for row in gpu if row["group"] == group]
        parts += folded(f"{title} ({len(rows)} rows)", [row_table(rows)] if rows else [])
    return "\n\n".join(parts)


def _is_quick(results: Results) -> bool:
    return results.get("settings", {}).get("quick", False)


def _left_out(results: Results) -> str | None:
    """What the budget of time did not reach, and what went wrong."""
    lines = [f"- not timed: {what}" for what in results["failed"]]
    left = results["not_reached"].items()
    lines += [f"- not reached within the budget of time: {count} rows of {what}" for what, count in left]
    return "\n".join(lines) or None


def _origin(results: Results, name: str) -> str:
    machine, software, git = results["machine"], results["software"], results["git"]
    gpu = results["gpu"]
    facts = [
        f"From `{name}`: {machine['gpu'] or machine['cpu']}",
        *([f"CUDA {gpu['cuda']}"] if gpu else []),
        f"torch {software['torch']}",
        f"commit {(git['commit'] or 'none')[:10]}{' + changes' if git['dirty'] else ''}",
        results["date"][:10],
    ]
    quick = ["A quick run, whose times mean nothing."] if _is_quick(results) else []
    return "  \n".join(
        [", ".join(facts) + ".", *quick, *(f"{note[0].upper()}{note[1:]}." for note in results["notes"])]
    )


def plot(results: Results, path: Path) -> None:
    """Large maps: the time of every variant in copies of x."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["group"] == LARGE]
    kinds = list(groups(rows, "tail", "mode").items())
    figure, axes = plt.subplots(len(kinds), 1, figsize=(11, 3.2 * len(kinds)), squeeze=False, layout="constrained")
    for axis, ((tail, mode), members) in zip(axes[:, 0], kinds, strict=True):
        names = list(dict.fromkeys(name for row in members for name in row["variants"] if name != YARDSTICK))
        for i, name in enumerate(names):
            found = [(k, row["variants"][name]) for k, row in enumerate(members) if name in row["variants"]]
            heights = [variant["clone_equivalents"] for _, variant in found]
            axis.bar([k + 0.8 * i / len(names) for k, _ in found], heights, 0.8 / len(names), label=name)
        labels = [f"{row['name'].split('-')[0]}\n{row['layout']} {row['dtype']}" for row in members]
        axis.set_xticks([k + 0.4 for k in range(len(members))], labels, fontsize=5)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{TAILS[tail]}, {MODES[mode]}", fontsize=9)
        axis.set_ylabel("time, in copies of x", fontsize=8)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the README's block ----


def replace_block(readme: str, text: str) -> str:
    """The README with `text` between the two markers. Raises ValueError where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, once each")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="?", type=Path, default=RESULTS, metavar="GPU.json")
    add("--readme", type=Path, help="replace the text between the GPU benchmark's markers of this file")
    add("--check", action="store_true", help="change nothing; exit 1 if --readme is out of date")
    add("--plot", type=Path, metavar="FILE.png", help="write the picture here")
    options = parser.parse_args(arguments)
    if options.check and not options.readme:
        parser.error("--check needs --readme")
    results = results_file.load(options.results) if options.results.exists() else None
    if options.plot:
        if results is None:
            return _fail(f"{options.results.name}: no such results file")
        plot(results, options.plot)
        return 0
    path = options.results.resolve()
    text = markdown(results, str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)
    if not options.readme:
        print(text)
        return 0
    old = options.readme.read_text()
    try:
        new = replace_block(old, text)
    except ValueError as error:
        return _fail(f"{options.readme.name}: {error}")
    if options.check:
        return 0 if new == old else _fail(f"{options.readme.name}: not what the GPU's results give")
    if new != old:
        options.readme.write_text(new)
    return 0


def _fail(message: str) -> int:
    print(f"gpu_tables.py: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
