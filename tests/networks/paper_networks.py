"""Two networks of the SE paper's table that neither torchvision nor timm has: the smallest faithful definitions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(channels)
    )


def conv_bn_relu(in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_bn(in_channels, channels, size, stride, groups).append(nn.ReLU())


class InceptionModule(nn.Module):
    """1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3 | pooling, 1x1, one behind the other; with stride 2 without the first and the last
    1x1 (Ioffe and Szegedy 2015, "Batch Normalization", appendix)."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int], pool: str) -> None:
        super().__init__()
        one, reduce, three, double_reduce, double, projection = widths
        stride = 1 if one else 2
        pooling: nn.Module = nn.AvgPool2d(3, 1, 1) if pool == "avg" else nn.MaxPool2d(3, stride, 1)
        branches = [
            nn.Sequential(conv_bn_relu(in_channels, reduce, 1), conv_bn_relu(reduce, three, 3, stride)),
            nn.Sequential(
                conv_bn_relu(in_channels, double_reduce, 1),
                conv_bn_relu(double_reduce, double, 3),
                conv_bn_relu(double, double, 3, stride),
            ),
            nn.Sequential(pooling, conv_bn_relu(in_channels, projection, 1)) if one else pooling,
        ]
        if one:
            branches.insert(0, conv_bn_relu(in_channels, one, 1))
        self.branches = nn.ModuleList(branches)
        self.channels = one + three + double + (projection if one else in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class BNInception(nn.Module):
    """Ioffe and Szegedy 2015, appendix (figure 5), with the 128 channels behind the pooling of modules 4c and 4d (96 in
    the figure) of the Caffe model that is known by this name."""

    MODULES = (
        ((64, 64, 64, 64, 96, 32), "avg"),
        ((64, 64, 96, 64, 96, 64), "avg"),
        ((0, 128, 160, 64, 96, 0), "max"),
        ((224, 64, 96, 96, 128, 128), "avg"),
        ((192, 96, 128, 96, 128, 128), "avg"),
        ((160, 128, 160, 128, 160, 128), "avg"),
        ((96, 128, 192, 160, 192, 128), "avg"),
        ((0, 128, 192, 192, 256, 0), "max"),
        ((352, 192, 320, 160, 224, 128), "avg"),
        ((352, 192, 320, 192, 224, 128), "max"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn_relu(3, 64, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            conv_bn_relu(64, 64, 1),
            conv_bn_relu(64, 192, 3),
            nn.MaxPool2d(3, 2, 1),
        )
        modules, channels = [], 192
        for widths, pool in self.MODULES:
            modules.append(InceptionModule(channels, widths, pool))
            channels = modules[-1].channels
        self.inception = nn.Sequential(*modules)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inception(self.stem(x)).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input, or with stride 2 behind its average pooling
    (Zhang et al. 2017, "ShuffleNet", figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        width = channels // 4
        self.stride, self.groups = stride, groups
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.reduce = conv_bn_relu(in_channels, width, 1, groups=first_groups)
        self.depthwise = conv_bn(width, width, 3, stride, groups=width)
        self.expand = conv_bn(width, channels - in_channels if stride == 2 else channels, 1, groups=groups)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        u = self.reduce(x)
        u = u.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        u = self.expand(self.depthwise(u))
        return self.relu(torch.cat((self.pool(x), u), 1) if self.stride == 2 else x + u)


class ShuffleNet(nn.Module):
    """ShuffleNet 1x with 3 groups (Zhang et al. 2017, table 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1))
        units, in_channels = [], 24
        for channels, count in ((240, 4), (480, 8), (960, 4)):
            for i in range(count):
                # The first grouped convolution of all has too few channels to be grouped (section 3.2).
                units.append(ShuffleUnit(in_channels, channels, 1 if i else 2, 3, 3 if in_channels > 24 else 1))
                in_channels = channels
        self.units = nn.Sequential(*units)
        self.fc = nn.Linear(in_channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean((2, 3)))
