"""What the benchmark's programs share: options of the same name and meaning, and where their results go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

LAYOUTS = ["nchw", "nhwc"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """With --layout, --out and --quick."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="default: both")
    made.add_argument("--out", type=Path, metavar="FILE.json", help="write the results here")
    made.add_argument("--quick", action="store_true", help="few short rounds: does it work, not how fast it is")
    return made


def add_workload(to: argparse.ArgumentParser) -> None:
    to.add_argument("--workload", default="", metavar="TEXT", help="only those with TEXT in their or a network's name")


def publish(results: dict[str, Any], out: Path | None) -> None:
    """Prints the tables of a run; writes its results file where one is wanted."""
    # Imported here so that --help and a wrong option don't wait for them.
    import report
    import results_file

    print(report.markdown([results], ["this run"], targets=False))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        results_file.save(results, out)
        print(f"wrote {out}", file=sys.stderr)


def fail(message: str) -> int:
    """The exit status of a run that has nothing to publish, and why."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return 1
