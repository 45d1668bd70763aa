"""The tensors of one benchmark case, and the float64 formula that a variant must match before it is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases.workloads import Workload
from benchmarks.measure.case import WrongResult

ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "SiLU": nn.SiLU}
GATES: dict[str, type[nn.Module]] = {"Sigmoid": nn.Sigmoid, "Hardsigmoid": nn.Hardsigmoid}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
KINKS: dict[str, tuple[float, ...]] = {"ReLU": (0.0,), "Hardsigmoid": (-3.0, 3.0)}
KINK_MARGIN = 1e-5
SEED = 2017


def to_layout(module: nn.Module, layout: str) -> nn.Module:
    """The module, its weights in that layout; Module.to's type hints know no memory format."""
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]


@dataclass(frozen=True)
class Problem:
    """x and grad_output [N, C, H, W]; weights under the state_dict keys of torchvision's block."""

    workload: Workload
    layout: str
    x: Tensor
    grad_output: Tensor
    weights: dict[str, Tensor]

    @property
    def bytes_x(self) -> int:
        return self.x.numel() * self.x.element_size()

    def working_set_bytes(self, mode: str) -> int:
        """Inference: x, y, weights. Train: x, y, their gradients, weights and theirs."""
        weights = sum(w.numel() * w.element_size() for w in self.weights.values())
        return (2 * self.bytes_x + weights) * (2 if mode == "train" else 1)


def draw_problem(
    workload: Workload, layout: str, batch: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Problem:
    """Random x and grad_output with a mean per (n, c), so that z, gs and gz count in what is checked.

    Weights are drawn again until no pre-activation sits on a kink of ReLU or hardsigmoid, where float32 and
    float64 may rightly take different branches.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, hidden = workload.channels, workload.hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def slab() -> Tensor:
        values = normal(batch, channels, workload.height, workload.width) + normal(batch, channels, 1, 1)
        return values.to(device, dtype, memory_format=LAYOUTS[layout])

    x, grad_output = slab(), slab()
    z = x.double().mean((2, 3))
    while True:
        drawn = {
            "fc1.weight": normal(hidden, channels, 1, 1) / math.sqrt(channels),
            "fc1.bias": 0.5 * normal(hidden),
            "fc2.weight": normal(channels, hidden, 1, 1) / math.sqrt(hidden),
            "fc2.bias": 0.5 * normal(channels),
        }
        weights = {key: value.to(device, dtype) for key, value in drawn.items()}
        if _kink_distance(workload, z, weights) > KINK_MARGIN:
            return Problem(workload, layout, x, grad_output, weights)


def _pre_activations(workload: Workload, z: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    hidden = functional.linear(z, weights["fc1.weight"].flatten(1), weights["fc1.bias"])
    activated = ACTIVATIONS[workload.activation]()(hidden)
    return hidden, functional.linear(activated, weights["fc2.weight"].flatten(1), weights["fc2.bias"])


def _kink_distance(workload: Workload, z: Tensor, weights: Mapping[str, Tensor]) -> float:
    double = {key: value.double() for key, value in weights.items()}
    pairs = zip((workload.activation, workload.gate), _pre_activations(workload, z, double), strict=True)
    return min(((t - kink).abs().min().item() for name, t in pairs for kink in KINKS.get(name, ())), default=math.inf)


def reference(problem: Problem) -> dict[str, Tensor]:
    """The output and every gradient of the plain formula in float64."""
    workload = problem.workload
    x = problem.x.double().requires_grad_()
    weights = {key: value.double().requires_grad_() for key, value in problem.weights.items()}
    _, t = _pre_activations(workload, x.mean((2, 3)), weights)
    y = x * GATES[workload.gate]()(t)[:, :, None, None]
    grads = torch.autograd.grad(y, [x, *weights.values()], problem.grad_output.double())
    names = ["input", *weights]
    return {"output": y.detach(), **{f"grad {name}": g for name, g in zip(names, grads, strict=True)}}


def tolerance(problem: Problem) -> float:
    """The largest error allowed, relative to the largest value.

    8 roundings of the dtype, and 8 of the accumulator (float32, or float64 for float64) times the random walk
    of the longest sum, which has N·P terms.
    """
    dtype = problem.x.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    longest_sum = problem.x.shape[0] * problem.workload.points
    return 8 * (torch.finfo(dtype).eps + torch.finfo(accumulator).eps * math.sqrt(longest_sum))


def check(problem: Problem, expected: Mapping[str, Tensor], found: Mapping[str, Tensor | None]) -> None:
    """Raises WrongResult if a tensor in `found` differs from the one of that name in `expected`, or if the
    output lost the memory format of x."""
    allowed = tolerance(problem)
    where = f"{problem.workload.name} {problem.layout} {list(problem.x.shape)} {problem.x.dtype}"
    strides = None if (output := found["output"]) is None else output.stride()
    if strides != problem.x.stride():
        raise WrongResult(f"{where}: output has strides {strides}, x {problem.x.stride()}")
    for name, value in found.items():
        if value is None:
            raise WrongResult(f"{where}: {name} is missing")
        truth = expected[name]
        error = ((value.double().reshape(truth.shape) - truth).abs().max() / truth.abs().max()).item()
        if not error <= allowed:
            raise WrongResult(f"{where}: {name} is off by {error:.2e} of its maximum; allowed {allowed:.2e}")
