"""A small ResNet without SE, and what is to be compared with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import se_ext

from .data import CLASSES

WIDTHS = (32, 64, 128)
REDUCTION = 8


class Block(nn.Module):
    """A residual block (He et al. 2015, figure 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [N, channels, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class CellNet(nn.Module):
    """A stem, three stages of residual blocks, mean over the pixels, one linear layer: [N, 1, H, W] -> [N, 2]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)
        )
        blocks = []
        in_channels = WIDTHS[0]
        for channels in WIDTHS:
            for index in range(depth):
                blocks.append(Block(in_channels, channels, 2 if index == 0 else 1))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(in_channels, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [N, 2]."""
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


PLAIN, WITH_SE, DEEPER = VARIANTS = ("plain", "plain + inserted SE", "twice the depth")


def build(variant: str, seed: int) -> CellNet:
    """Return a network that the seed alone decides. The plain one and that with SE start the same, as one function."""
    torch.manual_seed(seed)
    net = CellNet(depth=2 if variant == DEEPER else 1)
    if variant == WITH_SE:
        se_ext.insert_se(net, REDUCTION)
    return net


def multiply_adds(net: nn.Module, size: int) -> int:
    """Return those of the convolutions and linear layers for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, 1, size, size))
    return counter.get_total_flops() // 2
