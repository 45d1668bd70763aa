"""convert, over the families of networks that have SE blocks or relatives of them: one small network of each, from timm
and torchvision. A converted network computes, trains and is saved like the one it was, and no block is left out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conversion.small import assert_same, results
from helpers import package
from timm_networks import random_statistics
from torch import Tensor, nn

import se_ext
from se_ext.conversion import ConversionReport

pytestmark = pytest.mark.cpu_only

DROPS: dict[str, Any] = {"drop_path_rate": 0.5}
DROPS_OF_TORCHVISION: dict[str, Any] = {"stochastic_depth_prob": 0.5}
SIZE: dict[str, Any] = {"img_size": 64}


@dataclass
class Family:
    """A network as small as its constructor makes it."""

    name: str
    kind: str
    """the class of its blocks"""
    blocks: int
    """how many it has"""
    options: dict[str, Any] = field(default_factory=dict)
    pixels: int = 64
    """of a side of the images; more where the last batch norms would see one point of each image"""
    library: str = "timm"

    def build(self) -> nn.Module:
        torchvision = package("torchvision_shim").torchvision  # timm imports it
        create = package("timm").create_model if self.library == "timm" else torchvision.models.get_model
        return no_zeros(random_statistics(create(self.name, num_classes=10, **self.options)))

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(batch, 3, self.pixels, self.pixels, dtype=dtype)


FAMILIES = [
    Family("eca_botnext26ts_256", "EcaModule", 5, SIZE),
    Family("test_byobnet", "SEModule", 4, DROPS),
    Family("eca_resnext26ts", "EcaModule", 8),
    Family("cs3sedarknet_xdw", "SEModule", 25),
    Family("cspnext_tiny", "EffectiveSEModule", 4, DROPS),
    Family("semnasnet_050", "SqueezeExcite", 8, DROPS),
    Family("efficientnet_b0", "SqueezeExcite", 16, DROPS),
    Family("test_efficientnet", "SqueezeExcite", 2),
    Family("tf_efficientnetv2_b0", "SqueezeExcite", 16, DROPS),
    Family("efficientvim_m1", "SEModule", 2, pixels=128),
    Family("efficientvit_m0", "SEModule", 2, {"img_size": 128}, pixels=128),
    Family("fastvit_t8", "SEModule", 1),
    Family("gcvit_xxtiny", "SEModule", 11, SIZE),
    Family("ghostnet_050", "SqueezeExcite", 7),
    Family("hardcorenas_b", "SqueezeExcite", 4, DROPS),
    Family("hgnet_tiny", "EseModule", 5),
    Family("lcnet_035", "SqueezeExcite", 2),
    Family("lcnetv2_small", "SEModule", 4),
    Family("test_coatnet", "SEModule", 2, SIZE),
    Family("mobilenetv3_small_050", "SqueezeExcite", 9, DROPS),
    Family("test_nfnet", "SEModule", 4, DROPS),
    Family("nf_ecaresnet26", "EcaModule", 8),
    Family("rdnet_tiny", "EffectiveSEModule", 15),
    Family("regnety_002", "SEModule", 13, DROPS),
    Family("repghostnet_050", "SqueezeExcite", 7),
    Family("repvit_m1", "SEModule", 10),
    Family("seresnet18", "SEModule", 4, {**DROPS, "layers": (1, 1, 1, 1)}),
    Family("seresnet50", "SEModule", 4, {**DROPS, "layers": (1, 1, 1, 1)}),
    Family("ecaresnext26t_32x4d", "EcaModule", 4, {"layers": (1, 1, 1, 1)}),
    Family("rexnet_100", "SEModule", 13, {"width_mult": 0.5}),
    Family("legacy_seresnet18", "SEModule", 4, {"layers": (1, 1, 1, 1)}),
    Family("legacy_seresnext26_32x4d", "SEModule", 4, {"layers": (1, 1, 1, 1)}),
    Family("shvit_s1", "SEModule", 2, pixels=128),
    Family("tresnet_m", "SEModule", 4, {"layers": (1, 1, 2, 1), "width_factor": 0.25}),
    Family("ese_vovnet19b_slim_dw", "EffectiveSEModule", 4, DROPS),
    Family("eca_vovnet39b", "EcaModule", 4),
    Family("efficientnet_b0", "SqueezeExcitation", 16, DROPS_OF_TORCHVISION, library="torchvision"),
    Family("efficientnet_v2_s", "SqueezeExcitation", 30, DROPS_OF_TORCHVISION, library="torchvision"),
    Family("mobilenet_v3_small", "SqueezeExcitation", 9, library="torchvision"),
    Family("regnet_y_400mf", "SqueezeExcitation", 16, library="torchvision"),
]


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Hundreds of small layers: on a busy machine their threads wait for one another."""
    torch.set_num_threads(1)


def no_zeros(network: nn.Module) -> nn.Module:
    """The network with random numbers for its gains and biases: as initialised, many are zero or nearly so, and hide
    what comes before them."""
    for parameter in network.parameters():
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.2)
    return network


def pair(family: Family) -> tuple[nn.Module, nn.Module, ConversionReport]:
    """The network as it is, and converted."""
    plain = family.build()
    ours = copy.deepcopy(plain)
    return plain, ours, se_ext.convert(ours)


def descend(network: nn.Module, step: dict[str, Tensor]) -> None:
    """Moves the weights along the gradients of `results`, by 0.01 at most."""
    gradients = {name: step[key] for name, _ in network.named_parameters() if (key := f"gradient of {name}") in step}
    rate = 1e-2 / max(gradient.abs().max() for gradient in gradients.values())
    with torch.no_grad():
        for name, gradient in gradients.items():
            network.get_parameter(name).sub_(rate * gradient)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.library}-{f.name}")
def test_a_converted_network_is_the_network(family: Family) -> None:
    plain, ours, report = pair(family)
    paths = [path for path, m in plain.named_modules() if type(m).__name__ == family.kind]
    assert len(paths) == family.blocks
    assert [row.path for row in report.converted if row.kind == family.kind] == paths
    assert family.kind not in {row.kind for row in report.skipped}

    images = family.images(2, torch.float32)
    with torch.no_grad():
        expected, logits = (network.eval()(images) for network in (plain, ours))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    images = family.images(2, torch.float64)
    plain, ours = plain.double(), ours.double()
    for _ in range(2):
        truth, found = (results(network, images) for network in (plain, ours))
        assert_same(found, truth, 1e-6)  # ATen has the slope of hardsigmoid, 1/6, in float32
        descend(plain, truth)
        descend(ours, found)
    if {*DROPS, *DROPS_OF_TORCHVISION} & {*family.options}:  # `results` has one seed; another drops other samples
        assert not torch.allclose(plain(images), results(plain, images)["output"])

    state = copy.deepcopy(plain.state_dict())
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state)
    plain.load_state_dict(ours.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    se_ext.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), plain.eval()(images))
