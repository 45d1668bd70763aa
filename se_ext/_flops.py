"""What torch.utils.flop_counter counts for the ops: the matrix products of the excitation's two layers, as it does for
the plain SE block with its two convolutions or linear layers; and the depthwise convolution. It counts neither
elementwise work nor pooling, so the other ops have no formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from ._when_imported import when_imported

# The ops with matrix products of their own. (Those on running statistics call others, which are counted.)
COUNTED = (
    "excite",
    "squeeze_excite",
    "squeeze_excite_",
    "bn_squeeze_excite",
    "_bn_squeeze_excite_",
    "_excite_forward",
    "_squeeze_excite_forward",
    "_bn_squeeze_excite_forward",
    "_excite_backward",
    "_squeeze_excite_backward",
    "_bn_squeeze_excite_backward",
)


def product_flops(rows: int, weight: Sequence[int]) -> int:
    """Of a layer's matrix product: a multiplication and an addition per row and weight. A gradient's product takes as
    many."""
    return 2 * rows * prod(weight)


def formula_of(op: Any) -> Callable[..., int]:
    """What the counter calls with an op's arguments, shapes in the place of tensors. The op's schema tells their names,
    and those of the gradients that a backward op's mask asks for."""
    names = [argument.name for argument in op._schema.arguments]
    gradients = [result.name for result in op._schema.returns]

    def formula(*arguments: Any, **named: Any) -> int:
        shapes = dict(zip(names, arguments, strict=False)) | named
        rows = shapes["input" if "input" in names else "z"][0]
        first, second = product_flops(rows, shapes["w1"]), product_flops(rows, shapes["w2"])
        if "mask" not in names:
            return first + second
        wanted = {gradient for gradient, asked in zip(gradients, shapes["mask"], strict=True) if asked}
        # Backward reaches z for the gradients of what is in front of it, the hidden layer for those of w1 and b1 too.
        reaches_z = not wanted.isdisjoint(("input", "z", "bn_weight", "bn_bias"))
        reaches_hidden = reaches_z or not wanted.isdisjoint(("w1", "b1"))
        return first * (reaches_z + ("w1" in wanted)) + second * (reaches_hidden + ("w2" in wanted))

    return formula


def depthwise_conv_flops(
    input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """A multiplication and an addition per value of the output and of the filter that it meets."""
    return 2 * prod(out_shape) * prod(weight[1:])


def depthwise_conv_backward_flops(
    grad_output: Sequence[int], input: Sequence[int], weight: Sequence[int], *others: Any, **named: Any
) -> int:
    """As many again for the input's gradient, and for the weights'."""
    wants_input, wants_weight, _ = named["mask"] if "mask" in named else others[-1]
    return (wants_input + wants_weight) * depthwise_conv_flops(input, weight, out_shape=grad_output)


CONVOLUTIONS: dict[str, Callable[..., int]] = {
    "depthwise_conv": depthwise_conv_flops,
    "_depthwise_conv_backward": depthwise_conv_backward_flops,
}


def add_formulas(counter: Any) -> None:
    """To torch.utils.flop_counter, the module."""
    for name in COUNTED:
        packet = getattr(torch.ops.se_ext, name)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula_of(packet.default))
    for name, formula in CONVOLUTIONS.items():
        packet = getattr(torch.ops.se_ext, name)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


def register() -> None:
    """Adds the formulas to the counter, whether it is imported already or will be."""
    when_imported("torch.utils.flop_counter", add_formulas)
