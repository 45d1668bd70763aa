"""The ops as functions. They run under eager, autograd, autocast, torch.compile, torch.export and TorchScript.

Formula and shapes follow Hu et al., "Squeeze-and-Excitation Networks" (2017), section 3: squeeze is equation 2,
excite equation 3, rescale equation 4. The depthwise convolution is the block's neighbour in MobileNet, EfficientNet and
their relatives.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import _ops

# TorchScript reads these annotations, so they say Optional[Tensor]; and it has no keyword-only arguments with defaults.
# It knows no overloads, so these functions call the ops by name.
# ruff: noqa: UP045


def squeeze(input: Tensor) -> Tensor:
    r"""Global average pool over the spatial dims: z[n, c] = (1 / P) Σ_p input[n, c, p].

    Summed in float32 for half types (so that a float16 map whose sum passes 65504 is right), in an order that does
    not depend on the batch or on the number of threads.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims of P points in all; float32, float64, bfloat16 or float16;
            contiguous, channels_last and channels_last_3d are read as they are, other strides through one copy.

    Returns:
        [N, C], of input's dtype. NaN where P = 0, as torch.mean gives.

    Raises:
        RuntimeError: input of another rank. TypeError: of another dtype.

    Source: Hu et al. 2017, section 3.1, equation 2.

    Example:
        >>> import torch, se_ext
        >>> se_ext.squeeze(torch.tensor([[[1.0, 3.0], [2.0, 6.0]]]))
        tensor([[2., 4.]])
    """
    return torch.ops.se_ext.squeeze(input)


def excite(
    z: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    r"""The excitation: s = gate(w2 · activation(w1 · z + b1) + b2).

    Runs in float32 for half types, in float64 for float64.

    Args:
        z: [N, C], the squeezed map; float32, float64, bfloat16 or float16.
        w1: [M, C] or [M, C, 1, 1], M the squeezed width (C / r); of z's dtype, or float32 beside a half-typed z.
        b1: [M] or None, of w1's dtype.
        w2: [C, M] or [C, M, 1, 1], of w1's dtype.
        b2: [C] or None, of w1's dtype.
        activation: identity, relu, relu6, silu, gelu, hardswish, leaky_relu (slope 0.01), tanh or sigmoid.
        gate: sigmoid, hardsigmoid, tanh, relu, identity or double_sigmoid (2 sigmoid).

    Returns:
        [N, C], the scale per sample and channel, of z's dtype.

    Raises:
        RuntimeError: a shape or device that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Hu et al. 2017, section 3.2, equation 3.

    Example:
        >>> import torch, se_ext
        >>> z, w1, w2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0], [-4.0]])
        >>> se_ext.excite(z, w1, None, w2, None, gate="identity")
        tensor([[ 2., -4.]])
    """
    return torch.ops.se_ext.excite(z, w1, b1, w2, b2, activation, gate)


def rescale(
    input: Tensor, scale: Tensor, residual: Optional[Tensor] = None, post_activation: str = "identity"
) -> Tensor:
    r"""Reweights the channels: y = post_activation(scale ⊙ input + residual), in one pass.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        scale: [N, C], of input's dtype, or float32 beside a half-typed input.
        residual: None, or of input's shape and dtype.
        post_activation: identity, relu, relu6, silu, gelu, hardswish, leaky_relu (slope 0.01), tanh or sigmoid.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape or device that does not fit. TypeError: a dtype. ValueError: an unknown name.

    Source: Hu et al. 2017, section 3.2, equation 4.

    Example:
        >>> import torch, se_ext
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> se_ext.rescale(x, torch.tensor([[2.0, -1.0]]), post_activation="relu")
        tensor([[[2., 4.],
                 [0., 0.]]])
    """
    return torch.ops.se_ext.rescale(input, scale, residual, post_activation)


def squeeze_excite(
    input: Tensor,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Optional[Tensor] = None,
    post_activation: str = "identity",
    inplace: bool = False,
    pre_bias: Optional[Tensor] = None,
    pre_activation: str = "identity",
) -> Tensor:
    r"""The whole Squeeze-and-Excitation block, fused.

    z = squeeze(u); s = excite(z, w1, b1, w2, b2); y = post_activation(s ⊙ u + residual), where u is input, or
    pre_activation(input + pre_bias): what is left at inference of a batch norm folded into the convolution, and the
    activation behind it. The batch is worked on in chunks that stay in cache from the squeeze to the rescale. For
    backward, input and small tensors [N, C] and [N, M] are kept; with a residual and a post_activation also the output,
    or the residual where the slope does not follow from the output (silu, gelu, hardswish); nothing else of input's
    size.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16; contiguous,
            channels_last and channels_last_3d natively, other strides through one copy.
        w1: [M, C] or [M, C, 1, 1]; of input's dtype, or float32 beside a half-typed input.
        b1: [M] or None.
        w2: [C, M] or [C, M, 1, 1].
        b2: [C] or None.
        activation: of the squeezed layer: identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, sigmoid.
        gate: sigmoid, hardsigmoid, tanh, relu, identity or double_sigmoid (2 sigmoid).
        residual: None, or of input's shape and dtype: the shortcut that is added after the rescale.
        post_activation: any activation, applied last.
        inplace: write the result into input. Inference only, and without a pre_bias or pre_activation.
        pre_bias: [C] or None, added before pre_activation; of input's dtype, or float32 beside a half-typed input.
        pre_activation: any activation, applied to input before the squeeze.

    Returns:
        Of input's shape, dtype and memory format; input itself if inplace.

    Raises:
        RuntimeError: a shape or device that does not fit; inplace while an argument requires grad and grad mode is
            on. TypeError: a dtype. ValueError: an unknown name; inplace with a pre_bias or a pre_activation.

    Source: Hu et al. 2017, section 3, equations 2 to 4.

    Example:
        >>> import torch, se_ext
        >>> x = torch.ones(1, 2, 4, 4)
        >>> y = se_ext.squeeze_excite(x, torch.ones(1, 2), None, torch.zeros(2, 1), None)
        >>> y.shape, y[0, 0, 0, 0]  # sigmoid(0) = 1/2
        (torch.Size([1, 2, 4, 4]), tensor(0.5000))
    """
    if pre_bias is not None or pre_activation != "identity":
        if inplace:
            raise ValueError("squeeze_excite: expected inplace=False with a pre_bias or a pre_activation, got True")
        return _ops.squeeze_excite_behind_activation(
            input, pre_bias, (w1, b1, w2, b2), pre_activation, activation, gate, residual, post_activation, None
        )
    if inplace:
        torch.ops.se_ext.squeeze_excite_(input, w1, b1, w2, b2, activation, gate, residual, post_activation)
        return _ops.written(input)
    return torch.ops.se_ext.squeeze_excite(input, w1, b1, w2, b2, activation, gate, residual, post_activation)


def bn_squeeze_excite(
    input: Tensor,
    bn_weight: Optional[Tensor],
    bn_bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_activation: str = "identity",
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Optional[Tensor] = None,
    post_activation: str = "identity",
    drop_scale: Optional[Tensor] = None,
) -> Tensor:
    r"""Batch norm, activation, Squeeze-and-Excitation, shortcut and activation, fused.

    u = pre_activation(bn_weight ⊙ (input - mean) / sqrt(var + eps) + bn_bias)
    y = post_activation(drop_scale ⊙ s ⊙ u + residual),  s = excite(squeeze(u), w1, b1, w2, b2)

    u is never written. When training, mean and var are those of the batch (var biased), gradients flow through them,
    and the running statistics are updated as torch.nn.BatchNorm2d does; else they are the running statistics. For
    backward, input and small tensors [C], [N, C] and [N, M] are kept, and with a residual and a post_activation also
    the output (or the residual, where the slope does not follow from the output); nothing else of input's size.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16.
        bn_weight: [C] or None (ones); of input's dtype, or float32 beside a half-typed input.
        bn_bias: [C] or None (zeros).
        running_mean: [C]; written when training, where it may be None; read otherwise.
        running_var: [C], likewise; written with the unbiased variance, as BatchNorm2d does.
        w1: [M, C] or [M, C, 1, 1]; of input's dtype, or float32 beside a half-typed input.
        b1: [M] or None.
        w2: [C, M] or [C, M, 1, 1].
        b2: [C] or None.
        training: normalise by the statistics of the batch.
        momentum: the part of the new statistics in the running ones.
        eps: added to the variance.
        pre_activation: between batch norm and squeeze: identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh,
            sigmoid.
        activation: of the squeezed layer, one of the same.
        gate: sigmoid, hardsigmoid, tanh, relu, identity or double_sigmoid (2 sigmoid).
        residual: None, or of input's shape and dtype: the shortcut that is added after the rescale.
        post_activation: any activation, applied last.
        drop_scale: [N] or None, multiplied into the gate: stochastic depth between the SE block and the shortcut (0 for
            a dropped sample, 1 / keep probability for the others). It gets no gradient.

    Returns:
        Of input's shape, dtype and memory format.

    Raises:
        RuntimeError: a shape or device that does not fit; no running statistics when not training.
        TypeError: a dtype. ValueError: an unknown name; one value per channel when training.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1; Hu et al. 2017, section 3 and figure 3.

    Example:
        >>> import torch, se_ext
        >>> x, shortcut = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
        >>> mean, var = torch.zeros(8), torch.ones(8)
        >>> y = se_ext.bn_squeeze_excite(
        ...     x, None, None, mean, var, torch.randn(2, 8), None, torch.randn(8, 2), None,
        ...     training=True, residual=shortcut, post_activation="relu",
        ... )
        >>> y.shape, bool((y >= 0).all())
        (torch.Size([2, 8, 4, 4]), True)
        >>> torch.allclose(mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
        True
    """
    normalization = (bn_weight, bn_bias, running_mean, running_var, None, training, momentum, eps)
    return _ops.squeeze_excite_behind_batch_norm(
        input,
        normalization,
        (w1, b1, w2, b2),
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: _ops.PerDim = 1,
    padding: _ops.Padding = 0,
    dilation: _ops.PerDim = 1,
) -> Tensor:
    r"""Depthwise convolution: each channel meets a filter of its own.

    y[n, c, o] = bias[c] + Σ_k weight[c, 0, k] input[n, c, stride o - begin + dilation k], zeros outside of the input;
    o, k, begin and the others have a value for each spatial dim. It is torch's convolution with groups = C.

    The rule of what computes it: on the CPU, kernels of se_ext where the filter is 3, 5 or 7 wide, with stride 1 or 2
    and dilation 1; ATen's convolution otherwise, and on a GPU. Wide means in the last spatial dim. The other dims may
    have any size, stride and dilation.

    Args:
        input: [N, C, *spatial], 1 to 3 spatial dims; float32, float64, bfloat16 or float16; contiguous, channels_last
            and channels_last_3d natively, other strides through one copy. Half types are summed in float32.
        weight: [C, 1, *kernel], as many dims as input; of input's dtype, or float32 beside a half-typed input.
        bias: [C] or None, of weight's dtype.
        stride: one number for all spatial dims, or one for each (the attributes of torch.nn.Conv2d fit).
        padding: zeros around the input: one number, one for each spatial dim, or two for each (begin and end, dim after
            dim); "valid": none; "same": as many as give an output of ceil(size / stride), the odd one at the end, as in
            TensorFlow at every stride and in torch at stride 1.
        dilation: one number, or one for each spatial dim: the distance between the values that a filter meets.

    Returns:
        [N, C, *out] with out = (size + begin + end - dilation (kernel - 1) - 1) // stride + 1; of input's dtype and
        memory format.

    Raises:
        RuntimeError: a shape, length or device that does not fit; a filter larger than the padded input.
        TypeError: a dtype. ValueError: another word than "same" and "valid".

    Source: Sifre 2014, "Rigid-motion scattering for image classification", section 6.2; Howard et al. 2017,
    "MobileNets", section 3.1.

    Example:
        >>> import torch, se_ext
        >>> x, weight = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]]), torch.tensor([[[1.0, 10.0, 100.0]]])
        >>> se_ext.depthwise_conv(x, weight, padding=1)
        tensor([[[210., 421., 842.,  84.]]])
        >>> se_ext.depthwise_conv(x, weight, stride=2, padding="same")  # one zero, at the end
        tensor([[[421.,  84.]]])
    """
    strides, zeros, dilations = _ops.per_dim(stride), _ops.padding_of(padding), _ops.per_dim(dilation)
    return torch.ops.se_ext.depthwise_conv(input, weight, bias, strides, zeros, dilations)
