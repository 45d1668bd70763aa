"""Depthwise convolutions of a converted network, each by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import package
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import se_ext
from conversion.small import SE, assert_same, results

pytestmark = pytest.mark.cpu_only

C = 12


def same(kernel: int, **settings: Any) -> nn.Module:
    package("torchvision_shim")  # timm imports torchvision
    made: nn.Module = package("timm.layers").Conv2dSame(C, C, kernel, groups=C, **settings)
    return made


def depthwise(kernel: Any, **settings: Any) -> nn.Module:
    return nn.Conv2d(C, C, kernel, groups=C, **settings)


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: depthwise(3, padding=1, bias=False),
    "5x5 stride 2": lambda: depthwise(5, padding=2, stride=2),
    "7x7": lambda: depthwise(7, padding=3),
    "no padding": lambda: depthwise(3),
    "oblong": lambda: depthwise((1, 5), padding=(0, 2), stride=(2, 1), dilation=(2, 1)),
    "same": lambda: depthwise(5, padding="same"),
    "valid": lambda: depthwise(3, padding="valid", stride=2),
    "TensorFlow's same": lambda: same(3, stride=2, bias=False),
    "TensorFlow's same, stride 1": lambda: same(5),
}
LEFT: dict[str, Callable[[], nn.Module]] = {
    "dilated": lambda: depthwise(3, dilation=2),
    "1x1": lambda: depthwise(1),
    "9x9": lambda: depthwise(9, padding=4),
    "stride 3": lambda: depthwise(3, stride=3),
    "reflected": lambda: depthwise(3, padding=1, padding_mode="reflect"),
    "groups of two": lambda: nn.Conv2d(C, C, 3, groups=C // 2),
    "two outputs a channel": lambda: nn.Conv2d(C, 2 * C, 3, groups=C),
    "transposed": lambda: nn.ConvTranspose2d(C, C, 3, groups=C),
    "another class": lambda: type("Mine", (nn.Conv2d,), {})(C, C, 3, groups=C),
}


def pair(conv: nn.Module, channels_last: bool = False) -> tuple[nn.Module, nn.Module]:
    """A network with the convolution, as it is and converted."""
    plain: nn.Module = nn.Sequential(nn.Conv2d(3, C, 1), conv, SE(conv.out_channels, 4)).double()
    if channels_last:
        plain = plain.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    se_ext.convert(ours)
    return plain, ours


def images(channels_last: bool = False) -> Tensor:
    x = torch.randn(3, 3, 15, 18, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def calls(network: nn.Module, x: Tensor) -> int:
    """How often a call of the network calls the op."""
    with torch.profiler.profile() as profile:
        network(x)
    return [event.name for event in profile.events()].count("se_ext::depthwise_conv")


def is_converted(conv: nn.Module) -> bool:
    return type(conv).forward is not nn.Conv2d.forward and hasattr(type(conv), "_recipe")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_known(make: Callable[[], nn.Module], channels_last: bool) -> None:
    plain, ours = pair(make(), channels_last)
    x = images(channels_last)
    assert is_converted(ours[1])
    assert isinstance(ours[1], type(plain[1]))
    assert calls(ours, x) == 1
    for training in (True, False):
        assert_same(results(ours, x, training), results(plain, x, training))
    se_ext.revert(ours)
    assert type(ours[1]) is type(plain[1])


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_left(make: Callable[[], nn.Module]) -> None:
    plain, ours = pair(make())
    assert type(ours[1]) is type(plain[1])


def test_the_report_names_it() -> None:
    network = nn.Sequential(KNOWN["5x5 stride 2"](), SE(C, 4))
    (row,) = [row for row in se_ext.convert(network).converted if row.path == "0"]
    assert (row.kind, row.shape, row.outcome) == ("Conv2d", "12 × 5×5", "depthwise convolution")


def test_where_may_leave_it() -> None:
    network = nn.Sequential(KNOWN["3x3"](), SE(C, 4))
    report = se_ext.convert(network, where=lambda path, module: not isinstance(module, nn.Conv2d))
    assert not is_converted(network[0])
    assert [(row.path, row.outcome) for row in report.skipped] == [("0", "where said no")]


def test_hooks_run() -> None:
    plain, ours = pair(KNOWN["3x3"]())
    for network in (plain, ours):
        network[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        network[1].register_forward_hook(lambda module, args, output: output + 1)
    x = images()
    assert_same(results(ours, x), results(plain, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
        lambda conv: setattr(conv, "forward", lambda x: x),
        lambda conv: setattr(conv, "padding", (2, 2)),
        lambda conv: setattr(conv, "padding_mode", "circular"),
    ],
    ids=["parametrized", "pruned", "a forward of its own", "padding", "padding mode"],
)
def test_changed_later(change: Callable[[nn.Module], Any]) -> None:
    plain, ours = pair(KNOWN["3x3"]())
    x = images()
    for network in (plain, ours):
        torch.manual_seed(0)
        change(network[1])
        if hasattr(network[1], "_reversed_padding_repeated_twice"):
            network[1]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))


def test_assigned_parameters_keep_the_conversion() -> None:
    """load_state_dict(assign=True) puts new parameters and buffers in the places of the old ones."""
    plain, ours = pair(KNOWN["3x3"]())
    state = {name: torch.randn_like(t) for name, t in plain.state_dict().items()}
    for network in (plain, ours):
        network.load_state_dict(state, assign=True)
    x = images()
    assert calls(ours, x) == 1
    assert_same(results(ours, x), results(plain, x))


def test_a_tensor_in_the_weights_place_is_for_torch() -> None:
    _, ours = pair(KNOWN["3x3"]())
    del ours[1].weight
    ours[1].weight = torch.zeros(C, 1, 3, 3, dtype=torch.float64)
    assert not is_converted(ours[1])
    assert torch.equal(ours[1](torch.ones(1, C, 5, 5, dtype=torch.float64)), torch.zeros(1, C, 5, 5).double())


def test_a_weight_of_its_own_kind_is_for_torch() -> None:
    """A subclass of Tensor (sharded, quantised) computes its layer in its own way."""

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(function, types, args, kwargs)
            return result.as_subclass(Tensor) * 2 if function is torch.conv2d else result

    plain, ours = pair(KNOWN["3x3"]())
    ours[1].weight = nn.Parameter(ours[1].weight.detach().as_subclass(Doubled))
    x = images()
    assert is_converted(ours[1])
    assert calls(ours, x) == 0
    torch.testing.assert_close(ours[1](ours[0](x)).as_subclass(Tensor), 2 * plain[1](plain[0](x)))


def test_one_image_without_a_batch() -> None:
    plain, ours = pair(KNOWN["3x3"]())
    x = torch.randn(C, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(ours[1](x), plain[1](x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    plain, ours = pair(KNOWN["5x5 stride 2"]())
    plain, ours, x = plain.float(), ours.float(), images().float()
    exact = plain(x)
    with torch.autocast("cpu", dtype):
        found, theirs = ours[1](ours[0](x)), plain[1](plain[0](x))
        assert found.dtype is theirs.dtype is dtype
        torch.testing.assert_close(ours(x).float(), exact, rtol=0.1, atol=0.1 * float(exact.detach().abs().max()))
