"""Whole networks of timm as they are, with se_ext's SE blocks, and without any; and the check of the swaps."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import se_ext
import se_ext.models
from benchmarks import summary
from benchmarks.cases.problem import LAYOUTS, SEED, to_layout
from benchmarks.measure.case import Case, Work, WrongResult
from benchmarks.measure.timing import Plan, Step, recorded
from se_ext.conversion.measure import peak_bytes

# timm imports torchvision, which needs the tests' help beside a CPU build of torch.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
importlib.import_module("torchvision_shim")

# Under their own names: whoever needs timm imports it from here.
import timm as timm  # noqa: E402
from timm.layers import SEModule  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite as SqueezeExcite  # noqa: E402

NAMES = ("seresnet50", "efficientnet_b0", "mobilenetv3_large_100", "regnety_008")
WHAT = (("inference", 1), ("inference", 8), ("train", 8))
LEARNING_RATE = 1e-4  # so small that the network stays what it was while its steps are timed
CHECKED = 2  # images: batch norm in train mode needs more than one value per channel
# Half of float32's digits, in the Euclidean norm: rounding grows on its way through a hundred layers, but a wrong block
# is wrong in the first digits.
ALLOWED = torch.finfo(torch.float32).eps ** 0.5


@dataclass(frozen=True)
class NetworkCase(Case):
    """`mode` is a forward pass ("inference"), or forward + backward + SGD step ("train")."""

    name: str
    layout: str
    mode: str
    batch: int

    def measure(self, plan: Plan) -> summary.Row:
        """Checks the swapped networks against the one as it is, then times all of them."""
        network, images, labels = self.build()
        networks = variants(self.name, network, self.layout, self.mode)
        check(networks, images[:CHECKED], labels[:CHECKED])
        with torch.inference_mode(self.mode == "inference"):
            steps = {variant: make_step(net, images, labels) for variant, net in networks.items()}
            row = self.timed(steps, plan)
        if self.mode == "train":
            row["peak_bytes"] = {variant: peak_bytes(step, networks[variant]) for variant, step in steps.items()}
        return summary.add_costs({**row, "se_blocks": len(se_blocks(network))})

    @property
    def image_size(self) -> int:
        return image_size(self.name)

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """timm's network, in eval mode for inference, images and labels."""
        images, labels = draw_images(self.batch, self.image_size, self.layout)
        return build(self.name, self.layout, images, SEED).train(self.mode == "train"), images, labels

    def timed(self, steps: Mapping[str, Step], plan: Plan) -> summary.Row:
        """A call at more than one image passes through so much memory that it leaves nothing in a cache for the next
        one: no lead-in."""
        found, other_cpu_share = recorded(steps, replace(plan, lead_in_calls=1 if self.batch == 1 else 0))
        where = {"name": self.name, "device": "cpu", "dtype": "float32", "batch": self.batch, "layout": self.layout}
        return {
            **where,
            "mode": self.mode,
            "image_size": self.image_size,
            "other_cpu_share": other_cpu_share,
            "variants": found,
        }


def work(text: str, *, layout: Sequence[str], quick: bool) -> Work:
    names = [name for name in NAMES if text in name]
    return Work([NetworkCase(n, one, *what) for n, one, what in itertools.product(names, layout, WHAT)])


# ---- the networks ----


def build(name: str, layout: str, images: Tensor, seed: int) -> nn.Module:
    """A timm network with random weights, in eval mode.

    Batch norm's statistics are those of `images` and none of its weights is zero: as timm initialises them, the
    residual branches of a ResNet are zero, and no SE block has an effect.
    """
    torch.manual_seed(seed)
    network = to_layout(timm.create_model(name, pretrained=False), layout)
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
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is None:
        raise ValueError(f"timm has no image size for {name}")
    return pretrained.input_size[-1]


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


def swapped(network: nn.Module, swap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the network with `swap` applied to every SE block."""
    network = copy.deepcopy(network)
    for name in se_blocks(network):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, swap(network.get_submodule(name)))
    return network


def without_se(network: nn.Module) -> nn.Module:
    return swapped(network, lambda _: nn.Identity())


def se_blocks(network: nn.Module) -> list[str]:
    """The names of the network's SE blocks; swapping one leaves the names of the others."""
    return [name for name, module in network.named_modules() if isinstance(module, SEModule | SqueezeExcite)]


def fused(name: str, network: nn.Module, layout: str) -> nn.Module:
    """se_ext's own network of that name, whose blocks' tails are one op, with the weights of timm's."""
    ours = to_layout(getattr(se_ext.models, name)(), layout)
    ours.load_state_dict(network.state_dict())
    return ours.train(network.training)


def variants(name: str, network: nn.Module, layout: str, mode: str) -> dict[str, nn.Module]:
    """The networks to time against each other; only inference can write into the input of an SE block. Where se_ext has
    the network itself, its training step too."""
    found = {summary.AS_IS: network, summary.OURS: swapped(network, with_se_ext)}
    if mode == "inference":
        found[summary.INPLACE] = swapped(network, lambda block: with_se_ext(block, inplace=True))
    elif hasattr(se_ext.models, name):
        found[summary.FUSED_NETWORK] = fused(name, network, layout)
    return {**found, summary.WITHOUT: without_se(network)}


# ---- the check ----


def check(networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    """Raises WrongResult unless every swapped network has the logits and, if in train mode, the gradient of the images
    that the first one has, and the network without SE blocks has other logits.

    Train mode is compared in float64, because roundings of float32 take some ReLUs across their kink, and batch norm
    passes that on to every gradient.
    """
    truth = _results(next(iter(networks.values())), images, labels)
    for name, network in networks.items():
        for what, found in _results(network, images, labels).items():
            error = ((found - truth[what]).norm() / truth[what].norm()).item()
            if name == summary.WITHOUT:
                if what == "logits" and error <= ALLOWED:
                    raise WrongResult("the logits are the same without SE blocks: nothing is proved")
            elif not error <= ALLOWED:
                raise WrongResult(f"{name}: {what} off by {error:.2e}; allowed {ALLOWED:.2e}")


def _results(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    if not network.training:
        with torch.inference_mode():
            return {"logits": network(images)}
    network = copy.deepcopy(network).double()  # a copy also because train mode updates batch norm's statistics
    images = images.double().requires_grad_()
    logits = network(images)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels), images)
    return {"logits": logits.detach(), "gradient of the images": gradient}


# ---- the calls ----


def draw_images(batch: int, size: int, layout: str) -> tuple[Tensor, Tensor]:
    """Random images [N, 3, size, size], and a class for each."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(memory_format=LAYOUTS[layout]), torch.arange(batch)


def make_step(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """The call to time: a training step of a network in train mode, else a forward pass."""
    if not network.training:
        return lambda: network(images)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(functional.cross_entropy(network(images), labels))
        optimizer.step()

    return step
