"""convert recognises SE blocks by their structure, whoever wrote the class, and leaves what only looks like one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import package
from torch import Tensor, nn

import se_ext

pytestmark = pytest.mark.cpu_only

C, M = 16, 4


def timm(name: str = "timm") -> Any:
    package("torchvision_shim")  # timm imports torchvision
    return package(name)


# ---- forms that are found in other libraries and in people's files ----


class Moskomule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(C, M, bias=False), nn.ReLU(inplace=True), nn.Linear(M, C, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Monai(nn.Module):
    """ChannelSELayer and ResidualSELayer."""

    def __init__(self, spatial_dims: int, add_residual: bool = False) -> None:
        super().__init__()
        self.add_residual = add_residual
        self.avg_pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[spatial_dims - 1](1)
        self.fc = nn.Sequential(nn.Linear(C, M), nn.ReLU(inplace=True), nn.Linear(M, C), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view([b, c] + [1] * (x.ndim - 2))
        result = x * y
        if self.add_residual:
            result += x
        return result


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(C, M, 1), nn.Conv2d(M, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        s = F.silu(self.down(s), inplace=True)
        return torch.sigmoid(self.up(s)) * x


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, M), nn.Linear(M, C)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(2).mean(-1)
        return x * F.hardsigmoid(self.fc2(self.fc1(z).relu()))[..., None, None]


class Paddle(nn.Module):
    """PaddleClas' MobileNetV3: a hard sigmoid of slope 0.2, not 1/6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, M, 1), nn.Conv2d(M, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = F.relu(self.conv1(x.mean((2, 3), keepdim=True)))
        return x * torch.clamp(0.2 * self.conv2(s) + 0.5, 0.0, 1.0)


class Lc0(nn.Module):
    """Leela Chess Zero: a scale and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, M), nn.Linear(M, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        s, b = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))[:, :, None, None].chunk(2, dim=1)
        return torch.sigmoid(s) * x + b


class Scse(nn.Module):
    """segmentation_models_pytorch's SCSEModule."""

    def __init__(self) -> None:
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, M, 1), nn.ReLU(inplace=True), nn.Conv2d(M, C, 1), nn.Sigmoid()
        )
        self.sSE = nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cSE(x) + x * self.sSE(x)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(C, M), nn.Dropout(0.5), nn.Linear(M, C)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.drop(F.relu(self.fc1(x.mean((2, 3)))))).sigmoid()[:, :, None, None]


def se_module(**options: Any) -> nn.Module:
    return timm("timm.layers.squeeze_excite").SEModule(C, rd_channels=M, **options)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "moskomule": (Moskomule, (3, C, 6, 5)),
    "MONAI 1-D": (lambda: Monai(1), (3, C, 6)),
    "MONAI 2-D": (lambda: Monai(2), (3, C, 6, 5)),
    "MONAI 3-D": (lambda: Monai(3), (3, C, 4, 3, 2)),
    "MONAI residual": (lambda: Monai(2, add_residual=True), (3, C, 6, 5)),
    "functional": (Functional, (3, C, 6, 5)),
    "flattened": (Flattened, (3, C, 6, 5)),
    "timm SEModule": (se_module, (3, C, 6, 5)),
    "timm SEModule hardsigmoid": (lambda: se_module(gate_layer="hard_sigmoid"), (3, C, 6, 5)),
    "timm SqueezeExcite": (
        lambda: timm("timm.models._efficientnet_blocks").SqueezeExcite(C, rd_channels=M, act_layer=nn.SiLU),
        (3, C, 6, 5),
    ),
    "timm SqueezeExciteCl": (
        lambda: timm("timm.layers.squeeze_excite").SqueezeExciteCl(C, rd_channels=M),
        (3, 6, 5, C),
    ),
    "torchvision": (
        lambda: package("torchvision_shim").torchvision.ops.SqueezeExcitation(C, M, nn.SiLU, nn.Hardsigmoid),
        (3, C, 6, 5),
    ),
}
RELATIVES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm maximum": (lambda: se_module(add_maxpool=True), (3, C, 6, 5)),
    "timm batch norm": (lambda: se_module(norm_layer=nn.BatchNorm2d), (5, C, 6, 5)),
    "timm EffectiveSEModule": (lambda: timm("timm.layers.squeeze_excite").EffectiveSEModule(C), (3, C, 6, 5)),
    "timm EcaModule": (lambda: timm("timm.layers.eca").EcaModule(C), (3, C, 6, 5)),
    "SCSE": (Scse, (3, C, 6, 5)),
    "Paddle": (Paddle, (3, C, 6, 5)),
    "scale and shift": (Lc0, (3, C, 6, 5)),
    "dropout": (Dropped, (3, C, 6, 5)),
}


def converted(
    make: Callable[[], nn.Module], double: bool = True
) -> tuple[nn.Module, nn.Module, se_ext.ConversionReport]:
    """A block as it is, and a copy of it converted."""
    torch.manual_seed(0)
    plain = make().double()
    ours = copy.deepcopy(plain)
    return plain, ours, se_ext.convert(ours)


def results(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    output = block(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, [x, *block.parameters()], weights)]


