"""Times SE blocks on inputs larger than 64 MB with page faults taken out, with glibc's defaults, and with huge pages.

python benchmarks/allocators.py --out benchmarks/results/allocators.json
python benchmarks/allocators.py --workload 64x56x56 --environment default --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import allocator
import command

METHOD = (
    "Each environment is a fresh process, because glibc and torch read their settings at start-up only. In it variants "
    "take turns (A B C, B C A, ...), one block of calls each per round; samples_us has the time per call of each "
    "block, and a ratio is the median of the ratios round by round. The gate's bias is so large that every gate is 1 "
    "and x stays what it is when the block is applied in place again and again; with ordinary weights se_ext's output, "
    "in place or not, matched the float64 formula before timing. speedup is se_ext's, speedup_inplace se_ext_inplace's."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    command.add_workload(parser)
    add = parser.add_argument
    names = list(allocator.ENVIRONMENTS)
    add("--environment", nargs="+", choices=names, default=names, help="default: all")
    add("--rounds", type=int, default=10, help="blocks timed per variant, default: 10")
    add("--here", action="store_true", help="in this process's environment; print the rows as lines of JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    # A child's own command line is its parent's and --here.
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    # Imported here so that --help and a wrong option don't wait for torch.
    import large_inputs
    from problem import WrongResult

    cases = large_inputs.cases(options.workload)
    if not cases:
        return command.fail(f"--workload {options.workload}: expected part of one of {', '.join(large_inputs.NAMES)}")
    if options.here:
        try:
            for row in large_inputs.measure(options.workload, options.layout, _plan(options)):
                print(json.dumps(row), flush=True)
        except WrongResult as error:
            return command.fail(f"not timed, because the result is wrong: {error}")
        return 0
    try:
        results = _measure(options, arguments, len(cases) * len(options.layout))
    except subprocess.CalledProcessError as error:
        return command.fail(f"the process that measures failed with exit status {error.returncode}")
    command.publish(results, options.out)
    return 0


def _measure(options: argparse.Namespace, arguments: list[str], rows_each: int) -> dict[str, Any]:
    import facts
    import torch
    from tqdm import tqdm

    notes = [
        f"{name}: {' '.join(f'{key}={value}' for key, value in allocator.ENVIRONMENTS[name].items()) or 'nothing set'}"
        for name in options.environment
    ]
    settings = {**vars(_plan(options)), "quick": options.quick}
    results = facts.header("allocators", torch.device("cpu"), METHOD, notes, settings)
    results["rows"] = []
    with tqdm(total=len(options.environment) * rows_each, unit="row", file=sys.stderr) as bar:
        for name in options.environment:
            bar.set_description(name)
            for row in _child(name, arguments):
                results["rows"].append({"environment": name, **row})
                bar.update()
    return results


def _child(environment: str, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The rows that a fresh process measures in that environment, as they come."""
    command = [sys.executable, __file__, *arguments, "--here"]
    with subprocess.Popen(
        command, env=allocator.environment(environment), stdout=subprocess.PIPE, text=True
    ) as process:
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _plan(options: argparse.Namespace) -> Any:
    from timing import Plan

    if options.quick:
        return Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0)
    return Plan(rounds=options.rounds, block_ms=20, warmup_ms=20, lead_in_calls=1)


if __name__ == "__main__":
    sys.exit(main())
