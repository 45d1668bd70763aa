"""One SE block together with the batch norm, activation and shortcut around it, as in SE-ResNet and EfficientNet."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import se_ext
from benchmarks import summary
from benchmarks.cases.blocks import build, compiled, time_row
from benchmarks.cases.problem import ACTIVATIONS, GATES, SEED, Problem, draw_problem, to_layout
from benchmarks.cases.workloads import Workload, read_workloads
from benchmarks.measure.case import Case, Work, WrongResult
from benchmarks.measure.timing import Plan

NETWORKS = ("seresnet50", "efficientnet_b0")
EAGER_FORM = {"compile": "eager_conv", "compile_linear": "eager_linear"}
BASELINES = (*EAGER_FORM.values(), *EAGER_FORM)
ALLOWED = 1e-3
ALLOWED_FLIPS = 1e-5  # part of the values that may lie on the other side of the last ReLU's kink


@dataclass(frozen=True)
class Tail:
    """`front` is what stands before the activation: "batch_norm", "bias" or nothing; what is not there is not in the
    formula."""

    mode: str
    front: str | None
    silu: bool
    residual: bool


TAILS = {
    "bn_se_residual_relu": Tail("train", "batch_norm", silu=False, residual=True),
    "bn_silu_se": Tail("train", "batch_norm", silu=True, residual=False),
    "bias_silu_se": Tail("inference", "bias", silu=True, residual=False),
}


@dataclass(frozen=True)
class TailCase(Case):
    tail: str
    batch: int
    workload: Workload
    layout: str

    def measure(self, plan: Plan) -> summary.Row:
        """Checks se_ext against the float64 formula, then times all variants interleaved."""
        tail = TAILS[self.tail]
        problem = draw_problem(self.workload, self.layout, self.batch, torch.float32, torch.device("cpu"), SEED)
        maps = maps_of(tail, problem.x, torch.randn_like(problem.x))
        modules = {name: module_of(name, tail, problem) for name in (*BASELINES, summary.OURS)}
        check(str(self), tail.mode, modules[summary.OURS], modules["eager_linear"], maps, problem.grad_output, ALLOWED)
        with torch.inference_mode(tail.mode == "inference"):
            steps = {name: make_step(module, tail.mode, maps, problem.grad_output) for name, module in modules.items()}
            row = time_row(problem, tail.mode, {summary.YARDSTICK: problem.x.clone, **steps}, plan)
        return {**row, "name": f"{self.tail} {self.workload.name}", "tail": self.tail}


def work(text: str, *, tail: Sequence[str], batch: Sequence[int], layout: Sequence[str], quick: bool) -> Work:
    found = [workload for workload in workloads() if workload.matches(text)]
    return Work([TailCase(*parts) for parts in itertools.product(tail, batch, found, layout)])


def workloads() -> list[Workload]:
    return [w for w in read_workloads()[0] if any(use.model in NETWORKS for use in w.uses)]


# ---- the variants ----


class Eager(nn.Module):
    """As timm writes it: an in-place activation, an in-place sum with the shortcut, an in-place ReLU."""

    def __init__(self, tail: Tail, se: nn.Module, channels: int) -> None:
        super().__init__()
        self.tail, self.se = tail, se
        if tail.front:
            self.bn = nn.BatchNorm2d(channels)  # where a bias alone is wanted, its holder

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if self.tail.front:
            x = self.bn(x) if self.tail.front == "batch_norm" else x + self.bn.bias[:, None, None]
        x = self.se(functional.silu(x, inplace=True) if self.tail.silu else x)
        if shortcut is not None:
            x += shortcut
            x = functional.relu(x, inplace=True)
        return x


class Fused(nn.Module):
    """se_ext's public module and function around an SE block of its own."""

    def __init__(self, tail: Tail, se: se_ext.SqueezeExcitation, workload: Workload) -> None:
        super().__init__()
        self.batch_norm = tail.front == "batch_norm"
        self.module = se_ext.BatchNormSqueezeExcitation(
            workload.channels,
            workload.hidden,
            ACTIVATIONS[workload.activation],
            GATES[workload.gate],
            pre_activation="silu" if tail.silu else None,
            post_activation="relu" if tail.residual else None,
        )
        self.module.se = se

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if self.batch_norm:
            y: Tensor = self.module(x, shortcut)
            return y
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


