"""What the SE block's relatives have in common: pools, layers, gates by name, and the checks of their arguments.

All of it can be scripted, so the names are taken by comparison and not from a dictionary.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import rescale, squeeze

# TorchScript reads these annotations, so they say Optional[Tensor]; it adds lists, and unpacks none.
# ruff: noqa: UP045


def maximum(input: Tensor) -> Tensor:
    """[N, C]. With gradients by max pooling, which keeps where the maximum is: backward of torch.amax compares the
    whole map again. Without, by torch.amax, which is the faster one on a contiguous map. (A trace has to be the same in
    both modes.)"""
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore
        return F.adaptive_max_pool2d(input.flatten(2).unsqueeze(2), 1).flatten(1)
    return input.flatten(2).amax(2)


def pooled(op: str, input: Tensor, pool: str) -> Tensor:
    if pool == "mean":
        return squeeze(input)
    if pool == "mixed":
        return 0.5 * squeeze(input) + 0.5 * maximum(input)
    known = "mean, mixed, both" if op == "channel_attention" else "mean, mixed"
    raise ValueError(f'{op}: expected pool to be one of {known}, got "{pool}"')


def linear(
    op: str, names: tuple[str, str], rows: Optional[int], z: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """A layer on z [N, C]; in float32 where the weights are, beside a half-typed map."""
    check_layer(op, names, weight, bias, rows, z.size(1), z)
    return F.linear(z.to(weight.dtype), weight.flatten(1), bias)


def projection(op: str, names: tuple[str, str], input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """weight · input + bias, one number a point: [N, P]. A convolution with one output channel is slow; so is a product
    whose gradient comes in another layout than the map's."""
    channels = channels_of(op, input)
    check_layer(op, names, weight, bias, 1, channels, input)
    points, row = input.flatten(2), weight.reshape(1, channels).to(input.dtype)
    if points.transpose(1, 2).is_contiguous():  # channels_last
        t = F.linear(points.transpose(1, 2), row).squeeze(2)
    else:
        t = torch.bmm(row.expand(input.size(0), 1, channels), points).squeeze(1)
    return t if bias is None else t + bias.to(t.dtype)


def rescale_points(input: Tensor, scale: Tensor) -> Tensor:
    """scale [N, P] ⊙ input, the same for all channels. With points and channels exchanged this is a rescale: a
    contiguous map [N, C, P] is a map [N, P, C, 1] in channels_last, and a channels_last map is a contiguous [N, P, C].
    """
    exchanged = input.flatten(2).transpose(1, 2)
    if not exchanged.is_contiguous():
        exchanged = exchanged.unsqueeze(3)
    output = rescale(exchanged, scale)
    if output.dim() == 4:
        output = output.squeeze(3)
    return output.transpose(1, 2).view(input.shape)


def scale_shift(input: Tensor, both: Tensor, residual: Optional[Tensor], post_activation: str) -> Tensor:
    """post_activation(sigmoid(s) ⊙ input + t + residual), s and t the halves of `both` [N, 2C]."""
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"scale_shift_squeeze_excite: expected residual of shape {list(input.shape)}, got {list(residual.shape)}"
        )
    s, t = both.chunk(2, 1)
    shift = t.to(input.dtype).reshape(list(t.shape) + [1] * (input.dim() - 2))
    shortcut = shift.expand_as(input) if residual is None else residual + shift
    return rescale(input, torch.sigmoid(s), shortcut, post_activation)


def gated(op: str, gate: str, t: Tensor) -> Tensor:
    if gate == "sigmoid":
        return torch.sigmoid(t)
    if gate == "hardsigmoid":
        return F.hardtanh(t + 3, 0.0, 6.0) / 6  # F.hardsigmoid has no second derivative
    if gate == "tanh":
        return torch.tanh(t)
    if gate == "relu":
        return F.relu(t)
    if gate == "identity":
        return t
    raise ValueError(f'{op}: expected gate to be one of sigmoid, hardsigmoid, tanh, relu, identity, got "{gate}"')


def activated(op: str, activation: str, t: Tensor) -> Tensor:
    if activation == "identity":
        return t
    if activation == "relu":
        return F.relu(t)
    if activation == "relu6":
        return F.relu6(t)
    if activation == "silu":
        return F.silu(t)
    if activation == "gelu":
        return F.gelu(t)
    if activation == "hardswish":
        return F.hardswish(t)
    if activation == "leaky_relu":
        return F.leaky_relu(t)
    if activation == "tanh":
        return torch.tanh(t)
    if activation == "sigmoid":
        return torch.sigmoid(t)
    raise ValueError(
        f"{op}: expected activation to be one of identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, "
        f'sigmoid, got "{activation}"'
    )


# ---- checks ----


def channels_of(op: str, input: Tensor) -> int:
    if input.dim() < 3 or input.dim() > 5:
        raise RuntimeError(
            f"{op}: expected input of shape [N, C, *spatial] with 1 to 3 spatial dims, got {list(input.shape)}"
        )
    return input.size(1)


def check_layer(
    op: str,
    names: tuple[str, str],
    weight: Tensor,
    bias: Optional[Tensor],
    rows: Optional[int],
    columns: int,
    input: Tensor,
) -> None:
    """A weight [rows, columns] or [rows, columns, 1, 1] and its bias [rows]; without `rows`, of as many as it has."""
    shape = list(weight.shape)
    fits = len(shape) == 2 or (len(shape) == 4 and shape[2] == 1 and shape[3] == 1)
    if not fits or shape[1] != columns or (rows is not None and shape[0] != rows):
        count = "M" if rows is None else str(rows)
        raise RuntimeError(
            f"{op}: expected {names[0]} of shape [{count}, {columns}] or [{count}, {columns}, 1, 1], got {shape}"
        )
    check_dtype(op, names[0], weight, input)
    if bias is not None and (bias.dim() != 1 or bias.size(0) != shape[0]):
        raise RuntimeError(f"{op}: expected {names[1]} of shape [{shape[0]}], got {list(bias.shape)}")


def check_dtype(op: str, argument: str, weight: Tensor, input: Tensor) -> None:
    """Of input's dtype, or float32 beside a half type."""
    half = input.dtype == torch.bfloat16 or input.dtype == torch.float16
    if weight.dtype != input.dtype and not (half and weight.dtype == torch.float32):
        expected = f"{input.dtype} or torch.float32" if half else f"{input.dtype}"
        raise TypeError(f"{op}: expected {argument} of dtype {expected}, got {weight.dtype}")
