"""Whole networks as TorchScript programs: scripted and traced, saved, frozen and optimised, in training too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_near
from timm_networks import random_statistics, replace_blocks, timm_network
from torch import Tensor, nn

from se_ext import models

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
threads_restored = pytest.mark.usefixtures("restore_threads")
pytestmark = [pytest.mark.cpu_only, quiet, threads_restored]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "se_ext.models": lambda: random_statistics(models.seresnet18(num_classes=10)),
    "efficientnet_b0": lambda: replace_blocks(timm_network("efficientnet_b0")),
    "mobilenetv3_small_100": lambda: replace_blocks(timm_network("mobilenetv3_small_100")),
}
networks = pytest.mark.parametrize("name", NETWORKS)
ways = pytest.mark.parametrize("how", ["script", "trace"])


def images(count: int = 2, channels_last: bool = False) -> Tensor:
    x = torch.randn(count, 3, 64, 64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@ways
@networks
def test_inference(name: str, how: str, tmp_path: Path) -> None:
    """At another batch and in another layout than those of the trace; three runs, since the executor optimises after
    the first."""
    torch.set_num_threads(1)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        program = torch.jit.script(network) if how == "script" else torch.jit.trace(network, images())
        torch.jit.save(program, tmp_path / "network.pt")
        forms = {
            "saved": torch.jit.load(tmp_path / "network.pt"),
            "frozen": torch.jit.freeze(program),
            "optimised": torch.jit.optimize_for_inference(program),
        }
        for form, run in forms.items():
            for channels_last in (False, True, False):
                x = images(3, channels_last)
                assert_near(run(x), network(x), form, 1e-5)


def test_a_frozen_trace_holds_no_batch_norm() -> None:
    """All are folded into the convolutions, and each SE block is one op, the shortcut and the ReLU in it."""
    program = torch.jit.freeze(torch.jit.trace(NETWORKS["se_ext.models"]().eval(), images()))
    graph = str(program.inlined_graph)
    assert "batch_norm" not in graph
    assert "se_ext::_bn" not in graph
    assert "se_ext::bn" not in graph
    assert graph.count("se_ext::squeeze_excite(") == 8
    assert graph.count("aten::add") == 0


@ways
@networks
def test_a_training_step(name: str, how: str) -> None:
    """In float64: the slope of a ReLU jumps, and float32's rounding decides where."""
    torch.set_num_threads(1)
    network = NETWORKS[name]().train().double()
    twin = copy.deepcopy(network)
    program = torch.jit.script(network) if how == "script" else torch.jit.trace(network, images().double())
    program.load_state_dict(twin.state_dict())  # the trace ran the network, and moved its statistics
    for _ in range(2):
        x = images(4).double()
        y, expected = program(x), twin(x)
        assert_near(y, expected, "logits", 1e-9)
        y.square().sum().backward()
        expected.square().sum().backward()
    for (key, ours), theirs in zip(program.named_parameters(), twin.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, key, 1e-9)
    for (key, ours), theirs in zip(program.named_buffers(), twin.buffers(), strict=True):
        assert_near(ours, theirs, key, 1e-9)
