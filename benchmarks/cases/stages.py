"""The stages of one SE block, each timed by itself: what the time of the block is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import summary
from benchmarks.cases.allocators import open_gate
from benchmarks.cases.blocks import make_step
from benchmarks.cases.problem import SEED, Problem, draw_problem
from benchmarks.cases.workloads import Workload, read_workloads
from benchmarks.measure.case import Case, Work
from benchmarks.measure.timing import Plan, Step, recorded
from se_ext import functional

COMPILED = "compile_linear"


@dataclass(frozen=True)
class StageCase(Case):
    """The stages are timed, not checked: that they compute the right thing is for the tests and for blocks.py."""

    mode: str
    batch: int
    workload: Workload
    layout: str

    def measure(self, plan: Plan) -> summary.Row:
        with torch.inference_mode(self.mode == "inference"):
            steps = stages(self.workload, self.layout, self.batch, self.mode)
            variants, other_cpu_share = recorded(steps, plan)
        torch._dynamo.reset()
        clone = variants[summary.YARDSTICK]["samples_us"]
        for variant in variants.values():
            variant["time_us"] = summary.spread(variant["samples_us"])
            variant["clone_equivalents"] = summary.paired_ratio(variant["samples_us"], clone)["median"]
        return {
            "name": self.workload.name,
            "device": "cpu",
            "dtype": "float32",
            "batch": self.batch,
            "layout": self.layout,
            "mode": self.mode,
            "bytes_x": self.batch * self.workload.channels * self.workload.points * 4,
            "other_cpu_share": other_cpu_share,
            "variants": variants,
        }


def work(text: str, *, mode: Sequence[str], batch: Sequence[int], layout: Sequence[str], quick: bool) -> Work:
    found = [workload for workload in read_workloads()[0] if workload.matches(text)]
    return Work([StageCase(*parts) for parts in itertools.product(mode, batch, found, layout)])


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

    # By name: in what order a private op takes its arguments is its own affair.
    layers = dict(zip(("w1", "b1", "w2", "b2", "activation", "gate"), (*weights, *names), strict=True))
    saved = {"z": z, "hidden": hidden, "scale": scale}
    tail = {"saved": None, "post_activation": "identity"}

    def backward(*mask: bool) -> Step:
        given = {"grad_output": grad_y, "input": x, **layers, **saved, **tail, "mask": [*mask, False]}
        return lambda: ops._squeeze_excite_backward(**given)

    return {
        summary.YARDSTICK: x.clone,
        COMPILED: make_step(COMPILED, problem, "train")[0],
        summary.OURS: make_step(summary.OURS, problem, "train")[0],
        "forward": lambda: ops._squeeze_excite_forward(x, *weights, *names, None, "identity"),
        "backward": backward(True, True, True, True, True),
        "backward_of_x": backward(True, False, False, False, False),
        "excite": lambda: ops._excite_forward(z, *weights, *names),
        "excite_backward": lambda: ops._excite_backward(grad_output=grad_scale, **layers, **saved, mask=[True] * 5),
        "rescale": lambda: functional.rescale(x, scale),
        "rescale_backward": lambda: ops._rescale_backward(grad_y, x, scale, None, "identity", [True, True, False]),
    }


MODES = {"inference": inference_stages, "train": train_stages}


def _weights(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = problem.weights
    return w["fc1.weight"], w["fc1.bias"], w["fc2.weight"], w["fc2.bias"]


def _names(problem: Problem) -> tuple[str, str]:
    return problem.workload.activation.lower(), problem.workload.gate.lower()
