"""The activations and gates by name, and the torch.nn modules they stand for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

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
}
# Parameters of those modules that change the function, and the only values that the kernels compute.
_FIXED = {"negative_slope": 0.01, "approximate": "none"}


def name_of(argument: str, activation: str | Callable[..., nn.Module] | None, known: dict[str, type[nn.Module]]) -> str:
    """The op's name for an activation given as a name, a module class, a module, or None (identity).

    Raises ValueError for anything that the kernels do not compute.
    """
    if activation is None:
        return "identity"
    if isinstance(activation, str):
        if activation in known:
            return activation
        raise ValueError(f"expected {argument} to be one of {', '.join(known)}, got {activation!r}")
    module = activation if isinstance(activation, nn.Module) else activation()
    for name, cls in known.items():
        if type(module) is cls:
            for attribute, value in _FIXED.items():
                if getattr(module, attribute, value) != value:
                    raise ValueError(
                        f"expected {argument} {cls.__name__} with {attribute}={value!r}, "
                        f"got {getattr(module, attribute)!r}"
                    )
            return name
    classes = ", ".join(cls.__name__ for cls in known.values())
    raise ValueError(f"expected {argument} to be one of {classes}, got {type(module).__name__}")
