"""Times se_ext on a GPU against copies of x, eager PyTorch and torch.compile, the most telling rows first.

python benchmarks/gpu.py --out benchmarks/results/gpu.json --cpu
python benchmarks/gpu.py --device cpu --quick --no-compile --workload 512x7x7
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import command

METHOD = (
    "Variants take turns (A B C, B C A, ...); samples_us has the time per call of each block, and a ratio is the "
    "median of the ratios round by round. A block replays one CUDA graph of calls_per_step calls, so that its time is "
    "the device's. The calls of a graph have inputs and outputs of their own, over more memory than the cache holds; "
    "where warm, they share one input, and what fits stays in the L2 cache. Rows of the group wall are of one sample, "
    "called from Python without a graph until the device is done: the time at the host. The yardstick is the faster of "
    "x.clone() and out.copy_(x). forward + backward asks for the gradients of every map and weight. Compile time is "
    "not included. se_ext's output and gradients matched the float64 formula on the same data before timing; behind a "
    "shortcut's ReLU within 0.1 % in the Euclidean norm (bfloat16: 2 %). A batch repeats eight samples."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    command.add_workload(parser)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: only to see that it works; default: cuda")
    add("--budget-s", type=float, default=220, help="begin no row after so many seconds, default: 220")
    add("--rounds", type=int, default=7, help="blocks timed per variant, default: 7")
    add("--no-compile", action="store_true", help="without torch.compile, which takes seconds per shape")
    add("--cpu", action="store_true", help="se_ext's own time on the CPU as well")
    return parser.parse_args(arguments)


Job = Callable[[], dict[str, Any]]


class Run:
    """Rows as they come, written to the file every few seconds: what is measured is kept, however the run ends."""

    SAVE_EVERY_S = 10.0

    def __init__(self, options: argparse.Namespace, results: dict[str, Any]) -> None:
        self.options, self.results = options, results
        self.start = self.saved = time.monotonic()
        self.left: Counter[str] = Counter()
        results |= {"failed": [], "not_reached": {}, "memory": [], "rows": []}

    def add(self, into: str, kind: str, name: str, *forms: Job) -> None:
        """Adds the result of the first form that works, unless the time is up; what doesn't work is told."""
        seconds = time.monotonic() - self.start
        if seconds > self.options.budget_s:
            self.left[kind] += 1
            self.results["not_reached"] = dict(self.left)
            return
        print(f"{seconds:6.1f} s  {name}", file=sys.stderr, flush=True)
        for form in forms:
            try:
                self.results[into].append(form())
                break
            except Exception as error:
                what = f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                print(f"NOT TIMED: {what}", file=sys.stderr, flush=True)
                self.results["failed"].append(what)
        if time.monotonic() - self.saved > self.SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        import results_file

        self.saved = time.monotonic()
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            results_file.save(self.results, self.options.out)


def header(options: argparse.Namespace, plan: Any, sizes: Any) -> dict[str, Any]:
    import allocator
    import facts
    import harness
    import torch

    device = torch.device(options.device)
    settings = {
        **{"rounds": plan.rounds, "block_ms": plan.block_ms, "warmup_ms": plan.warmup_ms, "seed": harness.SEED},
        **{"ring_bytes": sizes.ring, "budget_s": options.budget_s, "quick": options.quick},
    }
    notes = [f"the CPU's rows: {allocator.note()}"] if options.cpu else []
    results = facts.header("gpu", device, METHOD, notes, settings)
    results["gpu"] = None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        results["gpu"] = {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here so that --help and a wrong option don't wait for torch.
    import gpu_harness
    import gpu_tables
    import torch
    from timing import Plan

    if options.device == "cuda" and not torch.cuda.is_available():
        return command.fail("--device cuda: this torch finds no CUDA device")
    device = torch.device(options.device)
    sizes = gpu_harness.QUICK if options.quick else gpu_harness.Sizes()
    cases = gpu_harness.cases(options.workload, options.layout, sizes, not options.no_compile, options.quick)
    if not cases:
        return command.fail(f"--workload {options.workload}: no workload and no network has this in its name")
    plan = Plan(rounds=options.rounds, block_ms=2.0, warmup_ms=4.0, lead_in_calls=1)
    if options.quick:
        plan = Plan(rounds=2, block_ms=0.1, warmup_ms=0.1, lead_in_calls=0)

    run = Run(options, header(options, plan, sizes))

    def measure(some: Iterable[gpu_harness.Case]) -> None:
        for case in some:
            # Where torch.compile fails, the row is measured without it.
            forms = [case] if not case.compiled else [case, dataclasses.replace(case, compiled=False)]
            jobs = [partial(gpu_harness.measure_row, form, device, sizes, plan) for form in forms]
            run.add("rows", _kind(case), str(case), *jobs)

    first, rest = gpu_harness.split(cases)
    try:
        if device.type == "cuda":
            for case in filter(gpu_harness.Case.is_plain, first):
                run.add("memory", "memory", f"memory of {case}", partial(gpu_harness.measure_memory, case, device))
        measure(first)
        if options.cpu:
            for job in gpu_harness.cpu_rows(options.workload, options.layout, plan):
                run.add("rows", "the CPU", "the CPU", job)
        measure(rest)
    finally:
        run.save()
    print(gpu_tables.markdown(run.results, options.out.name if options.out else "this run"))
    return 1 if run.results["failed"] else 0


def _kind(case: Any) -> str:
    cache = ", warm" if case.warm and case.group == "workloads" else ""
    return f"{case.group}, {case.tail}, {case.mode}, {case.dtype}{cache}"


if __name__ == "__main__":
    sys.exit(main())
