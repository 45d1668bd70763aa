"""Times SE blocks together with the batch norm, activation and shortcut around them, as in SE-ResNet and EfficientNet.

python benchmarks/tails.py --out benchmarks/results/tails.json
python benchmarks/tails.py --tail bn_silu_se --workload 96x56x56 --quick
"""

from __future__ import annotations

import argparse
import itertools
import sys

import allocator
import command

TAILS = ["bn_se_residual_relu", "bn_silu_se", "bias_silu_se"]
METHOD = (
    "Variants take turns (A B C, B C A, ...), one block of calls each per round; samples_us has the time per call of "
    "each block, and a ratio is the median of the ratios round by round. bn_se_residual_relu and bn_silu_se are "
    "forward + backward in training mode, gradients for the map, the shortcut and every weight; bias_silu_se is "
    "inference. Eager writes the activations and the shortcut's sum in place, as timm does. Compile time is not "
    "included. se_ext's output, gradients and running statistics matched the float64 formula on the same data before "
    "timing, within 0.1 % in the Euclidean norm (but for a few in a million values, on another side of a ReLU's kink). "
    "other_cpu_share is the part of all CPU time that other programs used."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    command.add_workload(parser)
    add = parser.add_argument
    add("--tail", nargs="+", choices=TAILS, default=TAILS, help="default: all")
    add("--batch", nargs="+", type=int, default=[8], help="default: 8")
    add("--rounds", type=int, default=8, help="blocks timed per variant, default: 8")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here so that --help, a wrong option and the restart in allocator.py don't wait for torch.
    import facts
    import tail_harness
    import torch
    from problem import WrongResult
    from timing import Plan
    from tqdm import tqdm

    workloads = [workload for workload in tail_harness.workloads() if workload.matches(options.workload)]
    if not workloads:
        networks = ", ".join(tail_harness.NETWORKS)
        return command.fail(f"--workload {options.workload}: no workload of {networks} has this in its name")
    plan = Plan(rounds=2 if options.quick else options.rounds, block_ms=3.0, warmup_ms=5.0, lead_in_calls=1)
    settings = {"rounds": plan.rounds, "block_ms": plan.block_ms, "warmup_ms": plan.warmup_ms, "quick": options.quick}
    results = facts.header("tails", torch.device("cpu"), METHOD, [allocator.note()], settings)
    results["rows"] = []
    grid = list(itertools.product(options.tail, options.batch, workloads, options.layout))
    try:
        with tqdm(grid, unit="row", file=sys.stderr) as bar:
            for tail, batch, workload, layout in bar:
                bar.set_description(f"{tail} {workload.name} {layout}")
                results["rows"].append(tail_harness.measure_row(tail, workload, layout, batch, plan))
    except WrongResult as error:
        return command.fail(f"not timed, because the result is wrong: {error}")
    command.publish(results, options.out)
    return 0


if __name__ == "__main__":
    allocator.take_page_faults_out()
    sys.exit(main())
