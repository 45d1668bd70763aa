"""python -m benchmarks: lists the experiments, runs one, writes the generated pages, compares two results files."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import benchmarks
from benchmarks.experiments import ALL, BY_NAME, CHOICES, QUICK
from benchmarks.measure import allocator

# What else is needed is imported where it is needed: --help and the restart in allocator.py don't wait for torch, and
# measuring imports no report.


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.do(options)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(do=_list)
    commands = parser.add_subparsers(metavar="COMMAND")

    run = commands.add_parser("run", help="measure one experiment, or `all` that need no GPU")
    names = run.add_subparsers(dest="name", required=True, metavar="NAME")
    everything = names.add_parser("all", help="each in a process of its own")
    everything.set_defaults(do=_run_all)
    for experiment in ALL:
        one = names.add_parser(experiment.name, help=experiment.question, description=experiment.method)
        one.set_defaults(do=_run)
        one.add_argument(
            "--workload", default="", metavar="TEXT", help="only those with TEXT in their or a network's name"
        )
        one.add_argument("--rounds", type=int, help=f"blocks timed per variant, default: {experiment.plan.rounds}")
        one.add_argument("--quick", action="store_true", help="few short rounds: does it work, not how fast it is")
        one.add_argument("--budget-s", type=float, help=f"begin no row after so long, default: {experiment.budget_s}")
        where = f"default for a whole run: {experiment.results.name} in benchmarks/results"
        one.add_argument("--out", type=Path, metavar="FILE.json", help=where)
        for axis, values in experiment.axes.items():
            default = " ".join(map(str, values))
            kind = str if axis in CHOICES else int
            one.add_argument(f"--{axis}", nargs="+", type=kind, choices=CHOICES.get(axis), help=f"default: {default}")

    report = commands.add_parser("report", help="the generated pages, or the tables of some results files")
    report.set_defaults(do=_report)
    report.add_argument("results", nargs="*", type=Path, metavar="FILE.json", help="print the tables of these instead")
    report.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    report.add_argument(
        "--plots", type=Path, metavar="DIR", help="where pictures go, default without files: docs/images"
    )

    compare = commands.add_parser("compare", help="what became faster from one results file to another")
    compare.set_defaults(do=_compare)
    compare.add_argument("older", type=Path)
    compare.add_argument("newer", type=Path)
    return parser


def _list(options: argparse.Namespace) -> int:
    width = max(len(experiment.name) for experiment in ALL)
    for experiment in ALL:
        print(f"{experiment.name:<{width}}  {experiment.question}")
    print("\npython -m benchmarks --help says what to do with them.")
    return 0


def _run(options: argparse.Namespace) -> int:
    experiment = BY_NAME[options.name]
    if experiment.page_faults_out:
        allocator.take_page_faults_out()

    from benchmarks.measure import session

    plan = QUICK if options.quick else experiment.plan
    if options.rounds is not None:
        plan = replace(plan, rounds=options.rounds)
    axes = {axis: tuple(found) for axis in experiment.axes if (found := getattr(options, axis)) is not None}
    a_part = options.quick or options.workload or axes
    out = options.out or (None if a_part else experiment.results)
    results = session.run(experiment, options.workload, axes, plan, options.quick, options.budget_s, out)

    from benchmarks.report import pages

    print(pages.tables(results, out.name if out else "this run"))
    return 1 if results["failed"] else 0


def _run_all(options: argparse.Namespace) -> int:
    for experiment in ALL:
        if experiment.name != "gpu":
            subprocess.run([sys.executable, "-m", "benchmarks", "run", experiment.name], check=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.measure import results_file
    from benchmarks.report import pages

    if options.check:
        stale = pages.update(check=True)
        for path in stale:
            print(f"{path}: not what the results give; `make readme` writes it", file=sys.stderr)
        return 1 if stale else 0
    files = {path.name: results_file.load(path) for path in options.results} or pages.load().files
    if options.results:
        for name, results in files.items():
            print(pages.tables(results, name))
    else:
        for path in pages.update(check=False):
            print(f"wrote {path}", file=sys.stderr)
    plots = options.plots or (None if options.results else pages.ROOT / pages.IMAGES)
    if plots:
        # Imported here so that the tables need no matplotlib.
        from benchmarks.report import plots as pictures

        for path in pictures.write(list(files.values()), plots):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.measure import results_file
    from benchmarks.report import compare

    print(compare.markdown(results_file.load(options.older), results_file.load(options.newer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
