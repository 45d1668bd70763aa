"""The residual blocks of SE-ResNet and SE-ResNeXt, with the tail (batch norm, SE block, shortcut, ReLU) as one op, and
every other batch norm as one with the ReLU behind it.

Under TorchScript the other batch norms are left as they are, for torch.jit.freeze to fold into the convolutions.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from ._fusion import batch_norm, tail
from ._known import check_scriptable, normalization_from
from ._ops import Normalization
from .modules import SqueezeExcitation

# TorchScript reads forward's annotations, so they say Optional[Tensor].
# ruff: noqa: UP045


def squeezed_width(channels: int, reduction: float) -> int:
    """The squeezed width of timm's SEModule: channels / reduction to the nearest multiple of 8, at least 8."""
    return max(8, int(channels / reduction + 4) // 8 * 8)


class Projection(nn.Sequential):
    """The shortcut where a residual block changes the shape: 1x1 convolution, batch norm.

    Shape: [N, in_channels, H, W] → [N, channels, H / stride, W / stride], rounded up.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            return batch_norm(modules["1"], None, modules["0"](input))
        for module in self:
            input = module(input)
        return input


class Residual(nn.Module):
    """What the two kinds of residual block share: the shortcut, stochastic depth and the tail."""

    expansion: int
    if TYPE_CHECKING:  # TorchScript wants annotated modules to be interfaces
        se: SqueezeExcitation

    def set_shortcut(self, downsample: nn.Module | None, drop_path: float) -> None:
        """Called last: timm's order of the parameters, on which an optimizer's checkpoint and the random numbers of the
        initialisation depend."""
        self.downsample = downsample
        self.drop_path = drop_path

    def last_batch_norm(self) -> nn.BatchNorm2d:
        """The one in front of the SE block."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> "Residual":
        modules: Any = self._modules
        check_scriptable(self, self.last_batch_norm(), modules["se"])
        return self

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def branches(self, x: Tensor) -> tuple[Optional[Tensor], Tensor]:
        """Stochastic depth and the shortcut, in timm's order."""
        return self.drop_scale(x), self.shortcut(x)

    def scripted_tail(self, input: Tensor, normalization: Normalization, x: Tensor) -> Tensor:
        """The tail in a script; input is what the last convolution gave, x the residual block's input."""
        drop_scale, shortcut = self.branches(x)
        return self.se._scripted_tail(input, normalization, "identity", drop_scale, shortcut, "relu")

    def drop_scale(self, x: Tensor) -> Optional[Tensor]:
        """[N]: 0 for a dropped sample, 1 / keep probability for the others; None where none is to be dropped."""
        if self.drop_path == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_path
        kept = x.new_empty([x.size(0)]).bernoulli_(keep)
        kept = kept + kept.new_zeros([1], dtype=torch.float32)  # half types become float32; torch.fx traces no dtype
        return kept if keep == 0.0 else kept / keep


class BasicBlock(Residual):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left), the SE block behind the second one's batch norm.

    Args:
        in_channels: of the input.
        planes: channels of both convolutions and of the output.
        stride: of the first convolution.
        downsample: makes the shortcut of the input; None: the input itself.
        reduction: C / M of the SE block; M is rounded to a multiple of 8.
        se_bias: whether the SE block's layers have biases.
        drop_path: the probability with which a sample loses the convolutions' branch in training.

    Shape: [N, in_channels, H, W] → [N, planes, H / stride, W / stride], rounded up.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        reduction: float,
        se_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = SqueezeExcitation(planes, squeezed_width(planes, reduction), bias=se_bias)
        self.set_shortcut(downsample, drop_path)

    def last_batch_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            out = batch_norm(modules["bn1"], modules["act1"], self.conv1(x))
            out = self.conv2(out)
            return tail(modules["bn2"], modules["se"], out, partial(self.branches, x), "identity", "relu")
        out = self.act1(self.bn1(self.conv1(x)))
        bn = self.bn2
        buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
        normalization = normalization_from(
            bn.weight, bn.bias, buffers, bn.training, bn.track_running_stats, bn.momentum, bn.eps
        )
        return self.scripted_tail(self.conv2(out), normalization, x)


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions (He et al. 2015, figure 5 right; stride in the 3x3; grouped as in Xie et al. 2016),
    the SE block behind the last one's batch norm.

    Args: those of BasicBlock, and
        groups: of the 3x3 convolution (the cardinality).
        base_width: channels per group and 64 planes.

    Shape: [N, in_channels, H, W] → [N, 4 planes, H / stride, W / stride], rounded up.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        *,
        groups: int,
        base_width: int,
        reduction: float,
        se_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        width = math.floor(planes * base_width / 64) * groups
        channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, squeezed_width(channels, reduction), bias=se_bias)
        self.set_shortcut(downsample, drop_path)

    def last_batch_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            out = batch_norm(modules["bn1"], modules["act1"], self.conv1(x))
            out = batch_norm(modules["bn2"], modules["act2"], self.conv2(out))
            out = self.conv3(out)
            return tail(modules["bn3"], modules["se"], out, partial(self.branches, x), "identity", "relu")
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        bn = self.bn3
        buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
        normalization = normalization_from(
            bn.weight, bn.bias, buffers, bn.training, bn.track_running_stats, bn.momentum, bn.eps
        )
        return self.scripted_tail(self.conv3(out), normalization, x)
