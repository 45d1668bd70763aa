"""The ops as this package calls them. The schemas are in csrc/library.cpp.

The two ops with most arguments are called here alone, by functions that take them in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, List, Optional, Tuple, Union  # noqa: UP035

import torch
from torch import Tensor

# TorchScript reads these annotations, so they say Optional[Tensor] and List[int].
# ruff: noqa: UP006, UP007, UP045

# Called by their overloads, which takes less time than to call them by name.
squeeze = torch.ops.se_ext.squeeze.default
rescale = torch.ops.se_ext.rescale.default
rescale_ = torch.ops.se_ext.rescale_.default
squeeze_excite = torch.ops.se_ext.squeeze_excite.default
squeeze_excite_ = torch.ops.se_ext.squeeze_excite_.default
depthwise_conv = torch.ops.se_ext.depthwise_conv.default
bn_activation_running = torch.ops.se_ext._bn_activation_running.default
bn_activation_running_ = torch.ops.se_ext._bn_activation_running_.default
bn_squeeze_excite_running_ = torch.ops.se_ext._bn_squeeze_excite_running_.default
# Called by name: TorchScript knows no overloads.
bn_squeeze_excite = torch.ops.se_ext.bn_squeeze_excite
bn_squeeze_excite_running = torch.ops.se_ext._bn_squeeze_excite_running

Excitation = tuple[Tensor, Optional[Tensor], Tensor, Optional[Tensor]]
"""w1, b1, w2, b2"""

Normalization = tuple[
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    bool,
    Optional[float],
    float,
]
"""bn_weight, bn_bias, running_mean, running_var, num_batches_tracked (each [C] or None, the last one a count), whether
to normalise by the statistics of the batch, momentum (None: the average of all batches), eps"""

# TorchScript has no Sequence, and its tuples have a length.
if TYPE_CHECKING:
    PerDim = Union[int, Sequence[int]]
    Padding = Union[str, int, Sequence[int]]
else:
    PerDim = Union[int, List[int], Tuple[int], Tuple[int, int], Tuple[int, int, int]]
    Padding = Union[str, int, List[int], Tuple[int], Tuple[int, int], Tuple[int, int, int]]


def per_dim(value: PerDim) -> List[int]:
    """A convolution's stride, padding or dilation: one value for all spatial dims, or several, as a list."""
    if isinstance(value, int):
        return [value]
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return list(value)
    if torch.jit.isinstance(value, List[int]):  # type: ignore[no-untyped-call]
        return value  # type: ignore[return-value]
    if torch.jit.isinstance(value, Tuple[int]):  # type: ignore[no-untyped-call]
        return [value[0]]
    if torch.jit.isinstance(value, Tuple[int, int]):  # type: ignore[no-untyped-call]
        return [value[0], value[1]]
    return [value[0], value[1], value[2]]


def padding_of(padding: Padding) -> List[int]:
    """The padding as the op takes it: "same" is a list of no values."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0]
        if padding != "same":
            raise ValueError(f'depthwise_conv: expected padding to be numbers, "same" or "valid", got "{padding}"')
        return []
    return per_dim(padding)


def written(input: Tensor) -> Tensor:
    """input, into which an op that returns nothing has written. In a trace it becomes the value of an op:
    torch.jit.optimize_for_inference moves a convolution in front of what writes its input, unless it takes the value
    that the write gives."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if torch._C._get_tracing_state() is not None:
            return input.transpose_(0, 0)  # changes nothing
    return input


def squeeze_excite_behind_batch_norm(
    input: Tensor,
    normalization: Normalization,
    excitation: Excitation,
    pre_activation: str,
    activation: str,
    gate: str,
    residual: Optional[Tensor],
    post_activation: str,
    drop_scale: Optional[Tensor],
) -> Tensor:
    """functional.bn_squeeze_excite with what a batch norm module holds: it counts the batches, and averages over all of
    them where momentum is None."""
    bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, batch_statistics, momentum, eps = normalization
    w1, b1, w2, b2 = excitation
    return bn_squeeze_excite_running(
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
        batch_statistics,
        momentum,
        eps,
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )


def uses_batch_statistics(normalization: Normalization) -> bool:
    return normalization[5]


def bn_activation_by_overwriting(
    input: Tensor,
    normalization: Normalization,
    activation: str,
    residual: Optional[Tensor],
    drop_scale: Optional[Tensor],
) -> Tensor:
    """bn_activation_running in input's memory, which is returned. For the statistics that are given."""
    weight, bias, running_mean, running_var, _, _, _, eps = normalization
    bn_activation_running_(input, weight, bias, running_mean, running_var, eps, activation, residual, drop_scale)
    return input


def squeeze_excite_by_overwriting(
    input: Tensor,
    normalization: Normalization,
    excitation: Excitation,
    pre_activation: str,
    activation: str,
    gate: str,
    residual: Optional[Tensor],
    post_activation: str,
    drop_scale: Optional[Tensor],
) -> Tensor:
    """squeeze_excite_behind_batch_norm in input's memory, which is returned. For the statistics that are given."""
    bn_weight, bn_bias, running_mean, running_var, _, _, _, eps = normalization
    w1, b1, w2, b2 = excitation
    bn_squeeze_excite_running_(
        input,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        w1,
        b1,
        w2,
        b2,
        eps,
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )
    return input


def squeeze_excite_behind_activation(
    input: Tensor,
    pre_bias: Optional[Tensor],
    excitation: Excitation,
    pre_activation: str,
    activation: str,
    gate: str,
    residual: Optional[Tensor],
    post_activation: str,
    drop_scale: Optional[Tensor],
) -> Tensor:
    """squeeze_excite of pre_activation(input + pre_bias), with a drop_scale [N]: the op of the batch norm, without its
    statistics and with pre_bias as its bias."""
    w1, b1, w2, b2 = excitation
    output, _, _ = bn_squeeze_excite(
        input,
        None,
        pre_bias,
        w1,
        b1,
        w2,
        b2,
        False,
        0.0,
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )
    return output
