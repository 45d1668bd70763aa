"""SE-ResNet and SE-ResNeXt, with the tail of every block (batch norm, SE, shortcut, ReLU) as one op, and every other
batch norm as one with the ReLU behind it.

A batch norm, ReLU or SE module with hooks or a class of its own is called (see _fusion.py); what is around it stays
fused. `se` may be replaced by any module, or by None. Under TorchScript the other batch norms are left as they are, for
torch.jit.freeze to fold into the convolutions.

The networks, the names of their parameters and the initialisation are those of timm's models of the same names, so that
their checkpoints load as they are.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ._fusion import batch_norm, check_scriptable, scripted_tail, tail
from .modules import SqueezeExcitation

# TorchScript reads forward's annotations, so they say Optional[Tensor].
# ruff: noqa: UP045

__all__ = [
    "SEResNet",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
]


def squeezed_width(channels: int, reduction: float) -> int:
    """The hidden width of timm's SEModule: channels / reduction to the nearest multiple of 8, at least 8."""
    return max(8, int(channels / reduction + 4) // 8 * 8)


class Projection(nn.Sequential):
    """The shortcut where a block changes the shape: 1x1 convolution, batch norm."""

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
    """What the two kinds of block share: the shortcut and stochastic depth."""

    expansion: int

    def __init__(self, downsample: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        self.downsample = downsample
        self.drop_path = drop_path

    def last_batch_norm(self) -> nn.BatchNorm2d:
        raise NotImplementedError

    def __prepare_scriptable__(self) -> Residual:
        modules: Any = self._modules
        check_scriptable(self, self.last_batch_norm(), modules["se"])
        return self

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def drop_scale(self, x: Tensor) -> Optional[Tensor]:
        """[N]: 0 for a dropped sample, 1 / keep probability for the others; None where none is dropped."""
        if self.drop_path == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_path
        kept = torch.empty(x.size(0), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return kept.to(torch.float64 if x.dtype == torch.float64 else torch.float32) / keep


class BasicBlock(Residual):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left), SE behind the second one's batch norm."""

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
        super().__init__(downsample, drop_path)
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = SqueezeExcitation(planes, squeezed_width(planes, reduction), bias=se_bias)

    def last_batch_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            out = batch_norm(modules["bn1"], modules["act1"], self.conv1(x))
            out = self.conv2(out)
            return tail(modules["bn2"], modules["se"], out, self.shortcut(x), self.drop_scale(x), "identity", "relu")
        out = self.act1(self.bn1(self.conv1(x)))
        return scripted_tail(
            self.conv2(out),
            self.bn2.weight,
            self.bn2.bias,
            self.bn2.running_mean,
            self.bn2.running_var,
            self.bn2.num_batches_tracked,
            self.bn2.momentum,
            self.bn2.eps,
            self.bn2.training,
            self.bn2.track_running_stats,
            self.se.fc1.weight,
            self.se.fc1.bias,
            self.se.fc2.weight,
            self.se.fc2.bias,
            "identity",
            self.se.activation,
            self.se.scale_activation,
            self.shortcut(x),
            "relu",
            self.drop_scale(x),
        )


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions (He et al. 2015, figure 5 right; stride in the 3x3; grouped as in Xie et al. 2016),
    SE behind the last one's batch norm."""

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
        super().__init__(downsample, drop_path)
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

    def last_batch_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            out = batch_norm(modules["bn1"], modules["act1"], self.conv1(x))
            out = batch_norm(modules["bn2"], modules["act2"], self.conv2(out))
            out = self.conv3(out)
            return tail(modules["bn3"], modules["se"], out, self.shortcut(x), self.drop_scale(x), "identity", "relu")
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        return scripted_tail(
            self.conv3(out),
            self.bn3.weight,
            self.bn3.bias,
            self.bn3.running_mean,
            self.bn3.running_var,
            self.bn3.num_batches_tracked,
            self.bn3.momentum,
            self.bn3.eps,
            self.bn3.training,
            self.bn3.track_running_stats,
            self.se.fc1.weight,
            self.se.fc1.bias,
            self.se.fc2.weight,
            self.se.fc2.bias,
            "identity",
            self.se.activation,
            self.se.scale_activation,
            self.shortcut(x),
            "relu",
            self.drop_scale(x),
        )


class SEResNet(nn.Module):
    r"""A residual network with Squeeze-and-Excitation in every block.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks per stage; the stages are 64, 128, 256 and 512 planes wide.
        num_classes: of the classifier `fc`.
        in_chans: channels of the images.
        reduction: C / M of the SE blocks; M is rounded to a multiple of 8.
        se_bias: whether the SE blocks' layers have biases (timm's have, the paper's have none).
        drop_path_rate: stochastic depth; the last block's drop probability, the first block's being 0.
        block_options: groups and base_width of a Bottleneck.

    Shape:
        [N, in_chans, H, W] → logits [N, num_classes]

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", table 1; He et al. 2015; Xie et al. 2016 (ResNeXt); Huang
    et al. 2016 (stochastic depth).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        reduction: float = 16,
        se_bias: bool = True,
        drop_path_rate: float = 0.0,
        **block_options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        options = {"reduction": reduction, "se_bias": se_bias, **block_options}
        blocks = sum(layers)
        drop_paths = iter([drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)])
        width = block.expansion

        def stage(in_channels: int, planes: int, stride: int, count: int) -> nn.Sequential:
            downsample = None
            if stride != 1 or in_channels != planes * width:
                downsample = Projection(in_channels, planes * width, stride)
            first = block(in_channels, planes, stride, downsample, drop_path=next(drop_paths), **options)
            others = [
                block(planes * width, planes, 1, None, drop_path=next(drop_paths), **options) for _ in range(count - 1)
            ]
            return nn.Sequential(first, *others)

        self.layer1 = stage(64, 64, 1, layers[0])
        self.layer2 = stage(64 * width, 128, 2, layers[1])
        self.layer3 = stage(128 * width, 256, 2, layers[2])
        self.layer4 = stage(256 * width, 512, 2, layers[3])
        self.fc = nn.Linear(512 * width, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming normal convolutions; each block's last batch norm starts at zero, the block as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.last_batch_norm().weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] → [N, 512 · expansion, H / 32, W / 32]"""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = self.act1(self.bn1(self.conv1(x)))
        else:
            modules: Any = self._modules
            x = batch_norm(modules["bn1"], modules["act1"], self.conv1(x))
        x = self.maxpool(x)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))


