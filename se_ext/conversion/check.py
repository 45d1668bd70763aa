"""Whether a recipe computes what a module computes: compared on a copy of it with random weights, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .compare import TOLERANCE, Results, largest_difference
from .fused_class import Recipe, convert_instance
from .trace import LIBRARIES


class Checker:
    """Compares each kind of block once."""

    def __init__(self) -> None:
        self.results: dict[Any, str] = {}

    def difference(self, module: nn.Module, recipe: Recipe) -> str:
        """What is wrong with a conversion of an SE block or a relative; empty if nothing."""
        parts = [(type(m), *(name for name, p in m._parameters.items() if p is not None)) for m in module.modules()]
        key = (type(module), recipe, *parts)
        if key not in self.results:
            self.results[key] = _difference(module, recipe)
        return self.results[key]


def _difference(module: nn.Module, recipe: Recipe) -> str:
    with (
        _disable_current_modes(),
        torch.device("cpu"),
        torch.inference_mode(False),  # with it gradients are recorded
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)
        try:
            original = _random_copy(module)
            converted = copy.deepcopy(original)
        except Exception as error:  # weights that another library computes or wraps
            if type(module).__module__.partition(".")[0] in LIBRARIES:
                return ""
            return f"cannot be copied for a comparison ({type(error).__name__})"
        convert_instance(converted, recipe)
        try:
            x = _input(original, recipe)
            results = [_output_and_gradients(m, x) for m in (original, converted)]
        except Exception as error:
            return f"cannot be run for a comparison ({type(error).__name__}: {error})"
    if largest_difference(results[1], results[0]) <= TOLERANCE:
        return ""
    return "computes something else than its structure says"


def _random_copy(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for m in copied.modules():
        for name, p in m._parameters.items():
            if (
                p is not None and type(p).__name__ == "DTensor"
            ):  # a part of a weight that processes share (FSDP2): here it is whole
                m._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
    copied = copied.to_empty(device="cpu").double().requires_grad_()
    for m in copied.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            hooks.clear()
    for parameter in copied.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for buffer in copied.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return copied


def _input(module: nn.Module, recipe: Recipe) -> torch.Tensor:
    block = recipe.block
    layers: Any = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    channels = layers[0].weight.shape[1] if layers else 8
    spatial = (5, 4, 3)[: (block.dims if block else 2) or 2]
    shape = (3, *spatial, channels) if block and block.channels_last else (3, channels, *spatial)
    return torch.randn(shape, dtype=torch.float64)


def _output_and_gradients(module: nn.Module, x: torch.Tensor) -> Results:
    torch.manual_seed(0)  # dropout
    x = x.clone().requires_grad_()
    output = type(module).forward(module, x)
    wanted = {"input": x, **dict(module.named_parameters())}
    weights = torch.linspace(1, 2, output.numel(), dtype=x.dtype).view_as(output)
    gradients = torch.autograd.grad(output, list(wanted.values()), weights)
    return {"output": output.detach()} | {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
