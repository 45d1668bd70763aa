"""In inference, a converted network writes a batch norm's output into the map that the convolution in front gave.
Nobody who could have seen that map finds it changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from helpers import package
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import se_ext
from conversion.small import SE, images, network

pytestmark = pytest.mark.cpu_only

NORMS, TAILS = 8, 4  # of the small network: batch norms without an SE block behind them, and with one
CONVOLUTIONS = [
    "stem.0",
    *(f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)),
    "blocks.1.downsample.0",
    *(f"blocks.{i}.{name}" for i in (2, 3) for name in ("conv_pw", "conv_dw", "conv_pwl")),
]


def pair(change: Callable[[nn.Module], Any] = lambda _: None, after: bool = True) -> tuple[nn.Module, nn.Module]:
    """The network as it is, and converted; both changed, the latter after the conversion or before."""
    plain = network().eval()
    ours = copy.deepcopy(plain)
    change(plain)
    if after:
        se_ext.convert(ours)
        change(ours)
    else:
        change(ours)
        se_ext.convert(ours)
    return plain, ours


def overwritten(call: Callable[[], Any]) -> tuple[int, int]:
    """How many batch norms wrote into their input in a call, without an SE block behind them and with one."""
    with torch.profiler.profile() as profile:
        call()
    names = [event.name for event in profile.events()]
    return names.count("se_ext::_bn_activation_running_"), names.count("se_ext::_bn_squeeze_excite_running_")


def assert_same(ours: Tensor, plain: Tensor) -> None:
    assert (ours - plain).abs().max() <= 1e-9 * plain.abs().max()


class Kept:
    """Tensors, and the values that they had when they were kept."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Any) -> Any:
        self.pairs.append((t, t.detach().clone()))
        return t

    def assert_unchanged(self) -> None:
        assert self.pairs
        for t, before in self.pairs:
            assert torch.equal(t, before)


# ---- it is written, and right ----


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_batch_norm_writes_into_the_convolutions_output(channels_last: bool, inference_mode: bool) -> None:
    plain, ours = pair()
    x = images().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.inference_mode() if inference_mode else torch.no_grad():
        before = x.clone()
        assert_same(ours(x), plain(x))
        assert torch.equal(x, before)
        assert overwritten(lambda: ours(x)) == (NORMS, TAILS)


def test_an_input_from_inference_mode_outside_of_it() -> None:
    plain, ours = pair()
    with torch.inference_mode():
        x = images()
    with torch.no_grad():
        assert overwritten(lambda: ours(x)) == (NORMS, TAILS)
        assert_same(ours(x), plain(x))


