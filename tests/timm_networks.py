"""Networks of timm with our SE blocks in the place of its own."""

from __future__ import annotations

from typing import Any

from helpers import package
from torch import nn

from se_ext import SqueezeExcitation

# The first layer of timm's SE blocks and its activation, by the block's class.
LAYERS = {"SqueezeExcite": ("conv_reduce", "act1"), "SEModule": ("fc1", "act")}


def timm_network(name: str, **options: Any) -> nn.Module:
    """timm's own, in evaluation."""
    package("torchvision_shim")  # timm imports torchvision
    return random_statistics(package("timm").create_model(name, num_classes=10, **options).eval())


def random_statistics(network: nn.Module) -> nn.Module:
    """The network, its batch norms those of a trained one: as initialised they are the identity, or zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def replace_blocks(network: nn.Module, inplace: bool = False) -> nn.Module:
    """The network, every SE block of it replaced by ours with its weights."""
    for parent in list(network.modules()):
        for name, block in list(parent.named_children()):
            if type(block).__name__ in LAYERS:
                setattr(parent, name, our_block(block, inplace).train(block.training))
    assert any(isinstance(module, SqueezeExcitation) for module in network.modules())
    return network


def our_block(block: nn.Module, inplace: bool) -> SqueezeExcitation:
    layer, activation = (getattr(block, name) for name in LAYERS[type(block).__name__])
    ours = SqueezeExcitation(layer.in_channels, layer.out_channels, activation, block.gate, inplace=inplace)
    ours.load_state_dict(block.state_dict())
    return ours
