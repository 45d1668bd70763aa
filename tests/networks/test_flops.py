"""torch.utils.flop_counter counts for the ops what it counts for the plain block: forward, backward, every mode."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_map, package
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import se_ext
from se_ext import _flops, models, reference

pytestmark = pytest.mark.cpu_only

N, C, M = 3, 16, 6
LAYERS = 2 * N * 2 * C * M  # a multiplication and an addition per sample and weight
ops = torch.ops.se_ext

# No matrix product in them; or other ops inside, which are counted.
WITHOUT_FORMULA = {
    "squeeze",
    "rescale",
    "rescale_",
    "_rescale_backward",
    "_bn_activation",
    "_bn_activation_backward",
    "_bn_activation_",
    "_bn_activation_running",
    "_bn_activation_running_",
    "_bn_squeeze_excite_running",
    "_bn_squeeze_excite_running_",
}


def total(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_every_op_is_known():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("se_ext::") for name in names if name.startswith("se_ext::")}
    counted = {*_flops.COUNTED, *_flops.CONVOLUTIONS}
    assert ours == counted | WITHOUT_FORMULA
    assert not counted & WITHOUT_FORMULA


# ---- the block against the plain one ----


class Plain(nn.Module):
    """Batch norm or nothing, then the block of plain layers: 1x1 convolutions, or linear ones."""

    def __init__(self, layer: str, bn: bool, bias: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C) if bn else nn.Identity()
        self.convolution = layer == "convolution"
        make = (lambda a, b: nn.Conv2d(a, b, 1, bias=bias)) if self.convolution else nn.Linear
        self.fc1, self.fc2 = make(C, M), make(M, C)

    def forward(self, x: Tensor) -> Tensor:
        u = self.bn(x)
        z = u.mean((2, 3), keepdim=self.convolution)
        s = self.fc2(self.fc1(z).relu()).sigmoid()
        return u * (s if self.convolution else s[:, :, None, None])


def fused(bn: bool, bias: bool) -> nn.Module:
    kind = se_ext.BatchNormSqueezeExcitation if bn else se_ext.SqueezeExcitation
    return kind(C, M, bias=bias)


WANTED = ["nothing", "x", "bn.weight", "bn.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "everything"]


def ask_for_gradients(module: nn.Module, x: Tensor, wanted: tuple[str, ...]) -> bool:
    """Whether there are any."""
    everything = "everything" in wanted
    x.requires_grad_(everything or "x" in wanted)
    for name, p in module.named_parameters():
        p.requires_grad_(everything or any(name.endswith(end) for end in wanted))
    return x.requires_grad or any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bn", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("layer", ["convolution", "linear"])
def test_forward_and_backward_for_any_gradients(layer, bn, train):
    """Each one alone, and each pair: what is not wanted is not counted."""
    counts = set()
    for wanted in itertools.combinations_with_replacement(WANTED, 2):
        found = []
        for module in (fused(bn, bias=True), Plain(layer, bn, bias=True)):
            x = make_map((N, C, 5, 4))
            any_wanted = ask_for_gradients(module.train(train), x, wanted)
            forward = total(lambda module=module, x=x: module(x))
            y = module(x)
            found.append((forward, total(y.sum().backward) if any_wanted else 0))
        assert found[0] == found[1], wanted
        assert found[0][0] == LAYERS
        counts.add(found[0][1])
    assert counts == {LAYERS * quarters // 2 for quarters in range(5)}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bn", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", ""])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_every_mode(mode, bias, bn, train):
    ours, plain = fused(bn, bias).train(train), Plain("convolution", bn, bias).train(train)
    with mode():
        x = make_map((N, C, 5, 4))
        assert total(lambda: ours(x)) == total(lambda: plain(x)) == LAYERS


def weights(shape: str) -> list[Tensor]:
    ends = (1, 1) if shape == "convolution" else ()
    return [torch.randn(M, C, *ends), torch.randn(M), torch.randn(C, M, *ends), torch.randn(C)]


@pytest.mark.parametrize("shape", ["convolution", "linear"])
@pytest.mark.parametrize("spatial", [(7,), (5, 4), (2, 3, 4)], ids=["1d", "2d", "3d"])
def test_the_functions(shape, spatial):
    w1, b1, w2, b2 = weights(shape)
    x, z, s = make_map((N, C, *spatial)), torch.randn(N, C), torch.rand(N, C)
    assert total(lambda: se_ext.squeeze_excite(x, w1, b1, w2, b2, residual=x)) == LAYERS
    assert total(lambda: se_ext.squeeze_excite(x, w1, None, w2, None, pre_bias=b2)) == LAYERS
    assert total(lambda: se_ext.squeeze_excite(x.clone(), w1, b1, w2, b2, inplace=True)) == LAYERS
    assert total(lambda: ops.squeeze_excite(w2=w2, b2=b2, w1=w1, b1=b1, input=x)) == LAYERS
    assert total(lambda: se_ext.excite(z, w1, b1, w2, b2)) == LAYERS
    assert total(lambda: se_ext.excite(z.requires_grad_(), w1, b1, w2, b2).sum().backward()) == 2 * LAYERS
    assert total(lambda: se_ext.squeeze(x)) == 0
    assert total(lambda: se_ext.rescale(x.requires_grad_(), s, x).sum().backward()) == 0


@pytest.mark.parametrize("width", [3, 4], ids=["ours", "ATen's"])
@pytest.mark.parametrize("spatial", [(7,), (5, 8), (4, 3, 9)], ids=["1d", "2d", "3d"])
def test_the_depthwise_convolution(spatial, width):
    """As torch's own, forward and for the input's gradient. (torch counts the weights' as if every channel met all.)"""
    dims = len(spatial)
    x, w, b = make_map((N, C, *spatial)), torch.randn(C, 1, *(3, 3, width)[-dims:]), torch.randn(C)

    def run(function: Callable[..., Tensor], **named: Any) -> Tensor:
        return function(x, w, b, stride=2, padding=1, dilation=1, **named)

    torchs = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
    forward = total(lambda: run(se_ext.depthwise_conv))
    y = run(se_ext.depthwise_conv)
    assert forward == total(lambda: run(torchs, groups=C)) == 2 * y.numel() * w[0].numel()
    assert total(lambda: ops.depthwise_conv(weight=w, input=x, stride=2, padding=1)) == forward
    for wanted, times in (([x], 1), ([w], 1), ([b], 0), ([w, b], 1), ([x, w, b], 2)):
        for t in (x, w, b):
            t.requires_grad_(any(t is leaf for leaf in wanted))
        y = run(se_ext.depthwise_conv)
        assert total(y.sum().backward) == times * forward
    w.requires_grad_(False), b.requires_grad_(False)
    y, theirs = run(se_ext.depthwise_conv), run(torchs, groups=C)
    assert total(y.sum().backward) == total(theirs.sum().backward)


def test_tables_name_the_ops_and_list_no_zeros():
    with FlopCounterMode(display=False) as counter:
        se_ext.rescale(make_map((N, C, 4)), se_ext.squeeze(make_map((N, C, 4))))
        w1, b1, w2, b2 = weights("linear")
        x = make_map((N, C, 5, 4), requires_grad=True)
        se_ext.squeeze_excite(x, w1.requires_grad_(), b1, w2.requires_grad_(), b2).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert {str(op): count for op, count in counts.items()} == {
        "se_ext._squeeze_excite_forward": LAYERS,
        "se_ext._squeeze_excite_backward": 2 * LAYERS,
    }


def test_the_plain_formula_counts_the_same():
    """That of double backward and torch.func is made of torch's own products."""
    w = weights("linear")
    x = make_map((N, C, 5, 4))
    assert total(lambda: reference.squeeze_excite(x, *w)) == LAYERS
    vmapped = torch.func.vmap(lambda x: se_ext.squeeze_excite(x[None], *w)[0])
    assert total(lambda: vmapped(x)) == LAYERS


def test_on_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for where in (torch.device("meta"), FakeTensorMode()):
        with where:
            ours, x = fused(True, True), torch.randn(N, C, 5, 4)
            assert total(lambda ours=ours, x=x: ours(x).sum().backward()) == LAYERS + LAYERS * 2


# ---- networks ----


def by_module(counts: dict[str, dict[Any, int]]) -> dict[str, int]:
    """Without the name of the network's class."""
    return {name.partition(".")[2]: sum(of_ops.values()) for name, of_ops in counts.items()}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["seresnet18", "seresnet50", "seresnext50_32x4d"])