def assert_same(plain: nn.Module, ours: nn.Module, x: Tensor) -> None:
    for a, b in zip(results(ours, x), results(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("make", "shape"), BLOCKS.values(), ids=BLOCKS.keys())
def test_block_becomes_one_op(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    plain, ours, report = converted(make)
    assert [row.outcome for row in report.converted] == ["SE block"]
    assert [row.shape for row in report.converted] == [f"{C} → {M}"]
    assert isinstance(ours, type(plain))
    x = torch.randn(shape, dtype=torch.float64)
    assert_same(plain, ours, x)
    with torch.profiler.profile() as profile, torch.no_grad():
        ours(x)
    names = {event.key for event in profile.key_averages()}
    assert "se_ext::squeeze_excite" in names
    assert not any("conv" in name or "linear" in name or "mean" in name for name in names)


@pytest.mark.parametrize(("make", "shape"), RELATIVES.values(), ids=RELATIVES.keys())
@pytest.mark.parametrize("training", [True, False])
def test_relative_keeps_its_values(make: Callable[[], nn.Module], shape: tuple[int, ...], training: bool) -> None:
    plain, ours, report = converted(make)
    plain.train(training), ours.train(training)
    assert [row.outcome for row in report.converted] == ["pool and product of a gate"]
    x = torch.randn(shape, dtype=torch.float64)
    assert_same(plain, ours, x)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(C, 6, 5), (C, C, 5)])
def test_one_image_without_a_batch(shape: tuple[int, ...]) -> None:
    """torchvision's block takes one; where C is the height too, it must not be taken for a batch of 1-D maps."""
    plain, ours, _ = converted(BLOCKS["torchvision"][0])
    assert_same(plain, ours, torch.randn(shape, dtype=torch.float64))


# ---- what only looks like a block ----


class WrongPool(Functional):
    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, (1, 2)).mean(-1, keepdim=True) * 2
        return torch.sigmoid(self.up(F.relu(self.down(s)))) * x


class OneOfTwoDims(Functional):
    def forward(self, x: Tensor) -> Tensor:
        s = x.mean(2, keepdim=True)
        return torch.sigmoid(self.up(F.relu(self.down(s)))) * x


class OtherInput(Functional):
    """The product is not with what was pooled."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        s = y.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.up(F.relu(self.down(s)))) * x


class Counting(Functional):
    """A forward that does more than compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        s = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.up(F.relu(self.down(s)))) * x


class Remembering(Functional):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.up(F.relu(self.down(self.last)))) * x


class Tuned(Functional):
    """Another function in training."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        s = torch.sigmoid(self.up(F.relu(self.down(s))))
        return s * x if self.training else 2 * s * x


class OfTheMode(Functional):
    """Another function where gradients are recorded."""

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return s * x * 2 if torch.is_grad_enabled() else s * x


class Chance(Functional):
    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return s * x * 2 if random.random() < 0.5 else s * x


class InPlace(Functional):
    """The caller sees its input changed."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        x *= torch.sigmoid(self.up(F.relu(self.down(s))))
        return x


class Grouped(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(C, M, 1, groups=2), nn.Conv2d(M, C, 1, groups=2)


class Padded(Functional):
    """Layers that widen the map of one point: the product then is with a map of gates."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(C, M, 1, padding=1), nn.Conv2d(M, C, 1)


@pytest.mark.parametrize(
    "cls", [WrongPool, OneOfTwoDims, OtherInput, Counting, Remembering, Tuned, InPlace, OfTheMode, Chance]
)
def test_what_only_looks_like_a_block_is_left(cls: type[nn.Module]) -> None:
    plain, ours, report = converted(cls)
    assert report.converted == []
    assert "nothing was changed" in str(report)
    assert type(ours) is cls
    x = torch.randn(3, C, 6, 5, dtype=torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            random.seed(0)
            expected = plain(x.clone())
            random.seed(0)
            assert torch.equal(ours(x.clone()), expected)


@pytest.mark.parametrize(("cls", "shape"), [(Grouped, (3, C, 6, 5)), (Padded, (3, C, 3, 3))])
def test_layers_with_another_formula_are_called(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    plain, ours, _ = converted(cls)
    assert_same(plain, ours, torch.randn(shape, dtype=torch.float64))


def test_reads_no_more_than_forward_says() -> None:
    """Tracing a forward runs it once, on nothing: no call is counted, no buffer changed, no attribute left."""
    for cls in (Counting, Remembering):
        block = cls()
        before = dict(block.__dict__)
        se_ext.convert(block)
        assert block.__dict__ == before
    block = Counting()
    se_ext.convert(block)
    assert block.calls == []
    normed = se_module(norm_layer=nn.BatchNorm2d)
    se_ext.convert(normed)
    assert normed.bn.num_batches_tracked == 0


def test_activations_of_libraries_are_what_their_names_say() -> None:
    from se_ext._known import _ACTIVATIONS_OF_LIBRARIES
    from se_ext._names import ACTIVATIONS, GATES, name_of

    for (module, name), expected in _ACTIVATIONS_OF_LIBRARIES.items():
        known = GATES if expected == "hardsigmoid" else ACTIVATIONS
        assert name_of("activation", getattr(timm(module), name), known) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_quantised_layers_are_called(first: bool) -> None:
    """Dynamic quantisation puts modules of its own in the layers' places, before the conversion or after it."""
    torch.manual_seed(0)
    plain = nn.Sequential(Flattened())
    ours = copy.deepcopy(plain)
    if not first:
        assert len(se_ext.convert(ours).converted) == 1
    plain, ours = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in (plain, ours))
    if first:
        report = se_ext.convert(ours)
        assert report.converted == []
    x = torch.randn(3, C, 6, 5)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
