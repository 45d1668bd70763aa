"""Networks in other precisions: half types, autocast, int8. The blocks work, and cost no more of the logits' precision
than plain blocks do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization
from helpers import Watch, assert_near
from timm_networks import random_statistics, replace_blocks, timm_network
from torch import Tensor, nn
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import se_ext
from se_ext import SqueezeExcitation

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
threads_restored = pytest.mark.usefixtures("restore_threads")
pytestmark = [pytest.mark.cpu_only, quiet, threads_restored]

NAMES = ["seresnet18", "efficientnet_b0", "mobilenetv3_small_100"]
networks = pytest.mark.parametrize("name", NAMES)
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
QUANTISATIONS: dict[str, Callable[[], Any]] = {
    "weight only": torchao.quantization.Int8WeightOnlyConfig,
    "dynamic": torchao.quantization.Int8DynamicActivationInt8WeightConfig,
}
quantisations = pytest.mark.parametrize("quantisation", QUANTISATIONS)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network with our blocks, and timm's own with the same weights. seresnet18 is that of se_ext.models."""
    torch.set_num_threads(1)
    plain = timm_network(name)
    if name not in se_ext.models.__all__:
        return replace_blocks(copy.deepcopy(plain)), plain
    ours = getattr(se_ext.models, name)(num_classes=10).eval()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def images() -> Tensor:
    return torch.randn(4, 3, 64, 64)


# How much larger than with plain blocks the error of a network may be: both errors are those of a few random images.
CHANCE = 1.5


def error(logits: Tensor, exact: Tensor) -> float:
    """The root mean square, relative to that of the exact logits."""
    return float((logits.double() - exact).norm() / exact.norm())


# ---- half types ----


@pytest.mark.parametrize("how", ["converted", "autocast"])
@half_types
@networks
def test_a_network_in_a_half_type(name: str, dtype: torch.dtype, how: str) -> None:
    ours, plain = pair(name)
    x = images()
    exact = copy.deepcopy(plain).double()

    def run(network: nn.Module) -> Tensor:
        if how == "converted":
            return network.to(dtype)(x.to(dtype))
        with torch.autocast("cpu", dtype):
            return network(x)

    with torch.no_grad():
        y, expected, true = run(ours), run(plain), exact(x.double())
    assert y.dtype is dtype
    assert error(y, true) <= CHANCE * error(expected, true)


@networks
def test_a_training_step_under_autocast(name: str) -> None:
    """The gradients are float32, and as exact as with plain blocks."""
    ours, plain = pair(name)
    exact = copy.deepcopy(plain).double()
    x = images()

    def step(network: nn.Module, x: Tensor) -> Tensor:
        network.train()(x).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    true = step(exact, x.double()).double()
    with torch.autocast("cpu", torch.bfloat16):
        gradients, expected = step(ours, x), step(plain, x)
    assert gradients.dtype is torch.float32
    assert error(gradients, true) <= CHANCE * error(expected, true)


# ---- int8 ----


@quantisations
@networks
def test_the_rest_of_a_network_in_int8(name: str, quantisation: str) -> None:
    """torchao's quantize_ takes the linear layers, which are outside of the blocks: these stay one op each."""
    ours, plain = pair(name)
    for network in (ours, plain):
        torchao.quantization.quantize_(network, QUANTISATIONS[quantisation]())
        assert any(is_quantised(module) for module in network.modules())
    x = images()
    with torch.no_grad(), Watch() as watch:
        y = ours(x)
    assert sum(name.startswith("se_ext::") for name in watch.names) >= blocks(ours)
    with torch.no_grad():
        expected = plain(x)
    assert_near(y, expected, quantisation, ALLOWED[quantisation])


# Where activations are quantised too, the last bit of one may decide which int8 it becomes.
ALLOWED = {"weight only": 1e-5, "dynamic": 1e-3, "torch": 1e-3}


def is_quantised(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torchao.quantization.Int8Tensor)


def blocks(network: nn.Module) -> int:
    return sum(isinstance(module, SqueezeExcitation) for module in network.modules())


class Plain(nn.Module):
    """The SE block of linear layers, unfused."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


def pair_of_linear_layers() -> tuple[nn.Module, nn.Module]:
    """se_ext.models.seresnet18 with linear layers in its blocks, and the same with plain blocks of the same layers."""
    torch.set_num_threads(1)
    ours = random_statistics(se_ext.models.seresnet18(num_classes=10)).eval()
    for block in ours.modules():
        if isinstance(block, SqueezeExcitation):
            block.add_module("fc1", nn.Linear(block.fc1.in_channels, block.fc1.out_channels))
            block.add_module("fc2", nn.Linear(block.fc2.in_channels, block.fc2.out_channels))
    plain = copy.deepcopy(ours)
    for residual in plain.modules():
        if isinstance(getattr(residual, "se", None), SqueezeExcitation):
            residual.add_module("se", Plain(residual.se.fc1, residual.se.fc2))
    return ours, plain


@pytest.mark.parametrize("quantisation", [*QUANTISATIONS, "torch"])
def test_everything_in_int8(quantisation: str) -> None:
    """The layers of the blocks too, which are then called; squeeze and rescale stay fused."""
    ours, plain = pair_of_linear_layers()
    if quantisation == "torch":
        ours, plain = (torch.ao.quantization.quantize_dynamic(network, {nn.Linear}) for network in (ours, plain))
        assert not any(isinstance(module, nn.Linear) for module in ours.modules())
    else:
        for network in (ours, plain):
            torchao.quantization.quantize_(network, QUANTISATIONS[quantisation]())
        assert all(is_quantised(module) for module in ours.modules() if isinstance(module, nn.Linear))
    x = images()
    with torch.no_grad(), Watch() as watch:
        y = ours(x)
    assert watch.names.count("se_ext::squeeze") == watch.names.count("se_ext::rescale") == blocks(ours) == 8
    with torch.no_grad():
        expected = plain(x)
    assert_near(y, expected, quantisation, ALLOWED[quantisation])


def test_convolutions_in_int8() -> None:
    """torchao's quantisation of exported programs takes the convolutions around the blocks, which stay one op each."""
    ours, plain = pair("mobilenetv3_small_100")
    x = images()

    def quantised(network: nn.Module) -> Any:
        quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        program = quantize_pt2e.prepare_pt2e(torch.export.export(network, (x,)).module(), quantiser)
        program(x)  # finds out the ranges
        return quantize_pt2e.convert_pt2e(program)

    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        program = quantised(ours)
        y, expected = program(x), quantised(plain)(x)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("se_ext.squeeze_excite.default") == blocks(ours)
    assert sum("quantize_per_channel" in target for target in targets) > blocks(ours)
    assert error(y, exact) <= CHANCE * error(expected, exact)
