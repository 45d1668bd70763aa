"""Turns results files into a summary, a README block and pictures. No number is typed by hand.

python benchmarks/report.py benchmarks/results/inference.json
python benchmarks/report.py benchmarks/results/*.json --readme README.md [--check]
python benchmarks/report.py benchmarks/results/*.json --plots docs/

Files of run.py, tails.py, networks.py, allocators.py and stages.py in any order; several of a kind are one table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_file
from allocator_tables import allocator_table, large_input_table
from block_tables import against_the_better, slow_rows, summary_table, workload_tables
from markdown_table import folded
from network_tables import fused_table, network_table
from stage_tables import stage_tables
from summary import Row, row_key
from tail_tables import tail_table
from targets import rows_below, target_table

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
ROOT = Path(__file__).resolve().parent.parent
KINDS = ("blocks", "networks", "allocators", "stages", "tails")
DISTURBED = 0.1

Results = dict[str, Any]


def markdown(files: Sequence[Results], names: Sequence[str], targets: bool = True) -> str:
    """The whole report: what was measured, how that meets the targets, where it comes from, all rows folded away.

    Targets are not judged by quick runs. Raises ValueError where two files have the same row.
    """
    measured = rows_by_kind(files)
    blocks, networks, large, stages, tails = (measured.get(kind, []) for kind in KINDS)
    judged = rows_by_kind([results for results in files if not _is_quick(results)])
    parts = [
        *([summary_table(blocks)] if blocks else []),
        *([target_table(judged), *_rows_below(judged)] if targets else []),
        *([slow_rows(blocks)] if blocks else []),
        *([tail_table(tails)] if tails else []),
        *stage_tables(stages),
        *_disturbed([row for rows in measured.values() for row in rows]),
        *([network_table(networks)] if networks else []),
        *filter(None, [fused_table(networks)]),
        *([allocator_table(large)] if large else []),
        *(_origin(results, name) for results, name in zip(files, names, strict=True)),
        *folded("Every workload", [*workload_tables(blocks), *([large_input_table(large)] if large else [])]),
    ]
    return "\n\n".join(parts)


def rows_by_kind(files: Sequence[Results]) -> dict[str, list[Row]]:
    """The rows of all files. A file without a kind is from before there was more than one."""
    found: dict[str, dict[tuple[Any, ...], Row]] = {}
    for results in files:
        kind = results.get("kind", KINDS[0])
        rows = found.setdefault(kind, {})
        for row in results["rows"]:
            key = (row.get("environment"), *row_key(row))
            if key in rows:
                raise ValueError(f"{kind}: more than one file has {' '.join(map(str, row_key(row)))}")
            rows[key] = row
    return {kind: list(rows.values()) for kind, rows in found.items()}


def _is_quick(results: Results) -> bool:
    return results.get("settings", {}).get("quick", False)


def _rows_below(measured: dict[str, list[Row]]) -> list[str]:
    parts = []
    for target, rows in rows_below(measured):
        title = f"Rows below {target.required:g}, what every row must have: {len(rows)}"
        parts += folded(title, ["\n".join(map(against_the_better, rows))] if rows else [])
    return parts


def _origin(results: Results, name: str) -> str:
    machine, software, git = results["machine"], results["software"], results["git"]
    commit = f"{(git['commit'] or 'none')[:10]}{' + changes' if git['dirty'] else ''}"
    facts = [
        f"From `{name}`: {machine['gpu'] or machine['cpu']}",
        f"{machine['threads']} threads",
        f"instruction set {machine['isa']}",
        *(f"{package} {software[package]}" for package in ("torch", "timm") if package in software),
        f"commit {commit}",
        results["date"][:10],
    ]
    quick = ["**a quick run, whose times mean nothing**"] if _is_quick(results) else []
    lines = [", ".join(facts) + ".", *(f"{note[0].upper()}{note[1:]}." for note in [*quick, *results["notes"]])]
    return "\n".join(f"{line}  " for line in lines[:-1]) + f"\n{lines[-1]}"


def _disturbed(rows: Sequence[Row]) -> list[str]:
    """A warning where other programs took CPU time from the benchmark."""
    shares = [share for row in rows if (share := row["other_cpu_share"] or 0) > DISTURBED]
    if not shares:
        return []
    return [
        f"**Not to be trusted**: during {len(shares)} of {len(rows)} rows other programs used more than "
        f"{DISTURBED:.0%} of the CPUs, {max(shares):.0%} at most."
    ]


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
    try:
        text = markdown(files, [_display_name(path) for path in options.results])
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
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
