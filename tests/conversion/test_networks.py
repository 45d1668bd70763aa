"""Whole networks of every family of timm and torchvision that has SE blocks or relatives: a converted network computes,
trains and is saved as the one it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import package
from timm_networks import random_statistics
from torch import Tensor, nn

import se_ext

pytestmark = pytest.mark.cpu_only

# The smallest network of each family; options that make it smaller, its size, the class of its blocks, and how many.
DROP = {"drop_path_rate": 0.2}
TIMM: dict[str, tuple[dict[str, Any], int, str, int]] = {
    "test_byobnet": ({}, 32, "SEModule", 4),
    "test_efficientnet": (DROP, 32, "SqueezeExcite", 2),
    "test_maxvit": ({}, 160, "SEModule", 4),
    "test_coatnet": ({}, 160, "SEModule", 2),
    "test_nfnet": ({}, 32, "SEModule", 4),
    "seresnet18": (DROP, 32, "SEModule", 8),
    "seresnext26d_32x4d": (DROP, 32, "SEModule", 8),
    "ecaresnet26t": ({}, 32, "EcaModule", 8),
    "regnety_002": (DROP, 64, "SEModule", 13),
    "efficientnet_b0": (DROP, 32, "SqueezeExcite", 16),
    "tf_efficientnetv2_b0": (DROP, 32, "SqueezeExcite", 16),
    "mixnet_s": ({}, 32, "SqueezeExcite", 13),
    "mobilenetv3_small_050": (DROP, 32, "SqueezeExcite", 9),
    "semnasnet_075": (DROP, 32, "SqueezeExcite", 8),
    "lcnet_050": ({}, 32, "SqueezeExcite", 2),
    "lcnetv2_small": ({}, 32, "SEModule", 4),
    "ghostnet_050": ({}, 64, "SqueezeExcite", 7),
    "repghostnet_050": ({}, 64, "SqueezeExcite", 7),
    "rexnet_100": ({"width_mult": 0.5, **DROP}, 32, "SEModule", 13),
    "tresnet_m": ({"width_factor": 0.25}, 32, "SEModule", 18),
    "hardcorenas_a": ({}, 64, "SqueezeExcite", 8),
    "hgnet_tiny": ({}, 32, "EseModule", 5),
    "ese_vovnet19b_slim_dw": ({}, 32, "EffectiveSEModule", 4),
    "cspnext_tiny": ({}, 32, "EffectiveSEModule", 4),
    "cs3se_edgenet_x": ({}, 32, "SEModule", 24),
    "nf_regnet_b0": ({}, 32, "SEModule", 16),
    "repvit_m1": ({}, 32, "SEModule", 10),
    "fastvit_t8": ({}, 32, "SEModule", 1),
    "legacy_seresnet18": ({}, 32, "SEModule", 8),
    "eca_botnext26ts_256": ({}, 256, "EcaModule", 5),
    "efficientvim_m1": ({}, 128, "SEModule", 2),
    "efficientvit_m0": ({}, 128, "SEModule", 2),
    "shvit_s1": ({}, 128, "SEModule", 2),
    "gcvit_xxtiny": ({"img_size": 64}, 64, "SEModule", 11),
    "rdnet_tiny": ({}, 64, "EffectiveSEModule", 15),
}
TORCHVISION: dict[str, tuple[dict[str, Any], int, str, int]] = {
    "efficientnet_b0": ({}, 32, "SqueezeExcitation", 16),
    "efficientnet_v2_s": ({}, 32, "SqueezeExcitation", 30),
    "mobilenet_v3_small": ({}, 32, "SqueezeExcitation", 9),
    "regnet_y_400mf": ({}, 32, "SqueezeExcitation", 16),
}
# Each takes as long as a dozen of the others.
SLOW = {
    "eca_botnext26ts_256",
    "efficientvim_m1",
    "efficientvit_m0",
    "shvit_s1",
    "gcvit_xxtiny",
    "rdnet_tiny",
    "tresnet_m",
    "hgnet_tiny",
    "cs3se_edgenet_x",
    "efficientnet_v2_s",
    "hardcorenas_a",
    "nf_regnet_b0",
}
CASES = [("timm", name, *row) for name, row in TIMM.items()]
CASES += [("torchvision", name, *row) for name, row in TORCHVISION.items()]


def make(library: str, name: str, options: dict[str, Any]) -> nn.Module:
    torchvision = package("torchvision_shim").torchvision  # timm imports it
    torch.manual_seed(0)
    if library == "timm":
        return random_statistics(package("timm").create_model(name, num_classes=5, **options))
    return random_statistics(torchvision.models.get_model(name, num_classes=5, **options))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, seed: int) -> None:
    optimizer.zero_grad()
    torch.manual_seed(seed)  # stochastic depth
    logits = model(images)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()


@pytest.mark.parametrize(
    ("library", "name", "options", "size", "block", "number"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=[pytest.mark.slow] if case[1] in SLOW else [])
        for case in CASES
    ],
)
def test_family(library: str, name: str, options: dict[str, Any], size: int, block: str, number: int) -> None:
    plain = make(library, name, options)
    ours = copy.deepcopy(plain)
    report = se_ext.convert(ours)
    blocks = [m for m in plain.modules() if type(m).__name__ == block]
    assert len(blocks) == number
    converted = [row for row in report.converted if row.kind == block]
    assert len(converted) == number, report.skipped
    assert not [row for row in report.skipped if row.kind == block]

    # Evaluation, in float32.
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, logits = (m.eval()(images) for m in (plain, ours))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    # Two training steps, in float64: gradients, running statistics, weights.
    plain, ours = plain.double().train(), ours.double().train()
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-4) for m in (plain, ours)]
    for seed in (1, 2):
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            step(model, optimizer, images, seed)
        largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
        for (path, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), path
            if p.grad is not None:
                # ATen's hardsigmoid has its slope, 1/6, in float32.
                assert (q.grad - p.grad).abs().max() <= 1e-6 * max(p.grad.abs().max(), 1e-3 * largest), path
        for optimizer in optimizers:
            optimizer.step()
    for (path, a), b in zip(plain.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=lambda m, path=path: f"{path}: {m}")

    # Checkpoints both ways, and back to what it was.
    assert list(plain.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    se_ext.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), plain.eval()(images))
