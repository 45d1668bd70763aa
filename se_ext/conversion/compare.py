"""How much what a conversion gives may differ from what the original gave, both in float64."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Of the largest value. Float64 rounds at 1e-16, and a network multiplies that by some thousands; but the slope of
# ATen's hardsigmoid, 1/6, is in float32.
TOLERANCE = 1e-6
Results = dict[str, Tensor]
"""Tensors by name; the first word is their kind: output, gradient, buffer, …"""


def largest_difference(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor. A gradient or a mean can be zero but for
    rounding (that of a bias in front of a batch norm, that behind one): for what is smaller than a thousandth of the
    largest of its kind, that stands."""
    largest: dict[str, float] = {}
    for name, t in expected.items():
        largest[_kind(name)] = max(_largest(t), largest.get(_kind(name), 0.0))
    return max(_relative(results[name], t, 1e-3 * largest[_kind(name)]) for name, t in expected.items())


def _kind(name: str) -> str:
    return name.split()[0]


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _relative(result: Tensor, expected: Tensor, floor: float) -> float:
    difference, largest = _largest(result - expected), max(_largest(expected), floor)
    return difference / largest if largest > 0 else difference
