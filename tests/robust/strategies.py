"""Examples that nobody thought of: tensors in every kind of memory, and how many of them the tests try.

SE_EXT_ROBUST=<n> makes the tests in this folder n times as long as they are in the normal suite, on other random data
at every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

TIMES = int(os.environ.get("SE_EXT_ROBUST", "1"))
IS_LONG = TIMES > 1

MARGIN = 8  # values in front of a tensor and behind it


def buffer(t: Tensor, size: int) -> Tensor:
    """Values that no result may depend on."""
    filler = float("nan") if t.is_floating_point() else 7
    return torch.full((size,), filler, dtype=t.dtype)


def moved(t: Tensor, offset: int) -> Tensor:
    """At an offset from where memory is aligned."""
    flat = buffer(t, t.numel() + 2 * MARGIN)[offset : offset + t.numel()]
    return flat.view(t.shape).copy_(t)


def in_order(t: Tensor, order: list[int]) -> Tensor:
    """With its dims in another order in memory."""
    back = [order.index(d) for d in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def inside(t: Tensor, dims: list[int], step: int) -> Tensor:
    """Every step-th value of a larger tensor along some dims, and not the first."""
    sizes = [size * step + 3 if d in dims else size for d, size in enumerate(t.shape)]
    larger = buffer(t, torch.Size(sizes).numel()).view(sizes)
    for d in dims:
        larger = larger.narrow(d, 1, t.shape[d] * step).unflatten(d, (t.shape[d], step)).select(d + 1, 0)
    return larger.copy_(t)


def channels_last(t: Tensor) -> Tensor:
    return in_order(t, [0, *range(2, t.dim()), 1]) if t.dim() > 2 else t


# The same values in other memory.
SAME_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": channels_last,
    "dims reversed": lambda t: in_order(t, list(range(t.dim()))[::-1]),
    "last dims swapped": lambda t: in_order(t, [*range(t.dim() - 2), t.dim() - 1, t.dim() - 2]) if t.dim() > 1 else t,
    "first dims swapped": lambda t: in_order(t, [1, 0, *range(2, t.dim())]) if t.dim() > 1 else t,
    "offset 1": lambda t: moved(t, 1),
    "offset 3": lambda t: moved(t, 3),
    "channels last, offset 1": lambda t: channels_last_moved(t, 1),
    "every second of the last dim": lambda t: inside(t, [t.dim() - 1], 2),
    "every second of the first dim": lambda t: inside(t, [0], 2),
    "inside": lambda t: inside(t, list(range(t.dim())), 1),
    "inside, channels last": lambda t: inside_channels_last(t),
}


def channels_last_moved(t: Tensor, offset: int) -> Tensor:
    order = [0, *range(2, t.dim()), 1] if t.dim() > 2 else list(range(t.dim()))
    back = [order.index(d) for d in range(t.dim())]
    return moved(t.permute(order), offset).permute(back)


def inside_channels_last(t: Tensor) -> Tensor:
    order = [0, *range(2, t.dim()), 1] if t.dim() > 2 else list(range(t.dim()))
    back = [order.index(d) for d in range(t.dim())]
    return inside(t.permute(order).contiguous(), [t.dim() - 1], 1).permute(back)


def expanded(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, 1).expand_as(t) if t.shape[dim] > 0 else t


def overlapping(t: Tensor) -> Tensor:
    """Windows of one row, a value apart: neighbouring rows share all values but one."""
    if t.numel() == 0:
        return t
    strides = [1] * t.dim()
    strides[0], strides[1] = sum(t.shape) + 1, 2
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    row = torch.randn(reach, dtype=torch.float64).to(t.dtype)
    return row.as_strided(t.shape, strides)


# Other values, several of which share memory.
OTHER_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded channels": lambda t: expanded(t, 1),
    "expanded samples": lambda t: expanded(t, 0),
    "overlapping": overlapping,
}
