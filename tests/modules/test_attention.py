"""The SE block's relatives: formulas, other libraries' modules and checkpoints, compilers, hooks, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Watch, assert_near, check_against_float64, make_map, memory_format, package, saved_maps
from torch import Tensor, nn
from torch.func import functional_call

import se_ext
from se_ext import (
    ChannelAttention,
    ConcurrentSqueezeExcitation,
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GatherExcite,
    MaskedSqueezeExcitation,
    ScaleShiftSqueezeExcitation,
    SpatialSqueezeExcitation,
    _attention_parts,
    reference,
)

C, M = 16, 4
State = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# ---- the formulas, in plain torch ----


def spread(s: Tensor, x: Tensor) -> Tensor:
    """[N, C] over the points of x."""
    return s.reshape(*s.shape, *[1] * (x.dim() - 2))


def mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)


def maximum(x: Tensor) -> Tensor:
    return x.flatten(2).max(2).values  # of several equal ones the first gets the gradient


def mixed(x: Tensor) -> Tensor:
    return (mean(x) + maximum(x)) / 2


def mlp(w: State, z: Tensor, activation: str = "relu") -> Tensor:
    hidden = reference.ACTIVATIONS[activation](F.linear(z, w["fc1.weight"].flatten(1), w.get("fc1.bias")))
    return F.linear(hidden, w["fc2.weight"].flatten(1), w.get("fc2.bias"))


def effective(pool: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]) -> Callable[[State, Tensor], Tensor]:
    return lambda w, x: x * spread(gate(F.linear(pool(x), w["fc.weight"].flatten(1), w["fc.bias"])), x)


def channel_convolution(mode: str) -> Callable[[State, Tensor], Tensor]:
    def formula(w: State, x: Tensor) -> Tensor:
        border = w["conv.weight"].shape[2] // 2
        z = F.pad(mean(x)[:, None], (border, border), mode)
        return x * spread(F.conv1d(z, w["conv.weight"])[:, 0].sigmoid(), x)

    return formula


def points(w: State, x: Tensor) -> Tensor:
    """x ⊙ sSE(x)."""
    t = torch.einsum("c,nc...->n...", w["sSE.0.weight"].flatten(), x)[:, None]
    return x * (t + w["sSE.0.bias"] if "sSE.0.bias" in w else t).sigmoid()


def concurrent(w: State, x: Tensor) -> Tensor:
    layers = {f"fc{i}.{kind}": w[f"cSE.{2 * i - 1}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")}
    return x * spread(mlp(layers, mean(x)).sigmoid(), x) + points(w, x)


def gathered(extent: int) -> Callable[[State, Tensor], Tensor]:
    def formula(w: State, x: Tensor) -> Tensor:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
        means = pool(x, 2 * extent - 1, extent, extent - 1, count_include_pad=False)
        return x * F.interpolate(means, x.shape[2:]).sigmoid()

    return formula


def scaled_and_shifted(post: str) -> Callable[..., Tensor]:
    def formula(w: State, x: Tensor, residual: Tensor | None = None) -> Tensor:
        s, t = mlp(w, mean(x), "silu").chunk(2, 1)
        v = s.sigmoid()[(..., *[None] * (x.dim() - 2))] * x + spread(t, x)
        return reference.ACTIVATIONS[post](v if residual is None else v + residual)

    return formula


# What every promise is tested of: the module, its formula, and the names of its layers.
@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    formula: Callable[..., Tensor]
    layers: tuple[str, ...] = ()


TWO = ("fc1", "fc2")
hardsigmoid = reference.GATES["hardsigmoid"]
CASES = {
    "effective": Case(lambda: EffectiveSqueezeExcitation(C), effective(mean, hardsigmoid), ("fc",)),
    "effective, mixed": Case(
        lambda: EffectiveSqueezeExcitation(C, nn.Sigmoid, add_maxpool=True), effective(mixed, torch.sigmoid), ("fc",)
    ),
    "mixed": Case(
        lambda: ChannelAttention(C, M, nn.SiLU, pool="mixed"),
        lambda w, x: x * spread(mlp(w, mixed(x), "silu").sigmoid(), x),
        TWO,
    ),
    "both": Case(
        lambda: ChannelAttention(C, M, bias=False, pool="both"),
        lambda w, x: x * spread((mlp(w, mean(x)) + mlp(w, maximum(x))).sigmoid(), x),
        TWO,
    ),
    "both, gain": Case(
        lambda: ChannelAttention(C, M, pool="both", gain=0.5),
        lambda w, x: x * spread((mlp(w, mean(x)) + mlp(w, maximum(x))).sigmoid(), x) / 2,
        TWO,
    ),
    "gain": Case(
        lambda: ChannelAttention(C, M, gain=2), lambda w, x: 2 * x * spread(mlp(w, mean(x)).sigmoid(), x), TWO
    ),
    "no gain": Case(lambda: ChannelAttention(C, M), lambda w, x: x * spread(mlp(w, mean(x)).sigmoid(), x), TWO),
    "channel convolution": Case(lambda: EfficientChannelAttention(C), channel_convolution("constant"), ("conv",)),
    "circular": Case(
        lambda: EfficientChannelAttention(kernel_size=5, circular=True), channel_convolution("circular"), ("conv",)
    ),
    "gather": Case(GatherExcite, lambda w, x: x * spread(mean(x).sigmoid(), x)),
    "gather, extent 2": Case(lambda: GatherExcite(2), gathered(2)),
    "gather, extent 4": Case(lambda: GatherExcite(4), gathered(4)),
    "spatial": Case(lambda: SpatialSqueezeExcitation(C), points, ("sSE.0",)),
    "spatial, no bias": Case(lambda: SpatialSqueezeExcitation(C, bias=False), points, ("sSE.0",)),
    "concurrent": Case(lambda: ConcurrentSqueezeExcitation(C, C // M), concurrent, ("cSE.1", "cSE.3", "sSE.0")),
    "scale and shift": Case(lambda: ScaleShiftSqueezeExcitation(C, M, "silu"), scaled_and_shifted("identity"), TWO),
    "scale and shift, relu": Case(
        lambda: ScaleShiftSqueezeExcitation(C, M, "silu", post_activation=nn.ReLU), scaled_and_shifted("relu"), TWO
    ),
    "masked": Case(lambda: MaskedSqueezeExcitation(C, M), lambda w, x: x * spread(mlp(w, mean(x)).sigmoid(), x), TWO),
}
SHAPES = {1: (3, C, 23), 2: (3, C, 7, 5), 3: (2, C, 3, 5, 2)}


def shape_of(name: str, dims: int) -> tuple[int, ...]:
    """torch's pooling takes no map of 3 spatial dims that is smaller than its window."""
    return (2, C, 7, 8, 9) if "extent" in name and dims == 3 else SHAPES[dims]


