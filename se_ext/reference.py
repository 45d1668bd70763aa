"""The slow, obvious formula in plain torch: the tests' oracle, and a fallback to compare with.

Same names, arguments and shapes as se_ext.functional; every intermediate is a tensor, and autograd is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    # Not F.hardsigmoid: its float64 gradient is rounded to float32 (it multiplies by a float32 1/6).
    "hardsigmoid": lambda v: F.hardtanh(v + 3, 0.0, 6.0) / 6,
    "tanh": torch.tanh,
    "relu": F.relu,
    "identity": lambda v: v,
    "double_sigmoid": lambda v: 2 * torch.sigmoid(v),
}


def squeeze(input: Tensor) -> Tensor:
    """z = mean of input over its spatial dims: [N, C, *spatial] → [N, C]."""
    return input.flatten(2).mean(dim=2)


def excite(
    z: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """s = gate(W2 activation(W1 z + b1) + b2): [N, C] → [N, C]."""
    hidden = ACTIVATIONS[activation](F.linear(z, w1.flatten(1), b1))
    return GATES[gate](F.linear(hidden, w2.flatten(1), b2))


def rescale(input: Tensor, scale: Tensor, residual: Tensor | None = None, post_activation: str = "identity") -> Tensor:
    """y = post_activation(scale ⊙ input + residual)."""
    v = scale.reshape(*scale.shape, *[1] * (input.dim() - 2)) * input
    return ACTIVATIONS[post_activation](v if residual is None else v + residual)


def bn_squeeze_excite(
    input: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_activation: str = "identity",
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    post_activation: str = "identity",
    drop_scale: Tensor | None = None,
) -> Tensor:
    """u = pre(batch_norm(input)); y = rescale(u, drop_scale ⊙ excite(squeeze(u)))."""
    norm = F.batch_norm(input, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    u = ACTIVATIONS[pre_activation](norm)
    scale = excite(squeeze(u), w1, b1, w2, b2, activation, gate)
    if drop_scale is not None:
        scale = scale * drop_scale[:, None]
    return rescale(u, scale, residual, post_activation)


def squeeze_excite(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    post_activation: str = "identity",
    pre_bias: Tensor | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """u = pre(input + pre_bias); y = rescale(u, excite(squeeze(u)))."""
    if pre_bias is not None:
        input = input + pre_bias.reshape(-1, *[1] * (input.dim() - 2))
    u = ACTIVATIONS[pre_activation](input)
    scale = excite(squeeze(u), w1, b1, w2, b2, activation, gate)
    return rescale(u, scale, residual, post_activation)


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """torch's convolution with groups = C, on an input with its zeros around it."""
    spatial, kernel = input.shape[2:], weight.shape[2:]
    dims = len(spatial)

    def per_dim(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    strides, dilations = per_dim(stride), per_dim(dilation)
    if padding in ("same", (), []):
        steps = zip(spatial, kernel, strides, dilations, strict=True)
        total = [max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size, k, s, d in steps]
        pairs = [(zeros // 2, zeros - zeros // 2) for zeros in total]
    else:
        values = per_dim(0 if isinstance(padding, str) else padding)
        pairs = [(v, v) for v in values] if len(values) == dims else list(zip(values[::2], values[1::2], strict=True))
    padded = F.pad(input, [zeros for pair in reversed(pairs) for zeros in pair])  # the last dim comes first
    convolution: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolution(padded, weight, bias, strides, 0, dilations, input.shape[1])
