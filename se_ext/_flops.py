"""What torch.utils.flop_counter counts for the ops: the matrix products of the excitation's two layers, as it does for
the plain block with its two convolutions or linear layers. It counts neither elementwise work nor pooling, so the other
ops have no formula.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def layer(rows: int, weight: Sequence[int]) -> int:
    """A multiplication and an addition per row and weight; a gradient's product takes as many."""
    return 2 * rows * prod(weight)


# The formulas take an op's arguments, with tensors' shapes in the place of tensors.


def forward(input: Sequence[int], w1: Sequence[int], b1: Any, w2: Sequence[int], *others: Any, **named: Any) -> int:
    """Of the ops that begin with the map (or its means z) and the excitation's tensors."""
    return layer(input[0], w1) + layer(input[0], w2)


def bn_forward(
    input: Sequence[int],
    bn_weight: Any,
    bn_bias: Any,
    w1: Sequence[int],
    b1: Any,
    w2: Sequence[int],
    *others: Any,
    **named: Any,
) -> int:
    return forward(input, w1, b1, w2)


def backward(
    grad_output: Any,
    input: Sequence[int],
    w1: Sequence[int],
    b1: Any,
    w2: Sequence[int],
    *others: Any,
    **named: Any,
) -> int:
    input_wanted, w1_wanted, b1_wanted, w2_wanted = mask_of(others, named)[:4]
    return layers_backward(input[0], w1, w2, input_wanted, w1_wanted, b1_wanted, w2_wanted)


def bn_backward(
    grad_output: Any,
    input: Sequence[int],
    bn_weight: Any,
    bn_bias: Any,
    w1: Sequence[int],
    b1: Any,
    w2: Sequence[int],
    *others: Any,
    **named: Any,
) -> int:
    input_wanted, bn_weight_wanted, bn_bias_wanted, w1_wanted, b1_wanted, w2_wanted = mask_of(others, named)[:6]
    z_wanted = input_wanted or bn_weight_wanted or bn_bias_wanted
    return layers_backward(input[0], w1, w2, z_wanted, w1_wanted, b1_wanted, w2_wanted)


def mask_of(others: tuple[Any, ...], named: dict[str, Any]) -> Sequence[bool]:
    """The last argument of every backward op: which gradients are wanted."""
    return named["mask"] if "mask" in named else others[-1]


def layers_backward(
    rows: int,
    w1: Sequence[int],
    w2: Sequence[int],
    z_wanted: bool,
    w1_wanted: bool,
    b1_wanted: bool,
    w2_wanted: bool,
) -> int:
    hidden_wanted = z_wanted or w1_wanted or b1_wanted
    return layer(rows, w1) * (z_wanted + w1_wanted) + layer(rows, w2) * (hidden_wanted + w2_wanted)


FORMULAS: dict[str, Callable[..., int]] = {
    "excite": forward,
    "squeeze_excite": forward,
    "squeeze_excite_": forward,
    "bn_squeeze_excite": bn_forward,
    "_excite_forward": forward,
    "_squeeze_excite_forward": forward,
    "_bn_squeeze_excite_forward": bn_forward,
    "_excite_backward": backward,
    "_squeeze_excite_backward": backward,
    "_bn_squeeze_excite_backward": bn_backward,
}


def add_formulas(counter: Any) -> None:
    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.se_ext, name)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


class CounterFinder:
    """Adds the formulas once torch's counter is imported. To import it here would cost every program milliseconds, and
    where there is a GPU the import of Triton."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_add(module: ModuleType) -> None:
            load(module)
            add_formulas(module)

        spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def register() -> None:
    """For the counter, whether it is imported already or will be."""
    if COUNTER in sys.modules:
        add_formulas(sys.modules[COUNTER])
    sys.meta_path.insert(0, CounterFinder())
