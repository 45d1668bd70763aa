"""The activations and gates by name, and the modules and functions that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


class DoubleSigmoid(nn.Module):
    """2 sigmoid(v): a gate in (0, 2). It is 1 at v = 0, where its slope is the largest."""

    def forward(self, v: Tensor) -> Tensor:
        return 2 * torch.sigmoid(v)


# In the order in which the ops list them.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
GATES: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "double_sigmoid": DoubleSigmoid,
}
# Parameters of those modules that change the function, and the only values that the kernels compute.
_FIXED = {"negative_slope": 0.01, "approximate": "none"}
# torch.relu, torch.nn.functional.relu, torch.Tensor.relu, and the same in place: relu_.
_NAMES_OF_FUNCTIONS: dict[Any, str] = {
    getattr(namespace, function): name
    for name in ACTIVATIONS | GATES
    for namespace in (torch, nn.functional, torch.Tensor)
    for function in (name, f"{name}_")
    if hasattr(namespace, function)
}
# Values alone do not show what a module does on another day, so a stranger's class is not taken for a known formula.
_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "monai",
    "segmentation_models_pytorch",
    "efficientnet_pytorch",
    "geffnet",
    "mmcv",
    "transformers",
    "se_ext",
)
# Where a formula has two slopes, and libraries differ in which of them they take. Not 0: there ReLU's slope is 0.
_KINKS = (-3.0, 3.0, 6.0)


def name_of(argument: str, activation: str | Callable[..., Any] | None, known: dict[str, type[nn.Module]]) -> str:
    """The op's name for an activation.

    Args:
        argument: whose value it is, for the message.
        activation: a name, a module class, a module, a function, a callable that makes a module, or None (identity). A
            module of torch.nn is known by its class, one of another library by what it computes.
        known: ACTIVATIONS or GATES.

    Raises:
        ValueError: the kernels do not compute it; the message lists what they do.
    """
    if activation is None:
        return "identity"
    if isinstance(activation, str):
        if activation in known:
            return activation
        raise ValueError(f"expected {argument} to be one of {', '.join(known)}, got {activation!r}")
    name = function_name(activation)
    if name is None:
        return _module_name(argument, _made_module(argument, activation, known), known)
    if name in known:
        return name
    raise ValueError(f"{_expected(argument, known)}, got the function {name}")


def function_name(activation: Any) -> str | None:
    """The name of the activation or gate that a function of torch computes."""
    try:
        return _NAMES_OF_FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None


def _made_module(argument: str, activation: Any, known: dict[str, type[nn.Module]]) -> nn.Module:
    """The module itself, or the one that a class or another callable makes."""
    if isinstance(activation, nn.Module):
        return activation
    cause = None
    try:
        module = activation()
    except TypeError as error:  # not callable, or a function that wants a tensor
        module, cause = None, error
    if isinstance(module, nn.Module):
        return module
    raise ValueError(
        f"{_expected(argument, known)}, a function of torch or torch.nn.functional that computes one of them, "
        f"a module, or a callable that makes a module when called without arguments, got {activation!r}"
    ) from cause


def _module_name(argument: str, module: nn.Module, known: dict[str, type[nn.Module]]) -> str:
    cls = type(module)
    full_name = f"{cls.__module__}.{cls.__qualname__}"
    if _has_hooks(module):
        raise ValueError(f"expected {argument} without hooks, which would not run, got a {full_name} with hooks")
    if _is_of_a_known_library(module):
        for name, known_cls in known.items():
            if cls is known_cls:
                _check_fixed(argument, module)
                return name
        for name, known_cls in known.items():
            if _computes_the_same(module, known_cls()):
                return name
        raise ValueError(f"{_expected(argument, known)}, or to compute the same, got {full_name}")
    example = "silu" if "silu" in known else "sigmoid"
    raise ValueError(
        f"{_expected(argument, known)}, or a class of {', '.join(_LIBRARIES)} that computes the same, "
        f"got {full_name}; if that computes one of them, pass its name, e.g. {argument}={example!r}"
    )


def _expected(argument: str, known: dict[str, type[nn.Module]]) -> str:
    return f"expected {argument} to be one of {', '.join(cls.__name__ for cls in known.values())}"


def _check_fixed(argument: str, module: nn.Module) -> None:
    for attribute, value in _FIXED.items():
        if getattr(module, attribute, value) != value:
            raise ValueError(
                f"expected {argument} {type(module).__name__} with {attribute}={value!r}, "
                f"got {getattr(module, attribute)!r}"
            )


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _is_of_a_known_library(module: nn.Module) -> bool:
    """Whether what the module computes is its library's own: not where a user replaced forward, or wrote a class that
    the library only completes (torch.fx, torch.jit)."""
    cls = type(module)
    made_on_the_fly = "<locals>" in cls.__qualname__ or isinstance(module, torch.jit.ScriptModule)
    return cls.__module__.partition(".")[0] in _LIBRARIES and not made_on_the_fly and "forward" not in vars(module)


def _computes_the_same(module: nn.Module, formula: nn.Module) -> bool:
    """Whether values and gradients of both agree over a grid of points, in training and in evaluation."""
    if any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
        return False
    training = module.training
    try:
        # Two shapes, because an adaptive pooling is the identity on the one that it makes.
        return _agrees(module, formula, True, (2, 3, 17, 19)) and _agrees(module, formula, False, (3, 2, 19, 17))
    except Exception:  # what cannot be called on a map is no activation
        return False
    finally:
        module.train(training)


def _agrees(module: nn.Module, formula: nn.Module, training: bool, shape: tuple[int, ...]) -> bool:
    module.train(training)
    # A model is also built in inference mode, on the meta device or with fake tensors; the numbers here are real.
    with (
        _disable_current_modes(),
        torch.device("cpu"),
        torch.inference_mode(False),  # with it gradients are recorded
        torch.random.fork_rng(devices=[]),
    ):
        x = _points().reshape(shape)
        state = torch.random.get_rng_state()
        value, gradient = _value_and_gradient(module, x)
        if not torch.equal(torch.random.get_rng_state(), state):
            return False  # dropout, random slopes
        expected_value, expected_gradient = _value_and_gradient(formula, x)
        smooth = ~torch.isin(x, torch.tensor(_KINKS, dtype=torch.float64))
        # 1e-6: ATen's hardsigmoid has its slope, 1/6, in float32.
        return torch.allclose(value, expected_value, rtol=1e-9, atol=1e-12) and torch.allclose(
            gradient[smooth], expected_gradient[smooth], rtol=1e-6, atol=1e-9
        )


def _points() -> Tensor:
    """2 · 3 · 17 · 19 points in no order: a dense grid, large magnitudes, and the kinks with both of their sides."""
    dense = torch.linspace(-12, 12, 1907, dtype=torch.float64)
    large = torch.tensor((20.0, 50.0, 1e4, 1e8, 1e30), dtype=torch.float64)
    kinks = torch.tensor((-1.0, 0.0, 1.0, *_KINKS, -6.0), dtype=torch.float64)
    points = torch.cat((dense, large, -large, kinks, kinks - 1e-6, kinks + 1e-6))
    return points[torch.randperm(points.numel(), generator=torch.Generator().manual_seed(0))]


def _value_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = module.forward(x.clone())  # forward alone: no global hooks; a copy: an activation may work in place
    weights = torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    (gradient,) = torch.autograd.grad(value, x, weights)
    return value.detach(), gradient