def test_it_is_what_is_computed_with_gradients() -> None:
    _, ours = pair()
    recorded = ours(images())
    with torch.no_grad():
        assert torch.equal(ours(images()), recorded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    plain, ours = pair()
    exact = plain.double()(images())
    with torch.no_grad():
        found = ours.to(dtype)(images(dtype))
        assert overwritten(lambda: ours(images(dtype))) == (NORMS, TAILS)
    assert (found.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_not_while_gradients_are_recorded() -> None:
    """Frozen or not: whoever trains what stands in front needs the maps as they were."""
    plain, ours = pair()
    for model in (plain, ours):
        model.requires_grad_(False)
    x, y = images().requires_grad_(), images().requires_grad_()
    assert overwritten(lambda: ours(x)) == (0, 0)
    ours(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert_same(x.grad, y.grad)


def test_not_in_training() -> None:
    plain, ours = pair()
    with torch.no_grad():
        for model in (plain, ours):
            model.train()
            for m in model.modules():
                if hasattr(m, "drop_prob"):
                    m.drop_prob = 0.0
        x = images()
        assert overwritten(lambda: copy.deepcopy(ours)(x)) == (0, 0)
        assert_same(ours(x), plain(x))
    for name, buffer in plain.named_buffers():
        assert_same(ours.get_buffer(name).double(), buffer.double() + 1e-300)


# ---- whoever keeps the convolution's output ----


@pytest.mark.parametrize("path", CONVOLUTIONS)
@pytest.mark.parametrize("removed", [False, True], ids=["stays", "takes itself away"])
def test_a_hook_that_keeps_the_output(path: str, removed: bool) -> None:
    plain, ours = pair()
    kept = Kept()

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        kept(output)
        if removed:
            handle.remove()

    handle = ours.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        assert_same(ours(images()), plain(images()))
        kept.assert_unchanged()
        if removed:
            assert overwritten(lambda: ours(images())) == (NORMS, TAILS)


def test_a_hook_for_all_modules() -> None:
    plain, ours = pair()
    kept, convolutions = Kept(), [ours.get_submodule(path) for path in CONVOLUTIONS]

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module in convolutions:
            kept(output)

    with torch.no_grad(), nn.modules.module.register_module_forward_hook(hook):
        found = ours(images())
    kept.assert_unchanged()
    with torch.no_grad():
        assert_same(found, plain(images()))


@pytest.mark.parametrize("path", ["stem.1", "blocks.0.bn1", "blocks.0.bn2", "blocks.2.bn1", "blocks.2.bn2"])
def test_a_hook_of_the_batch_norm_that_keeps_its_input(path: str) -> None:
    plain, ours = pair()
    kept = Kept()
    ours.get_submodule(path).register_forward_pre_hook(lambda m, args: (kept(args[0]), None)[1])
    with torch.no_grad():
        assert_same(ours(images()), plain(images()))
    kept.assert_unchanged()


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Cached(nn.Conv2d):
    """A convolution that computes its output once."""

    cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = super().forward(x)
        return self.cache


class Adapted(nn.Module):
    """A low-rank adapter around a convolution, which is switched off."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Conv2d(8, 2, 3, padding=1).double(), nn.Conv2d(2, 8, 1).double()
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.base(x)
        return self.last if self.training else self.last + self.up(self.down(x))


class Keeper(Tensor):
    """A weight that keeps what is computed with it."""

    kept: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function is torch.conv2d and cls.kept is not None:
            cls.kept(result)
        return result


def seeded(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def changed(model: nn.Module) -> None:
        torch.manual_seed(3)
        change(model)

    return changed


def cached(model: Any) -> None:
    conv = model.blocks[0].conv1
    model.blocks[0].conv1 = Cached(8, 8, 3, padding=1, bias=False).double()
    model.blocks[0].conv1.load_state_dict(conv.state_dict())


def own_method(name: str) -> Callable[[Any], None]:
    """An instance's method that keeps what it gives, and gives it again."""

    def change(model: Any) -> None:
        conv = model.blocks[0].conv1
        method, given = getattr(conv, name), []

        def once(*args: Any) -> Tensor:
            if not given:
                given.append(method(*args))
            return given[0]

        object.__setattr__(conv, name, once)

    return change


def in_place_of_conv1(make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.blocks[0].conv1 = make(model.blocks[0].conv1)

    return change


IN_ITS_PLACE: dict[str, Callable[[Any], Any]] = {
    "its input": in_place_of_conv1(lambda _: Same()),
    "identity": in_place_of_conv1(lambda _: nn.Identity()),
    "what it computed before": cached,
    "adapter": seeded(in_place_of_conv1(Adapted)),
    "spectral norm": seeded(lambda m: parametrizations.spectral_norm(m.blocks[0].conv1)),
    "weight norm": seeded(lambda m: parametrizations.weight_norm(m.blocks[0].conv1)),
    "a forward of its own": own_method("forward"),
    "a _conv_forward of its own": own_method("_conv_forward"),
}


@pytest.mark.parametrize("name", IN_ITS_PLACE)
@pytest.mark.parametrize("after", [True, False], ids=["after the conversion", "before"])
def test_what_stands_in_the_convolutions_place(name: str, after: bool) -> None:
    """Twice: what a module keeps it gives again."""
    if not after and name == "a _conv_forward of its own":
        pytest.skip("a copy has the method of the network that it was copied from")
    plain = network().eval()
    ours = copy.deepcopy(plain)
    IN_ITS_PLACE[name](plain)
    if after:
        se_ext.convert(ours)
        IN_ITS_PLACE[name](ours)
    else:
        IN_ITS_PLACE[name](ours)
        se_ext.convert(ours)
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours(images()), plain(images()))
        assert overwritten(lambda: ours(images()))[0] == NORMS - 1
    for model in (ours, plain):
        if name == "adapter":
            assert_same(model.blocks[0].conv1.last, plain.blocks[0].conv1.last)


def test_a_weight_that_keeps_what_is_computed_with_it() -> None:
    plain, ours = pair()
    kept = Kept()
    conv = ours.blocks[0].conv1
    weight = conv.weight.detach().as_subclass(Keeper)
    del conv.weight
    conv.weight = weight  # type: ignore[assignment]
    Keeper.kept = kept
    try:
        with torch.no_grad():
            found = ours(images())
    finally:
        Keeper.kept = None
    kept.assert_unchanged()
    with torch.no_grad():
        assert_same(found, plain(images()))


def test_a_convolution_compiled_by_itself() -> None:
    """Its compiler may keep what it computed. (conv.compile() sets this attribute; with torch 2.13 it compiles nothing
    of a module of torch's own.)"""
    plain, ours = pair()
    kept = Kept()
    conv = ours.blocks[0].conv1
    conv._compiled_call_impl = lambda x: kept(conv._call_impl(x))
    with torch.no_grad():
        assert_same(ours(images()), plain(images()))
    kept.assert_unchanged()


# ---- whoever watches operators ----


class KeepingDispatch(TorchDispatchMode):
    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.convolution.default, torch.ops.se_ext.depthwise_conv.default):
            self.kept(result)
        return result


class KeepingFunction(TorchFunctionMode):
    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_convolution = function in (torch.conv2d, torch.ops.se_ext.depthwise_conv.default)
        return self.kept(result) if is_convolution else result


@pytest.mark.parametrize("mode", [KeepingDispatch, KeepingFunction])
def test_a_mode_that_keeps_what_operators_give(mode: Any) -> None:
    plain, ours = pair()
    kept = Kept()
    with torch.no_grad():
        with mode(kept):
            found = ours(images())
        assert_same(found, plain(images()))
    assert len(kept.pairs) >= NORMS + TAILS
    kept.assert_unchanged()


def test_an_input_of_a_class_of_its_own() -> None:
    plain, ours = pair()
    kept = Kept()

    class Input(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **(kwargs or {}))
            return kept(result) if function is torch.conv2d else result

    with torch.no_grad():
        assert_same(ours(images().as_subclass(Input)), plain(images()))
    kept.assert_unchanged()


def test_vmap() -> None:
    plain, ours = pair()
    x = torch.stack([images(), images() * 0.5])
    with torch.no_grad():
        expected = torch.stack([plain(t) for t in x])
        assert_same(torch.func.vmap(ours)(x), expected)
        assert overwritten(lambda: torch.func.vmap(ours)(x)) == (0, 0)


def test_tangents() -> None:
    plain, ours = pair()
    x = images()

    def tangent(model: nn.Module) -> Tensor:
        with torch.no_grad(), fwad.dual_level():
            return fwad.unpack_dual(model(fwad.make_dual(x, x.cos()))).tangent

    assert_same(tangent(ours), tangent(plain))
    assert_same(torch.func.jvp(ours, (x,), (x.cos(),))[1], tangent(plain))


def test_autocast() -> None:
    """The ops in place are not part of it: weights of another half type would be an error."""
    plain, ours = pair()
    ours.float()
    exact = plain(images())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert overwritten(lambda: ours(images(torch.float32))) == (0, 0)
        found = ours(images(torch.float32)).double()
    assert (found - exact).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("how", ["compile", "jit.trace", "fx", "export"])
def test_programs_have_no_op_that_writes(how: str) -> None:
    plain, ours = pair()
    x, calls = images(), []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(str(graph.graph))
        return graph

    with torch.no_grad():
        if how == "compile":
            program = torch.compile(ours, backend=backend, fullgraph=True)
            program(x)
        elif how == "jit.trace":
            program = torch.jit.trace(ours, x)
            calls.append(str(program.inlined_graph))
        elif how == "fx":
            program = torch.fx.symbolic_trace(ours)
            calls.append(str(program.graph))
        else:
            exported = torch.export.export(ours, (x,), strict=False)
            program = exported.module()
            calls.append(str(exported.graph))
        assert "squeeze_excite" in calls[0]
        assert "running_(" not in calls[0] and "running_.default" not in calls[0]  # noqa: PT018
        assert_same(program(x), plain(x))


# ---- features ----


def test_torchvisions_feature_extractor_of_convolutions() -> None:
    package("torchvision_shim")
    extraction = package("torchvision.models.feature_extraction")
    plain, ours = pair()
    nodes = ["stem.0", "blocks.0.conv2", "blocks.2.conv_dw"]
    with torch.no_grad():
        found, expected = (extraction.create_feature_extractor(model, nodes)(images()) for model in (ours, plain))
    for node in nodes:
        assert_same(found[node], expected[node])


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "seresnet18"])
def test_timms_features(name: str) -> None:
    package("torchvision_shim")
    timm = package("timm")
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True).eval().double()
    ours = copy.deepcopy(plain)
    se_ext.convert(ours)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert sum(overwritten(lambda: ours(x))) >= 19
        for a, b in zip(ours(x), plain(x), strict=True):
            assert_same(a, b)


