"""Small networks with SE blocks, as people write them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import package
from torch import Tensor, nn

import se_ext


class SE(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = (
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """conv → bn → act → conv → bn → SE → + shortcut → act"""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.act1 = nn.ReLU(inplace=True)
        self.drop = nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.se: nn.Module | None = SE(out, 4)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)) if channels != out else None
        )
        self.act2 = nn.ReLU(inplace=True)
        self.doubled = False

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.drop(self.act1(self.bn1(self.conv1(x))))
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        x = self.act2(x + shortcut)
        return x * 2 if self.doubled else x


class Network(nn.Module):
    """A stem, two residual blocks of one's own, two blocks of timm's, and a head."""

    def __init__(self) -> None:
        super().__init__()
        blocks = package("timm.models._efficientnet_blocks")
        depthwise = {"act_layer": nn.SiLU, "se_layer": blocks.SqueezeExcite, "norm_layer": nn.BatchNorm2d}
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            Residual(8, 8),
            Residual(8, 12),
            blocks.InvertedResidual(12, 12, exp_ratio=2.0, drop_path_rate=0.4, **depthwise),
            blocks.InvertedResidual(12, 16, stride=2, exp_ratio=2.0, **depthwise),
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network with random statistics."""
    package("torchvision_shim")  # timm imports torchvision
    from timm_networks import random_statistics

    torch.manual_seed(0)
    return random_statistics(Network()).to(dtype)


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The network as it is, and converted."""
    plain = network(dtype)
    ours = copy.deepcopy(plain)
    report = se_ext.convert(ours)
    assert len(report.converted) == len(CONVERTED)
    assert report.skipped == []
    return plain, ours


# What convert converts of the network: blocks, timm's batch norms, depthwise convolutions, and what calls them.
CONVERTED = {
    "stem": "0 bn → act",
    **{f"blocks.{i}.se": "block" for i in range(4)},
    "blocks.1.downsample": "0 bn",
    **{f"blocks.{i}": "neighbours" for i in range(4)},
    **{f"blocks.{i}.bn{j}": "norm" for i in (2, 3) for j in (1, 2, 3)},
    **{f"blocks.{i}.conv_dw": "convolution" for i in (2, 3)},
}


def images(dtype: torch.dtype = torch.float64, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, x: Tensor | None = None, training: bool = True) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step (one evaluation), by name."""
    x = (images(next(model.parameters()).dtype) if x is None else x).clone().requires_grad_()
    model.train(training)
    torch.manual_seed(2)
    output = model(x)
    parameters: dict[str, Any] = {"input": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad(output, list(parameters.values()), weights, allow_unused=True)
    return {
        "output": output.detach(),
        **{f"gradient of {name}": g for name, g in zip(parameters, gradients, strict=True) if g is not None},
        **{f"buffer {name}": b.clone() for name, b in model.named_buffers()},
    }


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Both in float64. Gradients that are zero but for rounding are compared with a thousandth of the largest."""
    assert ours.keys() == plain.keys()
    gradients = [t.abs().max() for name, t in plain.items() if name.startswith("gradient")]
    for name, expected in plain.items():
        floor = 1e-3 * max(gradients) if name.startswith("gradient") else 0
        assert (ours[name] - expected).abs().max() <= tolerance * max(expected.abs().max(), floor, 1e-30), name