def module_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its weights large enough for the gates to differ from point to point and from channel to channel."""
    module = CASES[name].make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.to(dtype)


def check(
    module: nn.Module, formula: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, *more: Tensor | None
) -> None:
    """Value and gradients of all tensors against the formula in float64."""
    names = list(module.state_dict())
    weights = [w.detach().to(dtype).requires_grad_() for w in module.state_dict().values()]

    def ours(x: Tensor, *tensors: Tensor) -> Tensor:
        weights, others = tensors[: len(names)], tensors[len(names) :]
        return functional_call(module, dict(zip(names, weights, strict=True)), (x, *others))

    def plain(x: Tensor, *tensors: Tensor) -> Tensor:
        weights, others = tensors[: len(names)], tensors[len(names) :]
        return formula(dict(zip(names, weights, strict=True)), x, *others)

    n = x.numel()
    check_against_float64(ours, plain, [x, *weights, *more], (x[0, 0].numel() + x.size(1), n))


# ---- values ----


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dims: int, channels_last: bool) -> None:
    if channels_last and dims == 1:
        return
    x = make_map(shape_of(name, dims), torch.float32, channels_last, requires_grad=True)
    check(module_of(name), CASES[name].formula, x, torch.float32)


# Not where the rounding of a shift to a half type takes points across the kink of a last ReLU.
SMOOTH = [name for name in CASES if "relu" not in name]


@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMOOTH)
def test_half_types(name: str, dtype: torch.dtype, weights: str) -> None:
    """Weights may be float32 beside a half-typed map."""
    x = make_map(SHAPES[2], dtype, requires_grad=True)
    check(module_of(name), CASES[name].formula, x, dtype if weights == "half" else torch.float32)


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_the_output_keeps_the_layout(name: str, channels_last: bool) -> None:
    for dims in (2, 3):
        x = make_map(shape_of(name, dims), channels_last=channels_last)
        y = module_of(name)(x)
        assert y.stride() == x.stride(), dims
        assert y.is_contiguous(memory_format=memory_format(x.dim(), channels_last))


@pytest.mark.parametrize("name", CASES)
def test_other_strides_and_an_empty_batch(name: str) -> None:
    module, formula = module_of(name, torch.float64), CASES[name].formula
    state = module.state_dict()
    for x in (
        make_map((3, C, 5, 7), torch.float64).transpose(2, 3),
        make_map((3, C, 14, 5), torch.float64)[:, :, ::2],
        make_map((1, C, 7, 5), torch.float64).expand(3, C, 7, 5),
        make_map(SHAPES[2], torch.float64).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_near(module(x), formula(state, x), allowed=1e-12)
    assert module(torch.zeros(0, C, 7, 5, dtype=torch.float64)).shape == (0, C, 7, 5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("scale and shift", torch.float32),
        ("scale and shift", torch.bfloat16),
        ("scale and shift, relu", torch.float32),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
def test_scale_and_shift_with_a_shortcut(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    x, r = (make_map(SHAPES[2], dtype, channels_last, requires_grad=True) for _ in range(2))
    check(module_of(name), CASES[name].formula, x, dtype, r)


def test_one_of_several_maxima_gets_the_gradient() -> None:
    x = torch.zeros(1, C, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(_attention_parts.maximum(x).sum(), x)
    assert gradient.flatten(2).sort().values.tolist() == [[[0, 0, 0, 0, 0, 1]] * C]


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    module = module_of(name, torch.float64)
    x = make_map((2, C, 3, 2), torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    (gradient,) = torch.autograd.grad(CASES[name].formula(state, x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), x)
    assert_near(second, expected, allowed=1e-6)


def with_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return module(x).detach()


@pytest.mark.parametrize("name", [name for name in CASES if "mixed" in name or "both" in name])
def test_without_gradients_the_maximum_is_the_same(name: str) -> None:
    """It is found in another way."""
    module, x = module_of(name), make_map(SHAPES[2])
    x[0, 0, 1, 2] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(module(x), with_gradients(module, x), equal_nan=True)


# ---- masks ----


def over_the_valid(mask: Tensor) -> Callable[[State, Tensor], Tensor]:
    def formula(w: State, x: Tensor) -> Tensor:
        weights = mask.to(x.dtype).flatten(1)[:, None]
        z = (x.flatten(2) * weights).sum(2) / weights.sum(2)
        return x * spread(mlp(w, z).sigmoid(), x)

    return formula


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_mask(dims: int, dtype: torch.dtype, channels_last: bool) -> None:
    mask = torch.rand(SHAPES[dims][:1] + SHAPES[dims][2:]) < 0.6
    x = make_map(SHAPES[dims], dtype, channels_last, requires_grad=True)
    module = MaskedSqueezeExcitation(C, M)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.se = module

        def forward(self, x: Tensor) -> Tensor:
            return self.se(x, mask=mask)

    formula = over_the_valid(mask)
    check(Given(), lambda w, x: formula({k.removeprefix("se."): v for k, v in w.items()}, x), x, dtype)


@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
def test_lengths_say_what_is_valid(relative: bool) -> None:
    x = make_map((3, C, 20), torch.float64)
    lengths = torch.tensor([20, 13, 1])
    module = MaskedSqueezeExcitation(C, M, relative_lengths=relative).double()
    y = module(x, lengths / 20 if relative else lengths)
    for i, length in enumerate(lengths.tolist()):
        assert_near(y[i : i + 1, :, :length], module(x[i : i + 1, :, :length]), allowed=1e-12)
    changed = x.clone()
    changed[1, :, 13:] = 1e6
    assert torch.equal(module(changed, lengths / 20 if relative else lengths)[1, :, :13], y[1, :, :13])


def test_what_is_not_valid_does_not_matter() -> None:
    x, mask = make_map((2, C, 9)), torch.rand(2, 9) < 0.6
    mask[:, 0] = True
    spoilt = torch.where(mask[:, None], x, torch.tensor(1e6)).requires_grad_()
    z = se_ext.masked_squeeze(spoilt, mask)
    assert torch.equal(z, se_ext.masked_squeeze(x, mask))
    z.sum().backward()
    assert torch.equal(spoilt.grad != 0, mask[:, None].expand_as(x))


def test_a_masked_sum_may_be_more_than_float16_holds() -> None:
    x = torch.full((1, C, 400), 60000.0).half()
    z = se_ext.masked_squeeze(x, torch.arange(400)[None] < 300)
    assert_near(z, torch.full((1, C), 60000.0).double(), allowed=2e-3)


def test_no_valid_point_gives_nan() -> None:
    assert se_ext.masked_squeeze(make_map((1, C, 9)), torch.zeros(1, 9, dtype=torch.bool)).isnan().all()


# ---- other libraries' modules ----


class SCSEModule(nn.Module):
    """As in segmentation_models_pytorch."""

    def __init__(self, in_channels: int, reduction: int) -> None:
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, in_channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels // reduction, in_channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(in_channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cSE(x) + x * self.sSE(x)


class Wrapped(nn.Module):
    """As SpeechBrain's Conv1d, whose layer is a child."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(*args)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SEBlock(nn.Module):
    """As in SpeechBrain."""

    def __init__(self, in_channels: int, se_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Wrapped(in_channels, se_channels, 1), Wrapped(se_channels, out_channels, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            mask = (torch.arange(x.shape[-1])[None] < (lengths * x.shape[-1])[:, None]).unsqueeze(1)
            s = (x * mask).sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True)
        else:
            s = x.mean(dim=2, keepdim=True)
        return self.conv2(self.conv1(s).relu()).sigmoid() * x


class TimesTwo(nn.Sequential):
    """The block of an NFNet, whose attn_gain is 2."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def timm(name: str, *args: Any, **options: Any) -> nn.Module:
    package("torchvision_shim")  # timm imports torchvision
    module = package("timm.layers.cbam" if name.endswith("ChannelAttn") else "timm.layers")
    return getattr(module, name)(*args, **options)


UPSTREAM: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "EffectiveSEModule": (lambda: timm("EffectiveSEModule", C), lambda: EffectiveSqueezeExcitation(C)),
    "EffectiveSEModule, add_maxpool": (
        lambda: timm("EffectiveSEModule", C, add_maxpool=True, gate_layer="sigmoid"),
        lambda: EffectiveSqueezeExcitation(C, nn.Sigmoid, add_maxpool=True),
    ),
    "SEModule, add_maxpool": (
        lambda: timm("SEModule", C, rd_channels=M, add_maxpool=True),
        lambda: ChannelAttention(C, M, pool="mixed"),
    ),
    "SEModule, attn_gain": (
        lambda: TimesTwo(timm("SEModule", C, rd_channels=M)),
        lambda: nn.Sequential(ChannelAttention(C, M, gain=2)),
    ),
    "ChannelAttn": (
        lambda: timm("ChannelAttn", C, rd_channels=M),
        lambda: ChannelAttention(C, M, bias=False, pool="both"),
    ),
    "LightChannelAttn": (
        lambda: timm("LightChannelAttn", C, rd_channels=M),
        lambda: ChannelAttention(C, M, bias=False, pool="mixed"),
    ),
    **{
        f"EcaModule, {c}": (lambda c=c: timm("EcaModule", c), lambda c=c: EfficientChannelAttention(c))
        for c in (C, 64, 256)
    },
    "EcaModule, kernel_size": (
        lambda: timm("EcaModule", kernel_size=7),
        lambda: EfficientChannelAttention(kernel_size=7),
    ),
    "CecaModule": (lambda: timm("CecaModule", C), lambda: EfficientChannelAttention(C, circular=True)),
    **{
        f"GatherExcite, {e}": (
            lambda e=e: timm("GatherExcite", C, extent=e, use_mlp=False),
            lambda e=e: GatherExcite(e),
        )
        for e in (0, 2, 4, 8)
    },
    "SCSEModule": (lambda: SCSEModule(C, 4), lambda: ConcurrentSqueezeExcitation(C, 4)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_as_upstream(name: str, channels_last: bool) -> None:
    """Their checkpoint loads as it is, ours into theirs too; outputs and gradients are theirs."""
    make_theirs, make_ours = UPSTREAM[name]
    theirs, ours = make_theirs().double(), make_ours().double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    channels = int(name.split(", ")[1]) if name.startswith("EcaModule, ") and name[-1].isdigit() else C
    x = make_map((2, channels, 9, 10), torch.float64, channels_last)
    found = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape))
        found.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, allowed=1e-7)  # ATen's hardsigmoid has its slope in float32


@pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
def test_as_speechbrain(with_lengths: bool) -> None:
    theirs, ours = SEBlock(C, M, C).double(), MaskedSqueezeExcitation(C, M).double()
    checkpoint = theirs.state_dict()
    ours.load_state_dict(checkpoint)
    assert set(checkpoint) == set(theirs.state_dict())  # the caller's dict is as it was
    x = make_map((3, C, 20), torch.float64)
    lengths = torch.tensor([1.0, 0.63, 0.05], dtype=torch.float64) if with_lengths else None
    found = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf, lengths)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad.flatten() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, allowed=1e-12)


# ---- what is fused, kept and called ----


def operators(module: nn.Module, x: Tensor) -> list[str]:
    with Watch() as watch, torch.no_grad():
        module(x)
    return watch.names


FUSED = {
    "effective": ["se_ext::squeeze", "se_ext::rescale"],
    "mixed": ["se_ext::squeeze", "se_ext::excite", "se_ext::rescale"],
    "both": ["se_ext::squeeze", "se_ext::excite", "se_ext::rescale"],
    "gain": ["se_ext::bn_squeeze_excite"],
    "no gain": ["se_ext::squeeze_excite"],
    "channel convolution": ["se_ext::squeeze", "se_ext::rescale"],
    "spatial": ["se_ext::rescale"],
    "concurrent": ["se_ext::rescale", "se_ext::squeeze_excite"],
    "scale and shift": ["se_ext::squeeze", "se_ext::rescale"],
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_known_is_fused(name: str, channels_last: bool) -> None:
    names = operators(module_of(name), make_map(SHAPES[2], channels_last=channels_last))
    assert [op for op in names if op.startswith("se_ext::")] == FUSED[name]
    assert not {"aten::clone", "aten::contiguous", "aten::convolution"} & set(names) or name == "channel convolution"


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", [name for name in CASES if "extent" not in name])
def test_only_the_input_is_kept_for_backward(name: str, channels_last: bool) -> None:
    x = make_map(SHAPES[2], channels_last=channels_last, requires_grad=True)
    y, saved = saved_maps(lambda: module_of(name)(x), x.numel())
    assert set(saved) <= {x.data_ptr(), y.data_ptr()}
    assert y.data_ptr() not in saved or name == "scale and shift, relu"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].layers])
def test_hooks_of_layers_take_effect(name: str) -> None:
    """A forward hook that scales a layer's output: the formula with a scaled weight and bias."""
    x = make_map(SHAPES[2], torch.float64)
    for layer in CASES[name].layers:
        module, seen = module_of(name, torch.float64), []
        child = module.get_submodule(layer)
        child.register_forward_hook(lambda child, args, output: 1.5 * output)
        child.register_full_backward_hook(lambda child, gradients, outputs, seen=seen: seen.append(outputs))
        state = {k: 1.5 * v if k.startswith(layer) else v for k, v in module.state_dict().items()}
        y = module(x)
        assert_near(y, CASES[name].formula(state, x), allowed=1e-7)
        y.sum().backward()
        assert seen


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].layers])
def test_layers_of_another_class_take_effect(name: str) -> None:
    x = make_map(SHAPES[2], torch.float64)
    for layer in CASES[name].layers:
        module = module_of(name, torch.float64)
        child = module.get_submodule(layer)

        class Halved(type(child)):
            def forward(self, z: Tensor) -> Tensor:
                return super().forward(z) / 2

        child.__class__ = Halved
        state = {k: v / 2 if k.startswith(layer) else v for k, v in module.state_dict().items()}
        assert_near(module(x), CASES[name].formula(state, x), allowed=1e-7)


