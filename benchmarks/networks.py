"""Times whole networks of timm as they are, with se_ext's SE blocks, and without any: what SE costs, before and after.

python benchmarks/networks.py --out benchmarks/results/networks.json
python benchmarks/networks.py --network mobilenetv3_large_100 --quick
"""

from __future__ import annotations

import argparse
import sys

import allocator
import command

METHOD = (
    "Variants take turns (A B C, B C A, ...), one block of calls each per round, all in one process; samples_us has "
    "the time per call of each block. as_is is timm's network with random weights, se_ext and se_ext_inplace the "
    "same with its SE blocks swapped (same weights), se_ext_models the network of that name from se_ext.models, "
    "no_se the same with every SE block replaced by the identity. train is forward + backward + SGD step. cost_us is "
    "the time of a variant minus that of no_se, round by round, cost_ratio the ratio of the median costs to that of "
    "as_is. The swapped networks gave the logits (training: in float64, and the gradient of the images) of the "
    "network as it is before timing. peak_bytes is the most that tensors hold during a training step. "
    "other_cpu_share is the part of all CPU time that other programs used."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--network", default="", metavar="TEXT", help="only those with TEXT in their name")
    add("--rounds", type=int, help="blocks timed per variant, default: what fits into some seconds per row")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here so that --help, a wrong option and the restart in allocator.py don't wait for torch.
    import facts
    import network_harness
    import timm_networks
    import torch
    from problem import WrongResult
    from tqdm import tqdm

    names = [name for name in timm_networks.NETWORKS if options.network in name]
    if not names:
        return command.fail(f"--network {options.network}: expected part of one of {', '.join(timm_networks.NETWORKS)}")
    rounds = 2 if options.quick else options.rounds
    budget = network_harness.Budget(least=rounds, most=rounds) if rounds else network_harness.Budget()
    settings = {
        "budget": vars(budget),
        "block_ms": network_harness.BLOCK_MS,
        "learning_rate": network_harness.LEARNING_RATE,
        "seed": network_harness.SEED,
        "quick": options.quick,
    }
    results = facts.header("networks", torch.device("cpu"), METHOD, [allocator.note()], settings)
    results["software"]["timm"] = timm_networks.timm.__version__
    results["rows"] = []
    total = len(names) * len(options.layout) * len(network_harness.CASES)
    try:
        with tqdm(total=total, unit="row", file=sys.stderr) as bar:
            for row in network_harness.measure(names, options.layout, budget, announce=bar.set_description):
                results["rows"].append(row)
                bar.update()
    except WrongResult as error:
        return command.fail(f"not timed, because the result is wrong: {error}")
    command.publish(results, options.out)
    return 0


if __name__ == "__main__":
    allocator.take_page_faults_out()
    sys.exit(main())
