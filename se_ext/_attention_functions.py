"""The SE block's relatives as functions. Each computes a scale in another way; the passes over the map are the ops'.

They run where the ops run: eager, autograd, autocast, torch.compile, torch.export and TorchScript.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._attention_parts import (
    activated,
    channels_of,
    check_dtype,
    gated,
    linear,
    maximum,
    pooled,
    projection,
    rescale_points,
    scale_shift,
)
from .functional import excite, rescale, squeeze, squeeze_excite

# TorchScript reads these annotations, so they say Optional[Tensor].
# It adds lists, and unpacks none.
# ruff: noqa: UP045, RUF005


def effective_squeeze_excite(
    input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, gate: str = "hardsigmoid", pool: str = "mean"
) -> Tensor:
    r"""Effective Squeeze-and-Excitation, one layer from C to C: y = s ⊙ input, s = gate(weight · z + bias).

    z is the mean over the spatial dims; with pool="mixed" z = (mean + maximum) / 2.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        weight: [C, C] or [C, C, 1, 1]; of input's dtype, or float32 beside a half-typed input.
        bias: [C] or None, of weight's dtype.
        gate: sigmoid, hardsigmoid, tanh, relu or identity.
        pool: mean or mixed. Where points share a maximum, one of them gets its gradient.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Lee and Park 2020, "CenterMask: Real-Time Anchor-Free Instance Segmentation", section 3.3. The mixed pool is
    timm's (`add_maxpool`).

    Example:
        >>> import torch, se_ext
        >>> x = torch.tensor([[[1.0, 3.0], [2.0, 6.0]]])
        >>> se_ext.effective_squeeze_excite(x, torch.zeros(2, 2), torch.tensor([0.0, 3.0]))  # s = (1/2, 1)
        tensor([[[0.5000, 1.5000],
                 [2.0000, 6.0000]]])
    """
    op = "effective_squeeze_excite"
    channels = channels_of(op, input)
    t = linear(op, ("weight", "bias"), channels, pooled(op, input, pool), weight, bias)
    return rescale(input, gated(op, gate, t))


def channel_attention(
    input: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: str = "relu",
    gate: str = "sigmoid",
    pool: str = "mean",
    gain: float = 1.0,
) -> Tensor:
    r"""Squeeze-and-Excitation with another squeeze, or with a constant times the gate: y = gain · s ⊙ input.

    With mlp(z) = w2 · activation(w1 · z + b1) + b2:

    pool="mean"    s = gate(mlp(mean))                     the SE block
    pool="mixed"   s = gate(mlp((mean + maximum) / 2))     timm's add_maxpool
    pool="both"    s = gate(mlp(mean) + mlp(maximum))      the channel half of CBAM

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        w1: [M, C] or [M, C, 1, 1]; of input's dtype, or float32 beside a half-typed input.
        b1: [M] or None.
        w2: [C, M] or [C, M, 1, 1].
        b2: [C] or None.
        activation: of the squeezed layer: identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, sigmoid.
        gate: sigmoid, hardsigmoid, tanh, relu or identity.
        pool: mean, mixed or both. Where points share a maximum, one of them gets its gradient.
        gain: the constant (2 in an NFNet).

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape or device that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Woo et al. 2018, "CBAM: Convolutional Block Attention Module", section 3.1, equation 2 (both); Brock et al.
    2021, "High-Performance Large-Scale Image Recognition Without Normalization", section 4.1 (gain).

    Example:
        >>> import torch, se_ext
        >>> x, w1, w2 = torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 1), torch.ones(1, 1)
        >>> se_ext.channel_attention(x, w1, None, w2, None, gate="identity", pool="both")  # s = 2 + 3
        tensor([[[ 5., 15.]]])
    """
    op = "channel_attention"
    channels_of(op, input)
    if pool == "mean":
        if gain == 1.0:
            return squeeze_excite(input, w1, b1, w2, b2, activation, gate)
        # The factor per sample that stochastic depth uses: the gain costs no pass.
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        gains = torch.full([input.size(0)], gain, dtype=dtype, device=input.device)
        return _ops.squeeze_excite_behind_activation(
            input, None, (w1, b1, w2, b2), "identity", activation, gate, None, "identity", gains
        )
    if pool == "both":
        # Both vectors in one product.
        z = torch.cat([squeeze(input), maximum(input)])
        t = excite(z, w1, b1, w2, b2, activation, "identity")
        scale = gated(op, gate, t[: input.size(0)] + t[input.size(0) :])
    else:
        scale = excite(pooled(op, input, pool), w1, b1, w2, b2, activation, gate)
    return rescale(input, scale if gain == 1.0 else gain * scale)


def efficient_channel_attention(input: Tensor, weight: Tensor, gate: str = "sigmoid", circular: bool = False) -> Tensor:
    r"""Efficient Channel Attention: the excitation is a convolution over the channels.

    y = s ⊙ input, s[n, c] = gate(Σ_j weight[j] · z[n, c + j - k // 2]), z the mean over the spatial dims.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        weight: [1, 1, k], k odd; of input's dtype, or float32 beside a half-typed input.
        gate: sigmoid, hardsigmoid, tanh, relu or identity.
        circular: whether the first channel is the neighbour of the last one, else the border is 0.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Wang et al. 2020, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    section 3.2. The circular border is timm's (`CecaModule`).

    Example:
        >>> import torch, se_ext
        >>> x, weight = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]])
        >>> se_ext.efficient_channel_attention(x, weight, gate="identity")  # s = (2, 3, 0)
        tensor([[[2., 2.],
                 [6., 6.],
                 [0., 0.]]])
    """
    op = "efficient_channel_attention"
    channels_of(op, input)
    if weight.dim() != 3 or weight.size(0) != 1 or weight.size(1) != 1 or weight.size(2) % 2 == 0:
        raise RuntimeError(f"{op}: expected weight of shape [1, 1, k] with an odd k, got {list(weight.shape)}")
    check_dtype(op, "weight", weight, input)
    z = squeeze(input).to(weight.dtype).unsqueeze(1)
    border = weight.size(2) // 2
    if circular:
        t = torch.conv1d(F.pad(z, [border, border], mode="circular"), weight)
    else:
        t = torch.conv1d(z, weight, padding=border)
    return rescale(input, gated(op, gate, t.squeeze(1)))


def gather_excite(input: Tensor, extent: int = 0, gate: str = "sigmoid") -> Tensor:
    r"""Gather-Excite without parameters: y = gate(the mean around each point) ⊙ input.

    extent=0: the mean is that of the whole map. Else it is taken over windows of 2 · extent - 1 points in each dim, at
    every extent-th point (points outside of the map do not count), and each point takes the mean that is nearest to it,
    as torch.nn.functional.interpolate does.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16. With an extent, 3 spatial
            dims must be as large as a window.
        extent: 0 (global) or an even number.
        gate: sigmoid, hardsigmoid, tanh, relu or identity.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: an input of another rank. TypeError: a dtype. ValueError: an unknown name, an odd extent.

    Source: Hu et al. 2018, "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks", section 3.2.

    Example:
        >>> import torch, se_ext
        >>> se_ext.gather_excite(torch.tensor([[[1.0, 3.0]]]), gate="identity")
        tensor([[[2., 6.]]])
    """
    op = "gather_excite"
    channels_of(op, input)
    if extent < 0 or extent % 2 != 0:
        raise ValueError(f"{op}: expected extent to be 0 or an even number, got {extent}")
    if extent == 0:
        return rescale(input, gated(op, gate, squeeze(input)))
    kernel, padding = 2 * extent - 1, extent - 1
    if input.dim() == 3:
        means = F.avg_pool1d(input, kernel, extent, padding, count_include_pad=False)
    elif input.dim() == 4:
        means = F.avg_pool2d(input, kernel, extent, padding, count_include_pad=False)
    else:
        means = F.avg_pool3d(input, kernel, extent, padding, count_include_pad=False)
    # The gate before the interpolation: on fewer points, with the same values.
    return input * F.interpolate(gated(op, gate, means), input.shape[2:])


def spatial_squeeze_excite(
    input: Tensor, weight: Tensor, bias: Optional[Tensor] = None, gate: str = "sigmoid"
) -> Tensor:
    r"""Spatial Squeeze-and-Excitation: y[n, c, p] = q[n, p] · input[n, c, p].

    q[n, p] = gate(Σ_c weight[c] · input[n, c, p] + bias)

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        weight: [1, C] or [1, C, 1, 1]; of input's dtype, or float32 beside a half-typed input.
        bias: [1] or None, of weight's dtype.
        gate: sigmoid, hardsigmoid, tanh, relu or identity.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Roy et al. 2018, "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks",
    section 2.2 (sSE).

    Example:
        >>> import torch, se_ext
        >>> x = torch.tensor([[[1.0, 3.0], [2.0, 6.0]]])
        >>> se_ext.spatial_squeeze_excite(x, torch.tensor([[1.0, 0.0]]), gate="identity")  # q = (1, 3)
        tensor([[[ 1.,  9.],
                 [ 2., 18.]]])
    """
    op = "spatial_squeeze_excite"
    return rescale_points(input, gated(op, gate, projection(op, ("weight", "bias"), input, weight, bias)))


def concurrent_squeeze_excite(
    input: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    spatial_weight: Tensor,
    spatial_bias: Optional[Tensor] = None,
    activation: str = "relu",
) -> Tensor:
    r"""Concurrent spatial and channel Squeeze-and-Excitation (scSE): y = s ⊙ input + q ⊙ input.

    s [N, C] is the excitation of squeeze_excite, q [N, *spatial] that of spatial_squeeze_excite, both with a sigmoid.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        w1: [M, C] or [M, C, 1, 1]; of input's dtype, or float32 beside a half-typed input; so all weights.
        b1: [M] or None.
        w2: [C, M] or [C, M, 1, 1].
        b2: [C] or None.
        spatial_weight: [1, C] or [1, C, 1, 1].
        spatial_bias: [1] or None.
        activation: of the squeezed layer: identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, sigmoid.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape or device that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Roy et al. 2018, "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks",
    section 2.3. The paper's scSE takes the sum, as segmentation_models_pytorch's SCSEModule does.

    Example:
        >>> import torch, se_ext
        >>> x = torch.tensor([[[1.0, 3.0]]])
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> se_ext.concurrent_squeeze_excite(x, one, None, zero, None, zero)  # s = q = 1/2
        tensor([[[1., 3.]]])
    """
    names = ("spatial_weight", "spatial_bias")
    q = torch.sigmoid(projection("concurrent_squeeze_excite", names, input, spatial_weight, spatial_bias))
    return squeeze_excite(input, w1, b1, w2, b2, activation, "sigmoid", rescale_points(input, q))


def scale_shift_squeeze_excite(
    input: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: str = "relu",
    residual: Optional[Tensor] = None,
    post_activation: str = "identity",
) -> Tensor:
    r"""Squeeze-and-Excitation that gives a scale and a shift: y = post_activation(sigmoid(s) ⊙ input + t + residual).

    (s, t) = w2 · activation(w1 · z + b1) + b2, z the mean over the spatial dims; s is the first half.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        w1: [M, C] or [M, C, 1, 1]; of input's dtype, or float32 beside a half-typed input; so all weights.
        b1: [M] or None.
        w2: [2C, M] or [2C, M, 1, 1].
        b2: [2C] or None.
        activation: of the squeezed layer: identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, sigmoid.
        residual: None, or of input's shape and dtype: the shortcut.
        post_activation: any activation, applied last.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Leela Chess Zero, "Neural network topology" (the documentation of lc0), the SE layer of its residual block.

    Example:
        >>> import torch, se_ext
        >>> x, w1, w2 = torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 1), torch.tensor([[0.0], [5.0]])
        >>> se_ext.scale_shift_squeeze_excite(x, w1, None, w2, None)  # z = 2: x / 2 + 10
        tensor([[[10.5000, 11.5000]]])
    """
    op = "scale_shift_squeeze_excite"
    channels = channels_of(op, input)
    hidden = activated(op, activation, linear(op, ("w1", "b1"), None, squeeze(input), w1, b1))
    both = linear(op, ("w2", "b2"), 2 * channels, hidden, w2, b2)
    return scale_shift(input, both, residual, post_activation)


def masked_squeeze(input: Tensor, mask: Tensor) -> Tensor:
    r"""The mean over the valid points: z[n, c] = Σ_p input[n, c, p] / (number of valid p), over the valid p.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16. Finite at the other points
            too: they are multiplied by 0.
        mask: [N, *spatial], bool; True: valid.

    Returns:
        [N, C], of input's dtype. NaN for a sample without a valid point.

    Raises:
        RuntimeError: a shape that does not fit. TypeError: a mask that is not bool.

    Source: Hu et al. 2017, section 3.1, equation 2, over a part of the points; SpeechBrain's SEBlock.

    Example:
        >>> import torch, se_ext
        >>> x = torch.tensor([[[1.0, 3.0, 100.0]]])
        >>> se_ext.masked_squeeze(x, torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """
    op = "masked_squeeze"
    channels_of(op, input)
    expected = [input.size(0)] + list(input.shape[2:])
    if list(mask.shape) != expected:
        raise RuntimeError(f"{op}: expected mask of shape {expected}, got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: expected mask of dtype torch.bool, got {mask.dtype}")
    # The mean over all points first: float16 may not hold the sum.
    z = squeeze(input * mask.unsqueeze(1))
    flat = mask.flatten(1)
    valid = flat.sum(1, keepdim=True, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)
    return (z * (flat.size(1) / valid)).to(input.dtype)


def masked_squeeze_excite(
    input: Tensor,
    mask: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    r"""Squeeze-and-Excitation whose squeeze is the mean over the valid points: y = s ⊙ input,
    s = excite(masked_squeeze(input, mask), …). All points are rescaled.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        mask: [N, *spatial], bool; True: valid. length_mask makes one of lengths.
        w1: [M, C] or [M, C, 1, 1]; of input's dtype, or float32 beside a half-typed input.
        b1: [M] or None.
        w2: [C, M] or [C, M, 1, 1].
        b2: [C] or None.
        activation: of the squeezed layer: identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, sigmoid.
        gate: sigmoid, hardsigmoid, tanh, relu or identity.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape or device that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Hu et al. 2017, section 3, over a part of the points; Desplanques et al. 2020, "ECAPA-TDNN", section 3.2.

    Example:
        >>> import torch, se_ext
        >>> x, mask = torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[True, True, False]])
        >>> one = torch.ones(1, 1)
        >>> se_ext.masked_squeeze_excite(x, mask, one, None, one, None, gate="identity")  # s = 2
        tensor([[[ 2.,  6., 18.]]])
    """
    return rescale(input, excite(masked_squeeze(input, mask), w1, b1, w2, b2, activation, gate))


def length_mask(lengths: Tensor, size: int, relative: bool = False) -> Tensor:
    r"""The valid points of sequences: mask[n, p] = p < lengths[n], or p < lengths[n] · size where relative.

    Args:
        lengths: [N]; numbers of points, or parts of `size` (SpeechBrain's) where relative.
        size: the number of points of the longest sequence.
        relative: which of the two.

    Returns:
        [N, size], bool.

    Raises:
        RuntimeError: lengths of another rank.

    Source: SpeechBrain's length_to_mask.

    Example:
        >>> import torch, se_ext
        >>> se_ext.length_mask(torch.tensor([1, 3]), 3)
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    if lengths.dim() != 1:
        raise RuntimeError(f"length_mask: expected lengths of shape [N], got {list(lengths.shape)}")
    limits = lengths * size if relative else lengths
    return torch.arange(size, device=lengths.device).unsqueeze(0) < limits.unsqueeze(1)