def seresnet18(**options: Any) -> SEResNet:
    """SE-ResNet-18, timm's `seresnet18`. Options: those of SEResNet."""
    return SEResNet(BasicBlock, (2, 2, 2, 2), **options)


def seresnet34(**options: Any) -> SEResNet:
    """SE-ResNet-34, timm's `seresnet34`. Options: those of SEResNet."""
    return SEResNet(BasicBlock, (3, 4, 6, 3), **options)


def seresnet50(**options: Any) -> SEResNet:
    """SE-ResNet-50, timm's `seresnet50`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 6, 3), groups=1, base_width=64, **options)


def seresnet101(**options: Any) -> SEResNet:
    """SE-ResNet-101, timm's `seresnet101`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 23, 3), groups=1, base_width=64, **options)


def seresnet152(**options: Any) -> SEResNet:
    """SE-ResNet-152, timm's `seresnet152`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 8, 36, 3), groups=1, base_width=64, **options)


def seresnext50_32x4d(**options: Any) -> SEResNet:
    """SE-ResNeXt-50 (32x4d), timm's `seresnext50_32x4d`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 6, 3), groups=32, base_width=4, **options)


def seresnext101_32x4d(**options: Any) -> SEResNet:
    """SE-ResNeXt-101 (32x4d), timm's `seresnext101_32x4d`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 23, 3), groups=32, base_width=4, **options)
