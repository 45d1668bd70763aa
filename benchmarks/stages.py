"""Times the stages of the block one by one: what a row's time is made of, and what bounds its speedup.

python benchmarks/stages.py --out benchmarks/results/stages.json
python benchmarks/stages.py --workload 512x28x28 --batch 8 --quick
"""

from __future__ import annotations

import argparse
import itertools
import sys

import allocator
import command

MODES = ["inference", "train"]
METHOD = (
    "Variants take turns (A B C, B C A, ...), one block of calls each per round; samples_us has the time per call of "
    "each block. Inference: clone is x.clone(), mean and multiply are eager's two passes over the map, squeeze, excite "
    "and rescale se_ext's ops by themselves, fused the whole block, rescale_in_place and fused_in_place write into x "
    "(every scale is 1, so that x stays what it is). Training: compile_linear and se_ext are forward and backward as "
    "run.py times them, the rest se_ext's ops, called without autograd: forward and backward of the block, "
    "backward_of_x the same without the gradients of the weights, excite and rescale with their backward by "
    "themselves. Random inputs stay the same from call to call."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    command.add_workload(parser)
    add = parser.add_argument
    add("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    add("--batch", nargs="+", type=int, default=[8, 32], help="default: 8 32")
    add("--rounds", type=int, default=8, help="blocks timed per variant, default: 8")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here so that --help, a wrong option and the restart in allocator.py don't wait for torch.
    import facts
    import stage_harness
    import torch
    from timing import Plan
    from tqdm import tqdm
    from workloads import read_workloads

    workloads = [workload for workload in read_workloads()[0] if workload.matches(options.workload)]
    if not workloads:
        return command.fail(f"--workload {options.workload}: no workload or network has this in its name")
    plan = Plan(rounds=2 if options.quick else options.rounds, block_ms=3.0, warmup_ms=5.0)
    settings = {"rounds": plan.rounds, "block_ms": plan.block_ms, "warmup_ms": plan.warmup_ms, "quick": options.quick}
    results = facts.header("stages", torch.device("cpu"), METHOD, [allocator.note()], settings)
    grid = list(itertools.product(options.mode, options.batch, workloads, options.layout))
    results["rows"] = [
        stage_harness.measure_row(workload, layout, batch, mode, plan)
        for mode, batch, workload, layout in tqdm(grid, unit="row", file=sys.stderr)
    ]
    command.publish(results, options.out)
    return 0


if __name__ == "__main__":
    allocator.take_page_faults_out()
    sys.exit(main())
