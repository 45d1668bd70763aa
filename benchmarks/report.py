"""Turns results files into a summary, a README block and pictures. No number is typed by hand.

python benchmarks/report.py benchmarks/results/cpu.json
python benchmarks/report.py benchmarks/results/cpu.json --readme README.md [--check]
python benchmarks/report.py benchmarks/results/cpu.json --plots docs/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_file
from summary import OURS, YARDSTICK, Row, groups, over, summarize

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
ROOT = Path(__file__).resolve().parent.parent
TITLES = {"best_eager": "best eager", "best_compile": "torch.compile", "better": "the better"}
TIMED = {
    "eager_conv": "eager conv",
    "eager_linear": "eager linear",
    "compile": "compile conv",
    "compile_linear": "compile linear",
    OURS: OURS,
}
DISTURBED = 0.1
MODES = {"inference": "inference", "train": "forward + backward"}


def markdown(files: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The whole report: the summary, the slow rows, where the numbers come from, all rows folded away."""
    rows = [row for results in files for row in results["rows"]]
    parts = [
        _summary_table(rows),
        _slow_rows(rows),
        *_disturbed(rows),
        *(_origin(results, name) for results, name in zip(files, names, strict=True)),
        "<details>\n<summary>Every workload</summary>",
        *_workload_tables(rows),
        "</details>",
    ]
    return "\n\n".join(parts)


def _origin(results: dict[str, Any], name: str) -> str:
    machine, software, git = results["machine"], results["software"], results["git"]
    commit = f"{(git['commit'] or 'none')[:10]}{' + changes' if git['dirty'] else ''}"
    facts = [
        f"From `{name}`: {machine['gpu'] or machine['cpu']}",
        f"{machine['threads']} threads",
        f"instruction set {machine['isa']}",
        f"torch {software['torch']}",
        f"commit {commit}",
        results["date"][:10],
    ]
    lines = [", ".join(facts) + ".", *(f"{note[0].upper()}{note[1:]}." for note in results["notes"])]
    return "\n".join(f"{line}  " for line in lines[:-1]) + f"\n{lines[-1]}"


def _cells(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _four(found: dict[str, float] | None) -> str:
    return "–" if found is None else " / ".join(f"{found[k]:.2f}" for k in ("min", "median", "geomean", "max"))


def _summary_table(rows: Sequence[Row]) -> str:
    """One line per mode, dtype, batch and layout, and one for both layouts together."""
    lines = [
        "Speedup of se_ext over each baseline, as min / median / geometric mean / max over the workloads:",
        "",
        _cells(["mode", "dtype", "batch", "layout", "rows", *(f"over {title}" for title in TITLES.values())]),
        "|---|---|---:|---|---:|" + "---:|" * len(TITLES),
    ]
    for (mode, dtype, batch), members in groups(rows, "mode", "dtype", "batch").items():
        layouts = {layout: found for (layout,), found in groups(members, "layout").items()}
        if len(layouts) > 1:
            layouts["both"] = members
        for layout, found in layouts.items():
            speedups = [_four(summarize(found, baseline)) for baseline in TITLES]
            lines.append(_cells([MODES[mode], dtype, batch, layout, len(found), *speedups]))
    return "\n".join(lines)


def _slow_rows(rows: Sequence[Row]) -> str:
    """Names every row below 1.0 with the baseline that beats it."""
    against = [row for row in rows if over(row, "better") is not None]
    slow = [row for row in against if over(row, "better") < 1]
    if not against:
        return "No baseline was timed."
    if not slow:
        return "No row is slower than any of its baselines."
    lines = ["Rows below 1.0 (the better of the baselines is faster):", ""]
    for row in slow:
        better = row["speedup"]["better"]
        lines.append(
            f"- {row['name']}, {row['layout']}, {row['dtype']}, batch {row['batch']}, {MODES[row['mode']]}: "
            f"{better['median']:.2f} ({better['p10']:.2f} to {better['p90']:.2f}) over {better['baseline']}"
        )
    return "\n".join(lines)


def _disturbed(rows: Sequence[Row]) -> list[str]:
    """A warning where other programs took CPU time from the benchmark."""
    shares = [share for row in rows if (share := row["other_cpu_share"] or 0) > DISTURBED]
    if not shares:
        return []
    return [
        f"**Not to be trusted**: during {len(shares)} of {len(rows)} rows other programs used more than "
        f"{DISTURBED:.0%} of the CPUs, {max(shares):.0%} at most."
    ]


def _workload_tables(rows: Sequence[Row]) -> list[str]:
    tables = []
    for (mode, dtype, batch), members in groups(rows, "mode", "dtype", "batch").items():
        timed = [name for name in TIMED if any(name in row["variants"] for row in members)]
        head = ["block", "networks", "layout", "clone µs", *(f"{TIMED[name]} µs" for name in timed)]
        head += ["p10 to p90", "clones", "GB/s", *(f"over {title}" for title in TITLES.values())]
        lines = [
            f"**{MODES[mode]}, {dtype}, batch {batch}** (medians; p10 to p90, clones and GB/s are se_ext's)",
            "",
            _cells(head),
            "|---|---|---|" + "---:|" * (len(head) - 3),
            *(_workload_line(row, timed) for row in members),
        ]
        tables.append("\n".join(lines))
    return tables


def _workload_line(row: Row, timed: Sequence[str]) -> str:
    variants, ours = row["variants"], row["variants"][OURS]
    networks = ", ".join(f"{use['model']} ×{use['count']}" for use in row["workload"]["uses"])
    times = [f"{variants[n]['time_us']['median']:.1f}" if n in variants else "–" for n in (YARDSTICK, *timed)]
    speedups = ["–" if (ratio := over(row, baseline)) is None else f"{ratio:.2f}" for baseline in TITLES]
    spread = f"{ours['time_us']['p10']:.1f} to {ours['time_us']['p90']:.1f}"
    own = [spread, f"{ours['clone_equivalents']:.2f}", f"{ours['gb_per_s']:.1f}"]
    return _cells([row["name"], networks, row["layout"], *times, *own, *speedups])


def replace_block(readme: str, text: str) -> str:
    """The README with `text` between the two markers. Raises ValueError where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, once each")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _display_name(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULTS.json")
    add("--readme", type=Path, help="replace the text between the benchmark markers of this file")
    add("--check", action="store_true", help="change nothing; exit 1 if --readme is out of date")
    add("--plots", type=Path, metavar="DIR", help="write the pictures here")
    options = parser.parse_args(arguments)
    if options.check and not options.readme:
        parser.error("--check needs --readme")

    files = [results_file.load(path) for path in options.results]
    text = markdown(files, [_display_name(path) for path in options.results])
    if options.plots:
        # Imported here so that the tables need no matplotlib.
        import plots

        for path in plots.write(files, options.plots):
            print(f"wrote {path}", file=sys.stderr)
    if options.readme:
        return _update_readme(options.readme, text, options.check)
    if not options.plots:
        print(text)
    return 0


def _update_readme(path: Path, text: str, check: bool) -> int:
    old = path.read_text()
    try:
        new = replace_block(old, text)
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if check and new != old:
        print(f"{path}: not what the results give; run report.py with --readme", file=sys.stderr)
        return 1
    if new != old:
        path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
