"""The block behind a batch norm and an activation, as a function."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

# TorchScript reads these annotations, so they say Optional[Tensor]; and it has no keyword-only arguments with defaults,
# which training and what follows would be.
# ruff: noqa: UP045


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
        gate: sigmoid, hardsigmoid, tanh, relu or identity.
        residual: None, or of input's shape and dtype: the shortcut that is added after the rescale.
        post_activation: any activation, applied last.
        drop_scale: [N] or None, multiplied into the gate: stochastic depth between the block and the shortcut (0 for a
            dropped sample, 1 / keep probability for the others). It gets no gradient.

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
    return torch.ops.se_ext._bn_squeeze_excite_running(
        input,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        None,
        w1,
        b1,
        w2,
        b2,
        training,
        momentum,
        eps,
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )
