"""One row of stages.json: one SE block in one layout and batch size, each of its stages timed by itself."""

from __future__ import annotations

import summary
import torch
from harness import SEED, recorded, rounded
from large_inputs import open_gate
from problem import draw_problem
from timing import OtherLoad, Plan, Step, interleave
from workloads import Workload

from se_ext import functional

EAGER_PASSES = ("mean", "multiply")


def measure_row(workload: Workload, layout: str, batch: int, plan: Plan) -> summary.Row:
    """Times the stages interleaved. That they compute the right thing is for the tests and for run.py."""
    with torch.inference_mode():
        steps = stages(workload, layout, batch)
        load = OtherLoad()
        samples = interleave(steps, plan, lambda: None)
        other_cpu_share = load.share()
    variants = recorded(samples)
    clone = variants[summary.YARDSTICK]["samples_us"]
    for variant in variants.values():
        variant["time_us"] = summary.spread(variant["samples_us"])
        variant["clone_equivalents"] = summary.paired_ratio(variant["samples_us"], clone)["median"]
    return {
        "name": workload.name,
        "device": "cpu",
        "dtype": "float32",
        "batch": batch,
        "layout": layout,
        "mode": "inference",
        "bytes_x": batch * workload.channels * workload.points * 4,
        "other_cpu_share": rounded(other_cpu_share),
        "variants": variants,
    }


def stages(workload: Workload, layout: str, batch: int) -> dict[str, Step]:
    problem = open_gate(draw_problem(workload, layout, batch, torch.float32, torch.device("cpu"), SEED))
    x, target = problem.x, problem.x.clone()
    z = torch.randn(batch, workload.channels)
    ones = torch.ones(batch, workload.channels)
    weights = [problem.weights[f"{layer}.{name}"] for layer in ("fc1", "fc2") for name in ("weight", "bias")]
    names = (workload.activation.lower(), workload.gate.lower())
    return {
        summary.YARDSTICK: x.clone,
        "mean": lambda: x.mean((2, 3)),
        "multiply": lambda: x * ones[:, :, None, None],
        "squeeze": lambda: functional.squeeze(x),
        "excite": lambda: functional.excite(z, *weights, *names),
        "rescale": lambda: functional.rescale(x, ones),
        "rescale_in_place": lambda: torch.ops.se_ext.rescale_(target, ones),
        "fused": lambda: functional.squeeze_excite(x, *weights, *names),
        "fused_in_place": lambda: functional.squeeze_excite(target, *weights, *names, inplace=True),
    }
