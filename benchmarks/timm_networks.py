"""timm's networks with their SE blocks as they are, as se_ext's, and without any; and the check of the swaps."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from facts import ROOT
from problem import LAYOUTS, WrongResult
from summary import FUSED_NETWORK
from torch import Tensor, nn
from torch.nn import functional

import se_ext
import se_ext.models

# timm imports torchvision, which needs the tests' help beside a CPU build of torch.
sys.path.append(str(ROOT / "tests"))
import torchvision_shim  # noqa: F401

# isort: split
import timm
from timm.layers import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite

NETWORKS = ("seresnet50", "efficientnet_b0", "mobilenetv3_large_100", "regnety_008")


def build(name: str, layout: str, images: Tensor, seed: int) -> nn.Module:
    """A timm network with random weights, in eval mode.

    Batch norm's statistics are those of `images` and none of its weights is zero: as timm initialises them, the
    residual branches of a ResNet are zero, and no SE block has an effect.
    """
    torch.manual_seed(seed)
    network = timm.create_model(name, pretrained=False).to(memory_format=LAYOUTS[layout])
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.ones_(norm.weight)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def image_size(name: str) -> int:
    """The height and width that the network is made for."""
    return timm.get_pretrained_cfg(name).input_size[-1]


def with_se_ext(block: nn.Module, inplace: bool = False) -> nn.Module:
    """se_ext's module around the layers of a timm block; raises ValueError where it would compute something else."""
    if isinstance(block, SqueezeExcite):
        reduce, activation, expand = block.conv_reduce, block.act1, block.conv_expand
    elif isinstance(block, SEModule) and isinstance(block.bn, nn.Identity) and not block.add_maxpool:
        reduce, activation, expand = block.fc1, block.act, block.fc2
    else:
        raise ValueError(f"se_ext has no module for {block}")
    # timm has classes of its own for some activations, under torch's names.
    activation, gate = (getattr(nn, type(layer).__name__) for layer in (activation, block.gate))
    ours = se_ext.SqueezeExcitation(
        reduce.in_channels, reduce.out_channels, activation, gate, bias=reduce.bias is not None, inplace=inplace
    )
    ours.fc1, ours.fc2 = reduce, expand
    return ours


def swapped(network: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the network with `replace` applied to every SE block."""
    network = copy.deepcopy(network)
    for name in se_blocks(network):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, replace(network.get_submodule(name)))
    return network


def se_blocks(network: nn.Module) -> list[str]:
    """The names of the network's SE blocks; swapping one leaves the names of the others."""
    return [name for name, module in network.named_modules() if isinstance(module, SEModule | SqueezeExcite)]


def fused(name: str, network: nn.Module, layout: str) -> nn.Module:
    """se_ext's own network of that name, whose blocks' tails are one op, with the weights of timm's."""
    ours = getattr(se_ext.models, name)().to(memory_format=LAYOUTS[layout])
    ours.load_state_dict(network.state_dict())
    return ours.train(network.training)


def variants(name: str, network: nn.Module, layout: str, mode: str) -> dict[str, nn.Module]:
    """The networks to time against each other; only inference can write into the input of an SE block. Where se_ext has
    the network itself, its training step too."""
    found = {"as_is": network, "se_ext": swapped(network, with_se_ext)}
    if mode == "inference":
        found["se_ext_inplace"] = swapped(network, lambda block: with_se_ext(block, inplace=True))
    elif hasattr(se_ext.models, name):
        found[FUSED_NETWORK] = fused(name, network, layout)
    return {**found, "no_se": swapped(network, lambda _: nn.Identity())}


def check(networks: dict[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    """Raises WrongResult unless every swapped network has the logits and, if in train mode, the gradient of the images
    that the network as it is has, and the network without SE blocks has other logits.

    What is allowed is half of float32's digits, in the Euclidean norm: rounding grows on its way through a hundred
    layers, but a wrong block is wrong in the first digits. Train mode is compared in float64, because roundings of
    float32 take some ReLUs across their kink, and batch norm passes that on to every gradient.
    """
    truth = _results(networks["as_is"], images, labels)
    allowed = torch.finfo(torch.float32).eps ** 0.5
    for name, network in networks.items():
        for what, found in _results(network, images, labels).items():
            error = ((found - truth[what]).norm() / truth[what].norm()).item()
            if name == "no_se":
                if what == "logits" and error <= allowed:
                    raise WrongResult("the logits are the same without SE blocks: nothing is proved")
            elif not error <= allowed:
                raise WrongResult(f"{name}: {what} off by {error:.2e}; allowed {allowed:.2e}")


def _results(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    if not network.training:
        with torch.inference_mode():
            return {"logits": network(images)}
    network = copy.deepcopy(network).double()  # a copy also because train mode updates batch norm's statistics
    images = images.double().requires_grad_()
    logits = network(images)
    functional.cross_entropy(logits, labels).backward()
    return {"logits": logits.detach(), "gradient of the images": images.grad}
