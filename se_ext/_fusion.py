"""The fused ops, given modules: what modules.py and models.py call in place of the modules they hold.

On a small map nn.Module's call and attribute look-up would take longer than the kernels do, so the tensors are taken
straight from the modules' dictionaries.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

# TorchScript reads scripted_tail's annotations, so they say Optional[Tensor].
# ruff: noqa: UP045


def parameters_of(layer: Any) -> tuple[Tensor, Optional[Tensor]]:
    """Weight and bias of a layer; a weight that is no plain parameter (parametrize, pruning) is looked up the usual
    way."""
    try:
        return layer._parameters["weight"], layer._parameters["bias"]
    except KeyError:
        return layer.weight, layer.bias


def is_fusible(bn: Any) -> bool:
    """Whether the kernels compute the module's formula: not SyncBatchNorm's, and not that of a subclass."""
    return type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def scripted_tail(
    input: Tensor,
    bn_weight: Optional[Tensor],
    bn_bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    num_batches_tracked: Optional[Tensor],
    momentum: Optional[float],
    eps: float,
    training: bool,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    pre_activation: str,
    activation: str,
    gate: str,
    residual: Optional[Tensor],
    post_activation: str,
    drop_scale: Optional[Tensor],
) -> Tensor:
    """bn_squeeze_excite with what a BatchNorm2d and a SqueezeExcitation hold (TorchScript passes no modules).

    Like BatchNorm2d's forward it counts the batches, averages over all of them where momentum is None, and uses the
    batch's statistics where it has no others.
    """
    return torch.ops.se_ext._bn_squeeze_excite_running(
        input,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        num_batches_tracked,
        w1,
        b1,
        w2,
        b2,
        training or (running_mean is None and running_var is None),
        momentum,
        eps,
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )


def tail(
    bn: Any,
    se: Any,
    input: Tensor,
    residual: Tensor | None,
    drop_scale: Tensor | None,
    pre_activation: str,
    post_activation: str,
) -> Tensor:
    """What scripted_tail computes, given the modules; around a batch norm whose formula the kernels do not compute
    (SyncBatchNorm, subclasses), the normalisation is a pass of its own and the rest is fused."""
    w1, b1 = parameters_of(se._modules["fc1"])
    w2, b2 = parameters_of(se._modules["fc2"])
    if not is_fusible(bn):
        output, _, _ = torch.ops.se_ext.bn_squeeze_excite(
            bn(input),
            None,
            None,
            w1,
            b1,
            w2,
            b2,
            batch_statistics=False,
            pre_activation=pre_activation,
            activation=se.activation,
            gate=se.scale_activation,
            residual=residual,
            post_activation=post_activation,
            drop_scale=drop_scale,
        )
        return output
    weight, bias = parameters_of(bn)
    buffers = bn._buffers
    return scripted_tail(
        input,
        weight,
        bias,
        buffers["running_mean"],
        buffers["running_var"],
        buffers["num_batches_tracked"],
        bn.momentum,
        bn.eps,
        bn.training,
        w1,
        b1,
        w2,
        b2,
        pre_activation,
        se.activation,
        se.scale_activation,
        residual,
        post_activation,
        drop_scale,
    )


def batch_norm(bn: Any, activation: Any, input: Tensor) -> Tensor:
    """activation(bn(input)), fused where the kernels compute both; activation is a module, or None for none."""
    if (activation is not None and type(activation) is not nn.ReLU) or not is_fusible(bn):
        output = bn(input)
        return output if activation is None else activation(output)
    weight, bias = parameters_of(bn)
    buffers = bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    return torch.ops.se_ext._bn_activation_running(
        input,
        weight,
        bias,
        mean,
        var,
        buffers["num_batches_tracked"],
        bn.training or (mean is None and var is None),
        bn.momentum,
        bn.eps,
        "identity" if activation is None else "relu",
    )