# ---- what the graph says ----


class Around(nn.Module):
    """A convolution and a batch norm in front of an SE block; `read` says what else happens to the map between them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.se = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), SE(4, 2)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


def twice(self: Any, x: Tensor) -> Tensor:
    v = self.conv(x)
    return self.se(self.bn(v)) + v


def returned(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    v = self.conv(x)
    return self.se(self.bn(v)), v


def its_view(self: Any, x: Tensor) -> Tensor:
    v = self.conv(x)
    w = v.flatten(2)
    return self.se(self.bn(v)) + w.view(x.shape)


def changed_in_between(self: Any, x: Tensor) -> Tensor:
    """The activation writes into what the convolution read."""
    x = x * 1
    v = self.conv(x)
    shortcut = self.act(x)
    return self.se(self.bn(v)) + shortcut


def a_steps_output_changed_in_between(self: Any, x: Tensor) -> Tensor:
    v = self.act(self.bn(self.conv(x)))
    w = self.conv2(v)
    shortcut = v.mul_(2)
    return self.se(self.bn2(w)) + shortcut


def projected_in_between(self: Any, x: Tensor) -> Tensor:
    """As timm writes it: the projection of the shortcut is called after the last convolution."""
    v = self.conv2(self.act(self.bn(self.conv(x))))
    v = self.se(self.bn2(v))
    return v + self.act(x * 1)


GRAPHS: dict[Callable[[Any, Tensor], Any], int] = {
    twice: 0,
    returned: 0,
    its_view: 0,
    changed_in_between: 0,
    a_steps_output_changed_in_between: 1,
    projected_in_between: 2,
}


@pytest.mark.parametrize("forward", GRAPHS)
def test_who_reads_what_in_the_graph(forward: Any) -> None:
    torch.manual_seed(0)
    cls = type("Around", (Around,), {"forward": forward, "__module__": __name__})
    plain = cls(forward).double().eval()
    for bn in (plain.bn, plain.bn2):
        nn.init.uniform_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 1.5)
    ours = copy.deepcopy(plain)
    assert len(se_ext.convert(ours).converted) == 2
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        found, expected = ours(x), plain(x)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
            assert_same(a, b)
        assert sum(overwritten(lambda: ours(x))) == GRAPHS[forward]
