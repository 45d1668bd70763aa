"""Times the stages of the block one by one: what a row's time is made of, and what bounds its speedup.

python benchmarks/stages.py --out benchmarks/results/stages.json
python benchmarks/stages.py --workload 512x28x28 --batch 8 --quick
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import allocator

METHOD = (
    "Variants take turns (A B C, B C A, ...), one block of calls each per round; samples_us has the time per call of "
    "each block. clone is x.clone(), mean and multiply are eager's two passes over the map, squeeze, excite and "
    "rescale se_ext's ops by themselves, fused the whole block, rescale_in_place and fused_in_place write into x "
    "(every scale is 1, so that x stays what it is). Random inputs stay the same from call to call."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layout", nargs="+", choices=["nchw", "nhwc"], default=["nchw", "nhwc"], help="default: both")
    add("--batch", nargs="+", type=int, default=[8, 32], help="default: 8 32")
    add("--workload", default="", metavar="TEXT", help="only those with TEXT in their or a network's name")
    add("--out", type=Path, metavar="FILE.json", help="write the results here")
    add("--rounds", type=int, default=8, help="blocks timed per variant, default: 8")
    add("--quick", action="store_true", help="2 rounds: does it work, not how fast it is")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here so that --help, a wrong option and the restart in allocator.py don't wait for torch.
    import facts
    import report
    import results_file
    import stage_harness
    import torch
    from timing import Plan
    from tqdm import tqdm
    from workloads import read_workloads

    workloads = [workload for workload in read_workloads()[0] if workload.matches(options.workload)]
    if not workloads:
        print(f"stages.py: --workload {options.workload}: no workload or network has this in its name", file=sys.stderr)
        return 1
    plan = Plan(rounds=2 if options.quick else options.rounds, block_ms=3.0, warmup_ms=5.0)
    settings = {"rounds": plan.rounds, "block_ms": plan.block_ms, "warmup_ms": plan.warmup_ms, "quick": options.quick}
    results = facts.header("stages", torch.device("cpu"), METHOD, [allocator.note()], settings)
    grid = list(itertools.product(options.batch, workloads, options.layout))
    results["rows"] = [
        stage_harness.measure_row(workload, layout, batch, plan)
        for batch, workload, layout in tqdm(grid, unit="row", file=sys.stderr)
    ]
    print(report.markdown([results], ["this run"], targets=False))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results_file.save(results, options.out)
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    allocator.take_page_faults_out()
    sys.exit(main())
