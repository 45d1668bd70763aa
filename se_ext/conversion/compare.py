"""How much what a conversion gives may differ from what the original gave, both in float64."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Of the largest value. Float64 rounds at 1e-16, and a network multiplies that by some thousands; but the slope of
# ATen's hardsigmoid, 1/6, is in float32.
TOLERANCE = 1e-6
Results = dict[str, Tensor]
"""Tensors by name; gradients have names that begin with "gradient"."""


def largest_difference(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor. A gradient can be zero but for rounding
    (that of a bias in front of a batch norm): a thousandth of the largest gradient stands for what is smaller."""
    floor = 1e-3 * max((_largest(t) for name, t in expected.items() if name.startswith("gradient")), default=0.0)
    return max(
        _relative(results[name], t, floor if name.startswith("gradient") else 0.0) for name, t in expected.items()
    )


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _relative(result: Tensor, expected: Tensor, floor: float) -> float:
    difference, largest = _largest(result - expected), max(_largest(expected), floor)
    return difference / largest if largest > 0 else difference
