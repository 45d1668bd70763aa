"""The variants that are timed against each other. All start from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from problem import ACTIVATIONS, GATES, LAYOUTS, Problem
from torch import Tensor, nn

import se_ext

Step = Callable[[], object]
Results = Callable[[], dict[str, Tensor | None]]


class EagerConv(nn.Module):
    """As timm and torchvision write it: mean, two 1x1 convolutions, multiply.

    (torchvision's AdaptiveAvgPool2d(1) is the same call to mean inside ATen.)
    """

    def __init__(self, channels: int, hidden: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.activation(self.fc1(z))))


class EagerLinear(nn.Module):
    """With linear layers on the [N, C] mean, as MONAI and the paper's re-implementations write it."""

    def __init__(self, channels: int, hidden: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        s = self.gate(self.fc2(self.activation(self.fc1(x.mean((2, 3))))))
        return x * s[:, :, None, None]


MODULES: dict[str, Callable[..., nn.Module]] = {
    "eager_conv": EagerConv,
    "eager_linear": EagerLinear,
    "compile": EagerConv,
    "compile_linear": EagerLinear,
    "se_ext": se_ext.SqueezeExcitation,
    "se_ext_inplace": partial(se_ext.SqueezeExcitation, inplace=True),
}


def build(name: str, problem: Problem) -> nn.Module:
    """The module of variant `name` with a copy of the problem's weights."""
    workload = problem.workload
    module = MODULES[name](workload.channels, workload.hidden, ACTIVATIONS[workload.activation], GATES[workload.gate])
    module.to(problem.x.device, problem.x.dtype, memory_format=LAYOUTS[problem.layout])
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    module.load_state_dict({key: w.reshape(shapes[key]) for key, w in problem.weights.items()})
    return torch.compile(module, fullgraph=True, dynamic=False) if name.startswith("compile") else module


def inference_step(module: nn.Module, problem: Problem) -> tuple[Step, Results]:
    """One forward pass. The caller is inside torch.inference_mode()."""
    x = problem.x

    def step() -> Tensor:
        return module(x)

    return step, lambda: {"output": step()}


def train_step(module: nn.Module, problem: Problem) -> tuple[Step, Results]:
    """One forward + backward pass; the gradients of x and of the weights are set to None first."""
    x = problem.x.detach().requires_grad_()
    grad_output = problem.grad_output
    leaves = {"input": x, **dict(module.named_parameters())}
    tensors = tuple(leaves.values())

    def step() -> Tensor:
        for tensor in tensors:
            tensor.grad = None
        y = module(x)
        y.backward(grad_output)
        return y

    def results() -> dict[str, Tensor | None]:
        y = step()
        return {"output": y.detach(), **{f"grad {name}": leaf.grad for name, leaf in leaves.items()}}

    return step, results


def make_step(name: str, problem: Problem, mode: str) -> tuple[Step, Results]:
    """The call to time, and a function that makes that call and returns its tensors by name."""
    if name == "clone":
        return problem.x.clone, lambda: {"output": problem.x.clone()}
    return MODES[mode](build(name, problem), problem)


MODES = {"inference": inference_step, "train": train_step}
