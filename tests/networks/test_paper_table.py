"""The SE paper's costs of ten networks, plain and with SE blocks (Hu et al. 2017, journal version), reproduced by
insert_se on the meta device: parameters, and multiply-adds.

The count that fits: one per product of a convolution or a classifier, one per element of a shortcut's sum; of an SE
block two per weight and one per element that it rescales. A number that this count does not give is named in the table,
with the reason. The growth by SE is compared for every network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import package
from paper_networks import BNInception, ShuffleNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import se_ext

pytestmark = pytest.mark.cpu_only


class MultiplyAdds(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        name = func._schema.name
        if name == "aten::convolution":
            self.count += output.numel() * values["weight"][0].numel()
        elif name == "aten::addmm":
            self.count += output.numel() * values["mat1"].size(1)
        elif name in ("aten::add", "aten::add_") and isinstance(values["other"], Tensor):
            self.count += output.numel() if output.dim() == 4 else 0
        elif name.startswith("se_ext::"):
            if values.get("w1") is not None:
                self.count += values["input"].numel() + values["input"].size(0) * 4 * values["w1"].numel()
            if values.get("residual") is not None:
                self.count += values["residual"].numel()
        return output


def multiply_adds(network: nn.Module, size: int) -> int:
    with torch.no_grad(), MultiplyAdds() as counter:
        network.eval()(torch.empty(1, 3, size, size))
    return counter.count


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# ---- the networks ----


def torchvision(name: str) -> nn.Module:
    return getattr(package("torchvision_shim").torchvision.models, name)()


def timm(name: str) -> nn.Module:
    package("torchvision_shim")  # timm imports torchvision
    return package("timm").create_model(name)


def resnet(name: str) -> nn.Module:
    """With the stride in the first 1x1 convolution, as in He et al. 2015; torchvision has it in the 3x3 one."""
    network = torchvision(name)
    for module in network.modules():
        if hasattr(module, "conv3"):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    return network


def is_residual(path: str, module: nn.Module) -> bool:
    """Not the three reductions of Inception-ResNet-v2."""
    return "block" in type(module).__name__.lower()


class Row(NamedTuple):
    make: Callable[[], nn.Module]
    plain: float
    """multiply-adds, in units of 10⁹"""
    with_se: float
    parameters: tuple[float, float] | None = None
    """in units of 10⁶, with one decimal"""
    unit: float = 0.01
    """of the last digit that is printed of the multiply-adds"""
    not_met: frozenset[str] = frozenset()
    """what the count above does not give"""
    where: Callable[[str, nn.Module], bool] | None = None
    size: int = 224


TABLE = {
    "ResNet-50": Row(lambda: resnet("resnet50"), 3.86, 3.87, (25.6, 28.1)),
    "ResNet-101": Row(lambda: resnet("resnet101"), 7.58, 7.60),
    "ResNet-152": Row(lambda: resnet("resnet152"), 11.30, 11.32),
    "ResNeXt-50": Row(lambda: torchvision("resnext50_32x4d"), 4.24, 4.25),
    # 7.98 in place of 7.99; with SE blocks it is met.
    "ResNeXt-101": Row(lambda: timm("resnext101_32x4d"), 7.99, 8.00, not_met=frozenset({"plain"})),
    "VGG-16": Row(lambda: torchvision("vgg16"), 15.47, 15.48),
    "BN-Inception": Row(BNInception, 2.03, 2.04),
    # Another network: the published one (timm's, and 299 pixels) has 13.2, and the growth, 0.03, is its own.
    "Inception-ResNet-v2": Row(
        lambda: timm("inception_resnet_v2"),
        *(11.75, 11.76),
        not_met=frozenset({"plain", "with SE", "growth"}),
        where=is_residual,
        size=299,
    ),
    "MobileNet": Row(lambda: timm("mobilenetv1_100"), 0.569, 0.572, (4.2, 4.7), 0.001),
    # 0.139 in place of 0.140, which is the ShuffleNet paper's own number. The parameters are cut off, not rounded: 1.87
    # became 1.8, and 2.48 became 2.4.
    "ShuffleNet": Row(ShuffleNet, 0.140, 0.142, (1.8, 2.4), 0.001, not_met=frozenset({"plain", "parameters"})),
}


@pytest.mark.parametrize("name", TABLE)
def test_costs_are_those_that_the_paper_prints(name):
    row = TABLE[name]
    with torch.device("meta"):
        network = row.make()
        plain, plain_parameters = multiply_adds(network, row.size), parameters(network)
        se_ext.insert_se(network, min_channels=1, where=row.where)
        with_se, se_parameters = multiply_adds(network, row.size), parameters(network)
    half = row.unit / 2
    met = {
        "plain": abs(plain / 1e9 - row.plain) <= half,
        "with SE": abs(with_se / 1e9 - row.with_se) <= half,
        "growth": abs((with_se - plain) / 1e9 - (row.with_se - row.plain)) <= 2 * half,
    }
    if row.parameters is not None:
        printed_plain, printed_se = row.parameters
        met["parameters"] = (
            abs(plain_parameters / 1e6 - printed_plain) <= 0.05 and abs(se_parameters / 1e6 - printed_se) <= 0.05
        )
        met["growth of parameters"] = (
            abs((se_parameters - plain_parameters) / 1e6 - (printed_se - printed_plain)) <= 0.1
        )
    assert {what for what, is_met in met.items() if not is_met} == row.not_met, (plain, with_se, plain_parameters)


BLOCKS = {
    "ResNet-50": 16,
    "ResNet-101": 33,
    "ResNet-152": 50,
    "VGG-16": 13,
    "BN-Inception": 10,
    "MobileNet": 13,
    "ShuffleNet": 16,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_unit_gets_a_block(name):
    with torch.device("meta"):
        report = se_ext.insert_se(TABLE[name].make())
    assert len(report.inserted) == BLOCKS[name]
    assert not report.skipped


# Section 6.1: parameters of SE-ResNet-50, in millions.
REDUCTIONS = {2: 45.7, 4: 35.7, 8: 30.7, 16: 28.1, 32: 26.9}


def test_parameters_by_reduction():
    """Each printed number is above ours by what the batch norms' running statistics are, 0.05 (in Caffe they are
    parameters), up to its rounding; what one reduction has more than another is met by itself."""
    ours = {}
    for reduction in REDUCTIONS:
        with torch.device("meta"):
            network = torchvision("resnet50")
            report = se_ext.insert_se(network, reduction)
        statistics = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
        ours[reduction] = (parameters(network) + statistics) / 1e6
        assert report.parameters == parameters(network) - 25_557_032
    assert ours == pytest.approx(REDUCTIONS, abs=0.055)
    steps = {r: ours[r] - ours[32] for r in ours}
    assert steps == pytest.approx({r: printed - REDUCTIONS[32] for r, printed in REDUCTIONS.items()}, abs=0.1)


def test_growth_of_resnet_50_is_the_formula():
    """(2 / r) · Σ over the stages (blocks · C²), and the biases."""
    with torch.device("meta"):
        report = se_ext.insert_se(torchvision("resnet50"))
    stages = ((3, 256), (4, 512), (6, 1024), (3, 2048))
    biases = sum(blocks * (c + c // 16) for blocks, c in stages)
    assert report.parameters - biases == sum(blocks * 2 * c * c // 16 for blocks, c in stages) == 2_514_944
