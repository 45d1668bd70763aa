"""The depthwise convolutions that timm's networks call, and the SE blocks behind them: found by hooks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks.cases.networks import SqueezeExcite, timm
from benchmarks.cases.workloads import Use

NETWORKS = ("efficientnet_b0", "mobilenetv3_large_100", "mnasnet_100", "convnext_tiny", "tf_efficientnet_b0")
BLOCKS_OF = "efficientnet_b0"
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Shape:
    """A depthwise convolution on square kernels; `padding` is None for "same" (output of ceil(input / stride))."""

    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int | None
    has_bias: bool
    hidden: int | None = None  # of the SE block behind it
    uses: tuple[Use, ...] = ()

    @property
    def name(self) -> str:
        marks = [f"{self.channels}x{self.height}x{self.width}", f"k{self.kernel}"]
        marks += [f"s{self.stride}"] if self.stride > 1 else []
        marks += ["same"] if self.padding is None else []
        return "-".join(marks + ["bias"] * self.has_bias)

    def __str__(self) -> str:
        return self.name

    def matches(self, text: str) -> bool:
        """True if `text` is part of the shape's name or of the name of a network that has it."""
        return any(text.lower() in label for label in (self.name, *(use.model for use in self.uses)))


@lru_cache
def shapes() -> tuple[Shape, ...]:
    """Each depthwise convolution of NETWORKS once, with its uses."""
    found = [
        (dataclasses.replace(shape, hidden=None), network, kind)
        for network in NETWORKS
        for shape, kind in convolutions(network)
    ]
    uses: dict[Shape, list[Use]] = {}
    for (shape, network, kind), count in Counter(found).items():
        uses.setdefault(shape, []).append(Use(network, kind, count))
    return tuple(dataclasses.replace(shape, uses=tuple(of_shape)) for shape, of_shape in uses.items())


@lru_cache
def blocks() -> tuple[Shape, ...]:
    """Each convolution of BLOCKS_OF once that has an SE block behind it."""
    counts = Counter(shape for shape, _ in convolutions(BLOCKS_OF) if shape.hidden is not None)
    return tuple(
        dataclasses.replace(shape, uses=(Use(BLOCKS_OF, SqueezeExcite.__name__, count),))
        for shape, count in counts.items()
    )


def convolutions(name: str) -> list[tuple[Shape, str]]:
    """Every depthwise convolution that a network calls, in order, and its class. On tensors without data: nothing is
    computed."""
    found: list[tuple[Shape, str]] = []
    with torch.device("meta"), torch.no_grad():
        network = timm.create_model(name, pretrained=False).eval()
        for path, conv in depthwise_layers(network):
            se = getattr(network.get_submodule(path.rpartition(".")[0]), "se", None)
            hidden = se.conv_reduce.out_channels if isinstance(se, SqueezeExcite) else None

            def note(conv: nn.Conv2d, inputs: tuple[Tensor], _: Tensor, hidden: int | None = hidden) -> None:
                found.append((shape_of(conv, inputs[0], hidden), type(conv).__name__))

            conv.register_forward_hook(note)
        network(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return found


def depthwise_layers(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1:
            yield path, module


def shape_of(conv: nn.Conv2d, x: Tensor, hidden: int | None) -> Shape:
    """Raises ValueError for what a Shape cannot say."""
    is_same = isinstance(conv, timm.layers.Conv2dSame)
    pairs = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if any(isinstance(pair, str) or pair[0] != pair[1] for pair in pairs) or conv.dilation != (1, 1):
        raise ValueError(f"the benchmark knows square kernels without dilation only, got {conv}")
    (kernel, stride, padding, _) = (int(pair[0]) for pair in pairs)
    channels, height, width = x.shape[1:]
    has_bias = conv.bias is not None
    return Shape(channels, height, width, kernel, stride, None if is_same else padding, has_bias, hidden)