def test_networks_count_as_timm_s(name, train):
    """In total, and for every module of ours that is called: a stage, a block, a convolution. In backward the counter
    puts the work of the whole block down to its projection, up to what autograd happens to run first."""
    package("torchvision_shim")  # timm imports torchvision
    totals, modules = [], []
    with torch.device("meta"):
        for network in (getattr(models, name)(num_classes=10), package("timm").create_model(name, num_classes=10)):
            network.train(train)
            with FlopCounterMode(display=False) as counter:
                output = network(torch.randn(2, 3, 64, 64))
                forward, of_forward = counter.get_total_flops(), by_module(counter.get_flop_counts())
                output.sum().backward()
            totals.append((forward, counter.get_total_flops()))
            modules.append((of_forward, by_module(counter.get_flop_counts())))
    assert totals[0] == totals[1]
    ours, theirs = modules
    assert {"layer1", "layer1.0", "layer4.1", "layer2.0.conv2", "layer2.0.downsample", "fc"} <= ours[0].keys()
    for module in ours[0].keys() - {""}:
        assert ours[0][module] == theirs[0][module], module
        assert "downsample" in module or ours[1][module] == theirs[1][module], module


# ---- when the formulas arrive ----

PROGRAM = """
import sys, torch
{first}
{second}
from torch.utils.flop_counter import FlopCounterMode, flop_registry
{last}
with FlopCounterMode(display=False) as counter:
    se_ext.excite(torch.randn(2, 4), torch.randn(3, 4), None, torch.randn(4, 3), None)
assert counter.get_total_flops() == 2 * 2 * (4 * 3 + 3 * 4), counter.get_total_flops()
"""
UNPAID = "import se_ext; assert 'torch.utils.flop_counter' not in sys.modules"
RELOAD = "FlopCounterMode = importlib.reload(sys.modules['torch.utils.flop_counter']).FlopCounterMode"


@pytest.mark.parametrize(
    ("first", "second", "last"),
    [
        (UNPAID, "", ""),
        ("import torch.utils.flop_counter", "import se_ext", ""),
        (UNPAID, "import importlib; importlib.import_module('torch.utils.flop_counter')", RELOAD),
        ("import se_ext, importlib; importlib.reload(se_ext)", "", "importlib.reload(se_ext)"),
    ],
    ids=["counter after", "counter before", "counter reloaded", "se_ext reloaded"],
)
def test_whichever_is_imported_first(first, second, last):
    """And se_ext by itself does not import the counter."""
    program = PROGRAM.format(first=first, second=second, last=last)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
