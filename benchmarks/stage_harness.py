"""One row of stages.json: one SE block in one layout, batch size and mode, each of its stages timed by itself."""

from __future__ import annotations

import summary
import torch
from harness import SEED, recorded, rounded
from large_inputs import open_gate
from problem import Problem, draw_problem
from timing import OtherLoad, Plan, Step, interleave
from torch import Tensor
from variants import make_step
from workloads import Workload

from se_ext import functional

COMPILED = "compile_linear"


def measure_row(workload: Workload, layout: str, batch: int, mode: str, plan: Plan) -> summary.Row:
    """Times the stages interleaved. That they compute the right thing is for the tests and for run.py."""
    with torch.inference_mode(mode == "inference"):
        steps = stages(workload, layout, batch, mode)
        for step in steps.values():
            step()
        load = OtherLoad()
        samples = interleave(steps, plan, lambda: None)
        other_cpu_share = load.share()
    torch._dynamo.reset()
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
        "mode": mode,
        "bytes_x": batch * workload.channels * workload.points * 4,
        "other_cpu_share": rounded(other_cpu_share),
        "variants": variants,
    }


def stages(workload: Workload, layout: str, batch: int, mode: str) -> dict[str, Step]:
    problem = draw_problem(workload, layout, batch, torch.float32, torch.device("cpu"), SEED)
    return MODES[mode](problem)


def inference_stages(drawn: Problem) -> dict[str, Step]:
    problem = open_gate(drawn)
    x, target = problem.x, problem.x.clone()
    z, ones = torch.randn(x.shape[:2]), torch.ones(x.shape[:2])
    weights, names = _weights(problem), _names(problem)

    def rescale_in_place() -> torch.Tensor:
        torch.ops.se_ext.rescale_(target, ones)
        return target

    return {
        summary.YARDSTICK: x.clone,
        "mean": lambda: x.mean((2, 3)),
        "multiply": lambda: x * ones[:, :, None, None],
        "squeeze": lambda: functional.squeeze(x),
        "excite": lambda: functional.excite(z, *weights, *names),
        "rescale": lambda: functional.rescale(x, ones),
        "rescale_in_place": rescale_in_place,
        "fused": lambda: functional.squeeze_excite(x, *weights, *names),
        "fused_in_place": lambda: functional.squeeze_excite(target, *weights, *names, inplace=True),
    }


def train_stages(problem: Problem) -> dict[str, Step]:
    """What a training step of the block is made of; two of the stages are left out of `backward_of_x`: the gradients
    of the weights, and their reduction over the batch."""
    x, grad_y = problem.x, problem.grad_output
    weights, names = _weights(problem), _names(problem)
    ops = torch.ops.se_ext
    _, z, hidden, scale = ops._squeeze_excite_forward(x, *weights, *names, None, "identity")
    grad_scale = torch.randn_like(scale)

    def backward(*mask: bool) -> Step:
        arguments = (grad_y, x, *weights, z, hidden, scale, None, *names, "identity", [*mask, False])
        return lambda: ops._squeeze_excite_backward(*arguments)

    return {
        summary.YARDSTICK: x.clone,
        COMPILED: make_step(COMPILED, problem, "train")[0],
        summary.OURS: make_step(summary.OURS, problem, "train")[0],
        "forward": lambda: ops._squeeze_excite_forward(x, *weights, *names, None, "identity"),
        "backward": backward(True, True, True, True, True),
        "backward_of_x": backward(True, False, False, False, False),
        "excite": lambda: ops._excite_forward(z, *weights, *names),
        "excite_backward": lambda: ops._excite_backward(grad_scale, z, *weights, hidden, scale, *names, [True] * 5),
        "rescale": lambda: functional.rescale(x, scale),
        "rescale_backward": lambda: ops._rescale_backward(grad_y, x, scale, None, "identity", [True, True, False]),
    }


MODES = {"inference": inference_stages, "train": train_stages}


def _weights(problem: Problem) -> list[Tensor]:
    return [problem.weights[f"{layer}.{name}"] for layer in ("fc1", "fc2") for name in ("weight", "bias")]


def _names(problem: Problem) -> tuple[str, str]:
    return problem.workload.activation.lower(), problem.workload.gate.lower()