@pytest.mark.parametrize("index", [0, 2, 4])
def test_hooks_between_the_layers_of_a_concurrent_block(index: int) -> None:
    module = module_of("concurrent")
    x = make_map(SHAPES[2])
    before = module(x)
    calls: list[int] = []
    module.cSE[index].register_forward_hook(lambda *_: calls.append(index))
    torch.testing.assert_close(module(x), before)
    assert calls == [index]


def test_a_padded_layer_is_called() -> None:
    module = EffectiveSqueezeExcitation(C).double()
    module.fc = nn.Conv2d(C, C, 3, padding=1).double()
    x = make_map(SHAPES[2], torch.float64)
    scale = F.hardsigmoid(module.fc(x.mean((2, 3), keepdim=True)))
    assert_near(module(x), scale * x, allowed=1e-12)


# ---- torch's tools ----


@pytest.mark.parametrize("name", CASES)
def test_scripted_traced_and_exported(name: str) -> None:
    """The batch may differ from that of the example."""
    module, x, more = module_of(name), make_map(SHAPES[2]), make_map((5, *SHAPES[2][1:]))
    expected = module(more)
    exported = torch.export.export(module, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch")}})
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    for program in (exported.module(), torch.jit.load(buffer), torch.jit.trace(module, (x,))):
        torch.testing.assert_close(program(more), expected)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].layers and "conv" not in CASES[name].layers])