def module_of(name: str, tail: Tail, problem: Problem) -> nn.Module:
    """Variant `name` of the tail, with the problem's weights and the same random batch norm in each; to be called with
    the maps of `maps_of`."""
    workload = problem.workload
    se = build(EAGER_FORM.get(name, name), problem)
    module: nn.Module
    if not isinstance(se, se_ext.SqueezeExcitation):
        module = Eager(tail, se, workload.channels)
    elif tail.front:
        module = Fused(tail, se, workload)
    else:
        names = (ACTIVATIONS[workload.activation], GATES[workload.gate])
        module = se_ext.SqueezeExcitation(workload.channels, workload.hidden, *names, post_activation=nn.ReLU)
        to_layout(module.to(problem.x.device, problem.x.dtype), problem.layout)
        module.load_state_dict(se.state_dict())
    module.to(problem.x.device)
    randomize(module)
    return compiled(module) if name.startswith("compile") else module


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
                norm.bias.copy_(torch.randn(norm.num_features, generator=generator))


def maps_of(tail: Tail, x: Tensor, shortcut: Tensor) -> tuple[Tensor, ...]:
    return (x, shortcut) if tail.residual else (x,)


def make_step(
    module: nn.Module, mode: str, maps: Sequence[Tensor], grad_output: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """One forward pass; when training, forward + backward, with the gradients of the maps and of every weight. Returns
    the results by name. What a training loop does once, like listing the parameters, is done here."""
    if mode == "inference":
        return lambda: {"output": module(*maps)}
    leaves = [t.detach().requires_grad_() for t in maps]
    named = dict(zip(("input", "shortcut"), leaves, strict=False)) | dict(module.named_parameters())
    wanted = list(named.values())

    def step() -> dict[str, Tensor]:
        y = module(*leaves)
        grads = torch.autograd.grad(y, wanted, grad_output)
        return {"output": y.detach(), **{f"grad {key}": g for key, g in zip(named, grads, strict=True)}}

    return step


# ---- the check ----


def check(
    where: str,
    mode: str,
    ours: nn.Module,
    eager: nn.Module,
    maps: Sequence[Tensor],
    grad_output: Tensor,
    allowed: float,
) -> None:
    """Raises WrongResult if an output, a gradient or a running statistic of `ours` is not the one of `eager` computed
    in float64."""
    exact = results_of(copy.deepcopy(eager).double(), mode, [t.double() for t in maps], grad_output.double())
    found = results_of(copy.deepcopy(ours), mode, maps, grad_output)
    if found["output"].stride() != maps[0].stride():
        raise WrongResult(f"{where}: output has strides {found['output'].stride()}, x {maps[0].stride()}")
    for key, value in found.items():
        error = distance(value, exact[key], found["output"], exact["output"])
        if not error <= allowed:
            raise WrongResult(f"{where}: {key} is off by {error:.2e} in the norm; allowed {allowed:.2e}")


def results_of(module: nn.Module, mode: str, maps: Sequence[Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    """What a step returns, and the running statistics after it; under names that don't say how deep a weight lies."""
    with torch.set_grad_enabled(mode == "train"):
        results = make_step(module, mode, maps, grad_output)()
    statistics = {name: b for name, b in module.named_buffers() if "running" in name and mode == "train"}
    return {name.replace("module.", "").replace("se.", ""): t for name, t in {**results, **statistics}.items()}


def distance(value: Tensor, truth: Tensor, output: Tensor, exact_output: Tensor) -> float:
    """In the norm, relative to the truth's. Where a full-size value lies on another side of the last ReLU's kink than
    in float64 it is left out, if these are few: no output is exactly 0 but by a ReLU, and elsewhere signs agree."""
    value, truth = value.double().reshape(truth.shape), truth.double()
    if truth.shape == output.shape:
        agree = (output > 0) == (exact_output > 0)
        if 1 - agree.double().mean() <= ALLOWED_FLIPS:
            value, truth = value * agree, truth * agree
    return ((value - truth).norm() / truth.norm()).item()
