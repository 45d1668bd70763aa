"""A small residual CNN whose blocks differ only in their tail: how shortcut and gate meet the last ReLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import se_ext

STAGES = ((32, 1), (64, 2), (128, 2))  # (channels, stride) of each block; the maps are 8x8, 4x4 and 2x2
REDUCTION = 8
CLASSES = 10


class AddRelu(nn.Module):
    """The tail without SE: y = relu(x + shortcut)."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return y, same shape as x."""
        return functional.relu_(x + shortcut)


class PlainSE(nn.Module):
    """SE as torchvision writes it: y = relu(s * x + shortcut) with s = sigmoid(fc2(relu(fc1(mean(x)))))."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return y, same shape as x; add and ReLU work in place, as torchvision's ResNet does."""
        z = functional.adaptive_avg_pool2d(x, 1)
        scale = torch.sigmoid(self.fc2(functional.relu(self.fc1(z))))
        return functional.relu_((scale * x).add_(shortcut))


TAILS: dict[str, Callable[[int, int], nn.Module]] = {
    "without SE": lambda channels, squeezed: AddRelu(),
    "SE, plain PyTorch": PlainSE,
    "SE, se_ext": partial(se_ext.SqueezeExcitation, post_activation="relu"),
}
NO_SE, PLAIN, FUSED = VARIANTS = tuple(TAILS)


class Block(nn.Module):
    """Conv-BN-ReLU-Conv-BN, then the variant's tail with a 1x1 Conv-BN shortcut."""

    def __init__(self, variant: str, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.tail = TAILS[variant](channels, channels // REDUCTION)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [N, channels, H / stride, W / stride]."""
        return self.tail(self.body(x), self.shortcut(x))


class DigitNet(nn.Module):
    """Three residual blocks, mean over the pixels, one linear layer: [N, 1, 8, 8] -> [N, 10]."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        in_channels = (1, *(channels for channels, _ in STAGES))
        self.blocks = nn.Sequential(
            *(Block(variant, c_in, c, stride) for c_in, (c, stride) in zip(in_channels, STAGES, strict=False))
        )
        self.classifier = nn.Linear(in_channels[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [N, 10]."""
        return self.classifier(self.blocks(images).mean((2, 3)))


def build(variant: str, seed: int) -> DigitNet:
    """Return a net whose weights the seed alone decides: layers that two variants share start the same."""
    torch.manual_seed(seed)
    initial = DigitNet(PLAIN)
    net = DigitNet(variant)
    net.load_state_dict({name: initial.state_dict()[name] for name in net.state_dict()})
    return net


@torch.no_grad()
def gates(net: DigitNet, images: Tensor) -> list[Tensor]:
    """Return each block's gate s [N, C] for the images, recomputed from the tail's input and weights."""
    collected: list[Tensor] = []

    def record(tail: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weights = dict(tail.named_parameters())
        w1, w2 = (weights[name].flatten(1) for name in ("fc1.weight", "fc2.weight"))
        z = se_ext.squeeze(inputs[0])
        collected.append(se_ext.excite(z, w1, weights["fc1.bias"], w2, weights["fc2.bias"]))

    hooks = [block.get_submodule("tail").register_forward_pre_hook(record) for block in net.blocks]
    net.eval()(images)
    for hook in hooks:
        hook.remove()
    return collected
