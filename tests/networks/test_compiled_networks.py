"""The ops inside compiled networks, with convolutions on both sides: what torch.compile's default backend makes of an
op that writes into its input, or into running statistics, equals the plain formula in eager, in float64.

An op by itself proves little here: what goes wrong is the memory of its neighbours. The networks are in float32:
Inductor cannot freeze a float64 convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_near
from timm_networks import replace_blocks, timm_network
from torch import Tensor, nn

import se_ext
from se_ext import reference

C, M = 8, 4
OPS = torch.ops.se_ext

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Middle(nn.Module):
    """What stands between two convolutions: the op, or the plain formula in its place."""

    def __init__(self, fused: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)
        self.se = se_ext.SqueezeExcitation(C, M)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 1.5)
        self.forms = {"fused": fused, "plain": plain}
        self.form = "fused"

    def weights(self) -> tuple[Any, ...]:
        return self.se.fc1.weight, self.se.fc1.bias, self.se.fc2.weight, self.se.fc2.bias

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.forms[self.form](self, x, shortcut)


class Network(nn.Module):
    """Two of them in a row, each between convolutions; the first one's input is read once, the second one's again."""

    def __init__(self, fused: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = Middle(fused, plain), Middle(fused, plain)
        self.conv1 = nn.Conv2d(3, C, 1, bias=False)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(C, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        shortcut = self.conv1(images)
        x = self.first(self.conv1(images), shortcut)
        x = self.second(self.conv2(x), shortcut)
        return self.conv3(x)

    def plain(self) -> Network:
        """A twin that computes the plain formula in float64."""
        twin = copy.deepcopy(self).double()
        twin.first.form = twin.second.form = "plain"
        return twin


def norm(m: Middle, x: Tensor) -> Tensor:
    return m.bn(x)


def running(m: Middle) -> tuple[Any, ...]:
    return m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, m.bn.num_batches_tracked


def rescale_in_place(m: Middle, x: Tensor, _: Tensor) -> Tensor:
    OPS.rescale_(x, OPS.excite(OPS.squeeze(x), *m.weights()))
    return x


def rescale_tail_in_place(m: Middle, x: Tensor, shortcut: Tensor) -> Tensor:
    OPS.rescale_(x, OPS.excite(OPS.squeeze(x), *m.weights()), shortcut, "relu")
    return x


def block_in_place(m: Middle, x: Tensor, _: Tensor) -> Tensor:
    return se_ext.squeeze_excite(x, *m.weights(), inplace=True)


def block_tail_in_place(m: Middle, x: Tensor, shortcut: Tensor) -> Tensor:
    return se_ext.squeeze_excite(x, *m.weights(), residual=shortcut, post_activation="relu", inplace=True)


def bn_block(m: Middle, x: Tensor, shortcut: Tensor) -> Tensor:
    bn = (*running(m), *m.weights(), m.training, m.bn.momentum, m.bn.eps, "silu", "relu", "sigmoid")
    return OPS._bn_squeeze_excite_running(x, *bn[:5], *bn[5:], shortcut, "relu", None)


def bn_activation(m: Middle, x: Tensor, shortcut: Tensor) -> Tensor:
    return OPS._bn_activation_running(x, *running(m), m.training, m.bn.momentum, m.bn.eps, "relu", shortcut)


def plain_block(m: Middle, x: Tensor, _: Tensor) -> Tensor:
    return reference.squeeze_excite(x, *m.weights())


def plain_tail(m: Middle, x: Tensor, shortcut: Tensor) -> Tensor:
    return reference.squeeze_excite(x, *m.weights(), residual=shortcut, post_activation="relu")


IN_PLACE = {
    "rescale_": (rescale_in_place, plain_block),
    "rescale_ with a tail": (rescale_tail_in_place, plain_tail),
    "squeeze_excite_": (block_in_place, plain_block),
    "squeeze_excite_ with a tail": (block_tail_in_place, plain_tail),
}
RUNNING = {
    "_bn_squeeze_excite_running": (
        bn_block,
        lambda m, x, r: torch.relu(reference.squeeze_excite(nn.functional.silu(norm(m, x)), *m.weights()) + r),
    ),
    "_bn_activation_running": (bn_activation, lambda m, x, r: torch.relu(norm(m, x) + r)),
}


def networks(name: str, channels_last: bool) -> tuple[Network, Network]:
    """The fused one and its plain twin, which holds the same values."""
    network = Network(*(IN_PLACE | RUNNING)[name])
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network, network.plain()


def images(n: int, size: int, channels_last: bool) -> Tensor:
    x = torch.randn(n, 3, size, size + 1)
    return x.to(memory_format=torch.channels_last) if channels_last else x


SIZES = [(2, 6), (3, 7), (5, 4)]


@pytest.mark.parametrize("freezing", [False, True], ids=["", "freezing"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [*IN_PLACE, *RUNNING])
def test_compiled_inference(name: str, dynamic: bool, channels_last: bool, freezing: bool) -> None:
    network, plain = networks(name, channels_last)
    network.eval(), plain.eval()
    compiled = torch.compile(network, dynamic=dynamic, fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        for n, size in SIZES[: 3 if dynamic else 1]:
            x = images(n, size, channels_last)
            before = x.clone()
            assert_near(compiled(x), plain(x.double()))
            assert_near(network(x), plain(x.double()), "eager")
            assert torch.equal(x, before)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", RUNNING)
def test_compiled_training(name: str, dynamic: bool, channels_last: bool) -> None:
    """Output, all gradients, running statistics and their count, over three steps."""
    network, plain = networks(name, channels_last)
    compiled = torch.compile(network, dynamic=dynamic, fullgraph=True)
    for step in range(3):
        x = images(*SIZES[step if dynamic else 0], channels_last)
        x, twin = x.requires_grad_(), x.detach().double().requires_grad_()
        y, expected = compiled(x), plain(twin)
        assert_near(y, expected)
        grad = torch.randn_like(y)
        network.zero_grad()
        plain.zero_grad()
        y.backward(grad)
        expected.backward(grad.double())
        assert_near(x.grad, twin.grad, "gradient of the images")
        for (key, a), b in zip(network.named_parameters(), plain.parameters(), strict=True):
            if b.grad is not None:
                assert_near(a.grad, b.grad, key, 2e-4)  # of a bias before a batch norm: the rest of large terms
        for (key, a), b in zip(network.named_buffers(), plain.buffers(), strict=True):
            assert_near(a.double(), b.double(), key)
        for bn in (network.first.bn, network.second.bn):
            assert bn.num_batches_tracked == step + 1


@pytest.mark.parametrize("freezing", [False, True], ids=["", "freezing"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_100"])
def test_a_network_of_timm_with_blocks_in_place(name: str, freezing: bool, restore_threads: None) -> None:
    """Its own blocks replaced by ours, inplace=True, compiled: the logits are the original's."""
    torch.set_num_threads(1)
    network = timm_network(name)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        expected = copy.deepcopy(network).double()(x.double())
        network = replace_blocks(network, inplace=True)
        assert_near(network(x), expected, "eager", 2e-4)
        assert_near(torch.compile(network)(x), expected, "compiled", 2e-4)