def test_a_script_of_a_hooked_layer_is_refused(name: str) -> None:
    module = module_of(name)
    module.get_submodule(CASES[name].layers[-1]).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"expected .* of {type(module).__name__} to be plain, got one with hooks"):
        torch.jit.script(module)


@pytest.mark.parametrize("name", CASES)
def test_compiled_in_one_graph(name: str) -> None:
    module, x = module_of(name), make_map(SHAPES[2], requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    weight = torch.randn(SHAPES[2])
    found = []
    for f in (compiled, module):
        y = f(x)
        found.append([y, *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cpu_only
def test_compiled_by_inductor() -> None:
    """All of them between two convolutions, in a training step."""
    network = nn.Sequential(
        nn.Conv2d(3, C, 3), *(module_of(name) for name in CASES if "," not in name), nn.Conv2d(C, 2, 3)
    )
    plain, x = copy.deepcopy(network).double(), torch.randn(2, 3, 12, 12)
    torch._dynamo.reset()
    y = torch.compile(network, fullgraph=True)(x)
    exact = plain(x.double())
    assert_near(y, exact, allowed=1e-4)
    y.square().sum().backward()
    exact.square().sum().backward()
    for (key, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert_near(p.grad, q.grad, key, allowed=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_torch_func(name: str) -> None:
    """Forward-mode AD against a difference, and vmap against a loop."""
    module = module_of(name, torch.float64)
    x, tangent = make_map(SHAPES[2], torch.float64), make_map(SHAPES[2], torch.float64)
    _, slope = torch.func.jvp(module, (x,), (tangent,))
    assert_near(slope, (module(x + 1e-6 * tangent) - module(x - 1e-6 * tangent)) / 2e-6, allowed=1e-6)
    stacked = torch.stack([x, tangent])
    assert_near(torch.func.vmap(module)(stacked), torch.stack([module(x), module(tangent)]), allowed=1e-12)


@pytest.mark.cpu_only
def test_onnx() -> None:
    """One of each, in one graph of standard operators."""
    runtime = pytest.importorskip("onnxruntime")
    network = nn.Sequential(*(module_of(name) for name in CASES if "," not in name)).eval()
    x = make_map(SHAPES[2])
    table = se_ext.onnx.translation_table()
    program = torch.onnx.export(network, (x,), dynamo=True, custom_translation_table=table, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {"input": x.numpy()})
    assert_near(torch.from_numpy(y), network(x).double())


@pytest.mark.parametrize("name", CASES)
def test_copies(name: str) -> None:
    module, x = module_of(name), make_map(SHAPES[2])
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    assert repr(module).startswith(type(module).__name__)


@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str) -> None:
    module, x = module_of(name), make_map(SHAPES[2], requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    assert x.grad.dtype is torch.float32
    if "extent" not in name:  # torch's own multiplication keeps float32
        assert y.dtype is torch.bfloat16
    assert_near(
        y, CASES[name].formula({k: v.double() for k, v in module.state_dict().items()}, x.double()), allowed=0.03
    )


# ---- errors ----


x3, w2d, square = torch.zeros(2, C, 3, 3), torch.zeros(M, C), torch.zeros(C, C)
back = torch.zeros(C, M)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: se_ext.effective_squeeze_excite(torch.zeros(2, C), square),
        RuntimeError,
        r"effective_squeeze_excite: expected input of shape \[N, C, \*spatial\] with 1 to 3 .*, got \[2, 16\]",
    ),
    (
        lambda: se_ext.effective_squeeze_excite(x3, w2d),
        RuntimeError,
        r"effective_squeeze_excite: expected weight of shape \[16, 16\] or \[16, 16, 1, 1\], got \[4, 16\]",
    ),
    (
        lambda: se_ext.effective_squeeze_excite(x3, square, torch.zeros(3)),
        RuntimeError,
        r"effective_squeeze_excite: expected bias of shape \[16\], got \[3\]",
    ),
    (
        lambda: se_ext.effective_squeeze_excite(x3, square.double()),
        TypeError,
        r"effective_squeeze_excite: expected weight of dtype torch.float32, got torch.float64",
    ),
    (
        lambda: se_ext.effective_squeeze_excite(x3.bfloat16(), square.half()),
        TypeError,
        r"expected weight of dtype torch.bfloat16 or torch.float32, got torch.float16",
    ),
    (
        lambda: se_ext.effective_squeeze_excite(x3, square, gate="softmax"),
        ValueError,
        r'effective_squeeze_excite: expected gate to be one of sigmoid, .*, got "softmax"',
    ),
    (
        lambda: se_ext.effective_squeeze_excite(x3, square, pool="both"),
        ValueError,
        r'effective_squeeze_excite: expected pool to be one of mean, mixed, got "both"',
    ),
    (
        lambda: se_ext.channel_attention(x3, w2d, None, back, None, pool="max"),
        ValueError,
        r'channel_attention: expected pool to be one of mean, mixed, both, got "max"',
    ),
    (
        lambda: se_ext.channel_attention(x3, w2d, None, w2d, None, pool="both"),
        RuntimeError,
        r"excite: expected w2 of shape \[16, 4\] or \[16, 4, 1, 1\], got \[4, 16\]",
    ),
    (
        lambda: se_ext.efficient_channel_attention(x3, torch.zeros(1, 1, 4)),
        RuntimeError,
        r"efficient_channel_attention: expected weight of shape \[1, 1, k\] with an odd k, got \[1, 1, 4\]",
    ),
    (
        lambda: se_ext.efficient_channel_attention(x3, torch.zeros(1, 1, 3).double()),
        TypeError,
        r"efficient_channel_attention: expected weight of dtype torch.float32, got torch.float64",
    ),
    (
        lambda: se_ext.gather_excite(x3, 3),
        ValueError,
        r"gather_excite: expected extent to be 0 or an even number, got 3",
    ),
    (
        lambda: se_ext.spatial_squeeze_excite(x3, w2d),
        RuntimeError,
        r"spatial_squeeze_excite: expected weight of shape \[1, 16\] or \[1, 16, 1, 1\], got \[4, 16\]",
    ),
    (
        lambda: se_ext.concurrent_squeeze_excite(x3, w2d, None, back, None, w2d),
        RuntimeError,
        r"concurrent_squeeze_excite: expected spatial_weight of shape \[1, 16\] or \[1, 16, 1, 1\], got \[4, 16\]",
    ),
    (
        lambda: se_ext.scale_shift_squeeze_excite(x3, back, None, back, None),
        RuntimeError,
        r"scale_shift_squeeze_excite: expected w1 of shape \[M, 16\] or \[M, 16, 1, 1\], got \[16, 4\]",
    ),
    (
        lambda: se_ext.scale_shift_squeeze_excite(x3, w2d, None, back, None),
        RuntimeError,
        r"scale_shift_squeeze_excite: expected w2 of shape \[32, 4\] or \[32, 4, 1, 1\], got \[16, 4\]",
    ),
    (
        lambda: se_ext.scale_shift_squeeze_excite(x3, w2d, None, torch.zeros(32, M), None, residual=x3[:1]),
        RuntimeError,
        r"scale_shift_squeeze_excite: expected residual of shape \[2, 16, 3, 3\], got \[1, 16, 3, 3\]",
    ),
    (
        lambda: se_ext.scale_shift_squeeze_excite(x3, w2d, None, torch.zeros(32, M), None, "elu"),
        ValueError,
        r'scale_shift_squeeze_excite: expected activation to be one of identity, .*, got "elu"',
    ),
    (
        lambda: se_ext.masked_squeeze(x3, torch.ones(2, 9) > 0),
        RuntimeError,
        r"masked_squeeze: expected mask of shape \[2, 3, 3\], got \[2, 9\]",
    ),
    (
        lambda: se_ext.masked_squeeze(x3, torch.ones(2, 3, 3)),
        TypeError,
        r"masked_squeeze: expected mask of dtype torch.bool, got torch.float32",
    ),
    (
        lambda: se_ext.length_mask(torch.ones(2, 1), 3),
        RuntimeError,
        r"length_mask: expected lengths of shape \[N\], got \[2, 1\]",
    ),
    (
        lambda: MaskedSqueezeExcitation(C, M)(x3, torch.ones(2)),
        RuntimeError,
        r"MaskedSqueezeExcitation: expected input of shape \[N, C, L\] with lengths, got \[2, 16, 3, 3\]",
    ),
    (
        lambda: MaskedSqueezeExcitation(C, M)(x3.flatten(2), torch.ones(2), torch.ones(2, 9) > 0),
        ValueError,
        r"MaskedSqueezeExcitation: expected lengths or a mask, got both",
    ),
    (lambda: GatherExcite(3), ValueError, "expected extent to be 0 or an even number, got 3"),
    (lambda: ChannelAttention(C, M, pool="max"), ValueError, "expected pool to be one of mean, mixed, both, got 'max'"),
    (lambda: EfficientChannelAttention(kernel_size=4), ValueError, "expected kernel_size to be odd, got 4"),
    (lambda: EffectiveSqueezeExcitation(0), ValueError, "expected channels to be at least 1, got 0"),
    (lambda: EffectiveSqueezeExcitation(C, nn.Softmax), ValueError, "expected scale_activation to be one of Sigmoid"),
    (lambda: ConcurrentSqueezeExcitation(8, 16), ValueError, "expected input_channels // reduction to be at least 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=range(len(ERRORS)))
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
