"""One row of tails.json: one SE block with what stands around it, in one layout and batch size, all variants."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import summary
import torch
from harness import SEED, time_row
from problem import Problem, WrongResult, draw_problem
from timing import Plan, Step
from torch import Tensor, nn
from torch.nn import functional
from variants import build
from workloads import Workload, read_workloads

import se_ext

NETWORKS = ("seresnet50", "efficientnet_b0")
BASELINES = ("eager_conv", "eager_linear", "compile", "compile_linear")
ALLOWED = 1e-3
ALLOWED_FLIPS = 1e-5  # part of the values that may lie on the other side of the last ReLU's kink


@dataclass(frozen=True)
class Tail:
    """`mode` as in the blocks' benchmark; what is not there is not in the formula."""

    mode: str
    batch_norm: bool
    silu: bool
    residual: bool


TAILS = {
    "bn_se_residual_relu": Tail("train", batch_norm=True, silu=False, residual=True),
    "bn_silu_se": Tail("train", batch_norm=True, silu=True, residual=False),
    "bias_silu_se": Tail("inference", batch_norm=False, silu=True, residual=False),
}


def workloads() -> list[Workload]:
    return [w for w in read_workloads()[0] if any(use.model in NETWORKS for use in w.uses)]


class Eager(nn.Module):
    """As timm writes it: an in-place activation, an in-place sum with the shortcut, an in-place ReLU."""

    def __init__(self, tail: Tail, se: nn.Module, channels: int) -> None:
        super().__init__()
        self.batch_norm, self.silu, self.residual = tail.batch_norm, tail.silu, tail.residual
        self.bn = nn.BatchNorm2d(channels)  # without batch norm, the holder of the bias
        self.se = se

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.bn(x) if self.batch_norm else x + self.bn.bias[:, None, None]
        x = self.se(functional.silu(x, inplace=True) if self.silu else x)
        if self.residual:
            x += shortcut
            x = functional.relu(x, inplace=True)
        return x


class Fused(nn.Module):
    """se_ext's public module and function, with the parameters of an Eager one."""

    def __init__(self, tail: Tail, eager: Eager, workload: Workload) -> None:
        super().__init__()
        self.tail = tail
        self.module = se_ext.BatchNormSqueezeExcitation(
            workload.channels,
            workload.hidden,
            getattr(nn, workload.activation),
            getattr(nn, workload.gate),
            pre_activation="silu" if tail.silu else None,
            post_activation="relu" if tail.residual else None,
        )
        self.module.bn, self.module.se = eager.bn, eager.se

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if self.tail.batch_norm:
            return self.module(x, shortcut if self.tail.residual else None)
        se = self.module.se
        return se_ext.squeeze_excite(
            x,
            se.fc1.weight,
            se.fc1.bias,
            se.fc2.weight,
            se.fc2.bias,
            se.activation,
            se.scale_activation,
            pre_bias=self.module.bn.bias,
            pre_activation="silu",
        )


def measure_row(name: str, workload: Workload, layout: str, batch: int, plan: Plan) -> summary.Row:
    """Checks se_ext against the float64 formula, then times all variants interleaved."""
    tail = TAILS[name]
    problem = draw_problem(workload, layout, batch, torch.float32, torch.device("cpu"), SEED)
    shortcut = torch.randn_like(problem.x)
    eager = {variant: Eager(tail, build(variant, problem), workload.channels) for variant in BASELINES[:2]}
    for module in eager.values():
        randomize(module)
    fused = Fused(tail, Eager(tail, build(summary.OURS, problem), workload.channels), workload)
    randomize(fused)
    check(name, tail, problem, shortcut, eager["eager_linear"], fused)
    compiled = {
        ours: torch.compile(copy.deepcopy(eager[theirs]), fullgraph=True, dynamic=False)
        for ours, theirs in zip(BASELINES[2:], BASELINES[:2], strict=True)
    }
    modules = {**eager, **compiled, summary.OURS: fused}
    with torch.inference_mode(tail.mode == "inference"):
        tensors = (problem.x, shortcut, problem.grad_output)
        steps = {variant: make_step(module, *tensors, tail) for variant, module in modules.items()}
        row = time_row(problem, tail.mode, {summary.YARDSTICK: problem.x.clone, **steps}, plan)
    return {**row, "name": f"{name} {workload.name}", "tail": name}


def randomize(module: nn.Module) -> None:
    """The same random batch norm in every variant."""
    generator = torch.Generator().manual_seed(SEED)
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator))


def make_step(module: nn.Module, x: Tensor, shortcut: Tensor, grad: Tensor, tail: Tail) -> Step:
    """One forward pass; when training, forward + backward, with the gradients of the map, the shortcut and every
    weight. Returns the results by name. What a training loop does once, like listing the parameters, is done here."""
    if tail.mode == "inference":
        return lambda: {"output": module(x, shortcut)}
    x, shortcut = x.detach().requires_grad_(), shortcut.detach().requires_grad_(tail.residual)
    named = {"input": x, **({"shortcut": shortcut} if tail.residual else {}), **dict(module.named_parameters())}
    leaves = list(named.values())

    def step() -> dict[str, Tensor]:
        y = module(x, shortcut)
        return {"output": y.detach(), **dict(zip(named, torch.autograd.grad(y, leaves, grad), strict=True))}

    return step


def distance(value: Tensor, truth: Tensor, output: Tensor, exact_output: Tensor) -> float:
    """In the norm, relative to the truth's. Where a full-size value lies on another side of the last ReLU's kink than
    in float64 it is left out, if these are few: no output is exactly 0 but by a ReLU, and elsewhere signs agree."""
    value, truth = value.double().reshape(truth.shape), truth.double()
    if truth.shape == output.shape:
        agree = (output > 0) == (exact_output > 0)
        if 1 - agree.double().mean() <= ALLOWED_FLIPS:
            value, truth = value * agree, truth * agree
    return ((value - truth).norm() / truth.norm()).item()


def check(name: str, tail: Tail, problem: Problem, shortcut: Tensor, eager: Eager, fused: Fused) -> None:
    """Raises WrongResult if se_ext's output, a gradient or a running statistic is not the float64 formula's."""
    exact_module = copy.deepcopy(eager).double()
    doubles = (problem.x.double(), shortcut.double(), problem.grad_output.double())
    exact = make_step(exact_module, *doubles, tail)()
    ours = copy.deepcopy(fused)
    found = make_step(ours, problem.x, shortcut, problem.grad_output, tail)()
    if tail.batch_norm:
        for statistic in ("running_mean", "running_var"):
            exact[statistic] = getattr(exact_module.bn, statistic)
            found[statistic] = getattr(ours.module.bn, statistic)
    if found["output"].stride() != problem.x.stride():
        raise WrongResult(f"{name} {problem.workload.name}: output has strides {found['output'].stride()}")
    for key, value in found.items():
        truth = exact[key.removeprefix("module.")]
        error = distance(value, truth, found["output"], exact["output"])
        if not error <= ALLOWED:
            raise WrongResult(f"{name} {problem.workload.name} {problem.layout}: {key} off by {error:.2e} in the norm")
