"""SqueezeExcitation as a module: checkpoints of timm and torchvision, initialisation, in place, copies, training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ACTIVATIONS, GATES, assert_close, make_map, package
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from se_ext import BatchNormSqueezeExcitation, SqueezeExcitation, reference
from se_ext._names import ACTIVATIONS as ACTIVATION_MODULES
from se_ext._names import GATES as GATE_MODULES

C, M = 16, 8
KEYS = {"fc1.weight": (M, C, 1, 1), "fc1.bias": (M,), "fc2.weight": (C, M, 1, 1), "fc2.bias": (C,)}


class Reference(nn.Module):
    """The same block, in plain torch."""

    def __init__(self, se: SqueezeExcitation) -> None:
        super().__init__()
        self.fc1, self.fc2 = copy.deepcopy(se.fc1), copy.deepcopy(se.fc2)
        self.names = (se.activation, se.scale_activation)
        self.post = se.post_activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        w = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return reference.squeeze_excite(x, *w, *self.names, residual, self.post)


def formula(se: SqueezeExcitation, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The module's output in float64."""
    return Reference(se).double()(x.detach().double(), None if residual is None else residual.double()).detach()


# ---- state_dict, and other libraries' checkpoints ----


def test_state_dict() -> None:
    assert {k: tuple(v.shape) for k, v in SqueezeExcitation(C, M).state_dict().items()} == KEYS
    without = SqueezeExcitation(C, M, bias=False).state_dict()
    assert {k: tuple(v.shape) for k, v in without.items()} == {k: v for k, v in KEYS.items() if "weight" in k}


def torchvision() -> Any:
    return package("torchvision_shim").torchvision


def timm_module(**kwargs: Any) -> nn.Module:
    torchvision()  # timm imports it
    return package("timm.layers").SEModule(C, rd_channels=M, **kwargs)


THEIRS = {
    "torchvision": lambda: (torchvision().ops.SqueezeExcitation(C, M), {}),
    "torchvision mobilenet": lambda: (
        torchvision().ops.SqueezeExcitation(C, M, scale_activation=nn.Hardsigmoid),
        {"scale_activation": nn.Hardsigmoid},
    ),
    "torchvision efficientnet": lambda: (
        torchvision().ops.SqueezeExcitation(C, M, activation=partial(nn.SiLU, inplace=True)),
        {"activation": partial(nn.SiLU, inplace=True)},
    ),
    "timm": lambda: (timm_module(), {}),
    "timm no bias": lambda: (timm_module(bias=False), {"bias": False}),
    "timm silu hardsigmoid": lambda: (
        timm_module(act_layer=nn.SiLU, gate_layer="hard_sigmoid"),
        {"activation": nn.SiLU, "scale_activation": nn.Hardsigmoid},
    ),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("library", THEIRS)
def test_their_checkpoint_gives_their_outputs_and_gradients(library: str, channels_last: bool) -> None:
    theirs, kwargs = THEIRS[library]()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / 2)
    checkpoint = io.BytesIO()
    torch.save(theirs.state_dict(), checkpoint)
    checkpoint.seek(0)
    ours = SqueezeExcitation(C, M, **kwargs)
    ours.load_state_dict(torch.load(checkpoint), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())

    x = make_map((4, C, 7, 6), channels_last=channels_last)
    grad = torch.randn_like(x)
    exact = copy.deepcopy(theirs).double()
    x64 = x.double().requires_grad_()
    x.requires_grad_()
    y, y64 = ours(x), exact(x64)
    y.backward(grad)
    y64.backward(grad.double())
    assert_close(y.detach(), y64.detach(), torch.float32, summed=42)
    assert_close(x.grad, x64.grad, torch.float32, summed=4 * 42)
    for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        assert_close(p.grad, q.grad, torch.float32, summed=4 * 4 * 42)

    theirs.load_state_dict(ours.state_dict(), strict=True)  # and back


def test_initialisation_is_torchvisions() -> None:
    torch.manual_seed(7)
    theirs = torchvision().ops.SqueezeExcitation(C, M)
    torch.manual_seed(7)
    ours = SqueezeExcitation(C, M)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_swapped_block_leaves_a_real_networks_output(restore_threads: None) -> None:
    torch.set_num_threads(1)  # a hundred small layers: on a busy machine their threads wait for one another
    torch.manual_seed(3)
    net = torchvision().models.mobilenet_v3_small().double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = net(x)
    swapped = 0
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torchvision().ops.SqueezeExcitation):
                args = (child.fc1.in_channels, child.fc1.out_channels)
                ours = SqueezeExcitation(*args, type(child.activation), type(child.scale_activation)).double()
                ours.load_state_dict(child.state_dict())
                setattr(parent, name, ours)
                swapped += 1
    assert swapped == 9
    assert_close(net(x).detach(), expected.detach(), torch.float64, summed=10_000)
    assert not torch.equal(net(x), net(x.flip(0)))


# ---- arguments ----


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_in_any_form(name: str) -> None:
    cls = ACTIVATION_MODULES[name]
    forms = [name, cls, cls(), partial(cls), lambda: cls()]
    if name == "identity":
        forms.append(None)
    if name in ("relu", "silu", "hardswish"):
        forms.append(partial(cls, inplace=True))
    x, residual = make_map((2, C, 4, 3)), make_map((2, C, 4, 3))
    torch.manual_seed(0)
    w = SqueezeExcitation(C, M)
    exact = nn.Module.__call__
    for form in forms:
        se = SqueezeExcitation(C, M, form, post_activation=form)
        se.load_state_dict(w.state_dict())
        assert (se.activation, se.post_activation) == (name, name)
        plain = ACTIVATION_MODULES[name]()
        s = w.double().fc2(exact(plain, w.fc1(x.double().mean((2, 3), keepdim=True)))).sigmoid()
        expected = exact(plain, s * x.double() + residual.double())
        w.float()
        assert_close(se(x, residual).detach(), expected.detach(), torch.float32, summed=12 + C)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_in_any_form(name: str) -> None:
    cls = GATE_MODULES[name]
    x = make_map((2, C, 4, 3))
    for form in (name, cls, cls(), partial(cls)):
        se = SqueezeExcitation(C, M, scale_activation=form)
        assert se.scale_activation == name
        wide = copy.deepcopy(se).double()
        s = cls()(wide.fc2(wide.fc1(x.double().mean((2, 3), keepdim=True)).relu()))
        assert_close(se(x).detach(), (s * x.double()).detach(), torch.float32, summed=12 + C)


def test_arguments_after_the_gate_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        SqueezeExcitation(C, M, nn.ReLU, nn.Sigmoid, False)  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(2, C, 9), (2, C, 5, 4), (2, C, 2, 3, 4)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("residual", [False, True])
def test_maps_of_one_to_three_spatial_dims(shape: tuple[int, ...], residual: bool) -> None:
    se = SqueezeExcitation(C, M, post_activation=nn.ReLU)
    x, r = make_map(shape), make_map(shape) if residual else None
    assert_close(se(x, r).detach(), formula(se, x, r), torch.float32, summed=24 + C)


class Integer:
    def __index__(self) -> int:
        return C


@pytest.mark.parametrize("cls", [SqueezeExcitation, BatchNormSqueezeExcitation])
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("squeeze_channels", C // 32, ValueError, "expected squeeze_channels to be at least 1, got 0"),
        ("squeeze_channels", -1, ValueError, "expected squeeze_channels to be at least 1, got -1"),
        ("squeeze_channels", C / 8, TypeError, "expected squeeze_channels to be an integer, got 2.0 (float)"),
        ("squeeze_channels", None, TypeError, "expected squeeze_channels to be an integer, got None (NoneType)"),
        ("input_channels", 0, ValueError, "expected input_channels to be at least 1, got 0"),
        ("input_channels", 16.0, TypeError, "expected input_channels to be an integer, got 16.0 (float)"),
        ("input_channels", "16", TypeError, "expected input_channels to be an integer, got '16' (str)"),
    ],
)
def test_a_number_of_channels_that_makes_no_block(
    cls: Any, argument: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        cls(**{"input_channels": C, "squeeze_channels": M, argument: value})
    assert str(caught.value) == message


def test_a_number_of_channels_may_be_any_integer() -> None:
    x = make_map((2, C, 3, 3))
    for number in (Integer(), torch.tensor(C), np.int64(C), np.uint8(C)):
        for cls in (SqueezeExcitation, BatchNormSqueezeExcitation):
            torch.manual_seed(1)
            module = cls(number, number)
            torch.manual_seed(1)
            assert torch.equal(module(x), cls(C, C)(x))
        assert type(SqueezeExcitation(number, M).fc1.in_channels) is int


# ---- unbatched maps ----


def like_torchvisions(**kwargs: Any) -> tuple[nn.Module, SqueezeExcitation]:
    """Theirs and ours, with the same weights, in float64."""
    theirs, se = torchvision().ops.SqueezeExcitation(C, M).double(), SqueezeExcitation(C, M, **kwargs).double()
    se.load_state_dict(theirs.state_dict())
    return theirs, se


def compiled(module: nn.Module, dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()  # the limit of recompilations is one for all modules of a class
    return torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)


# The form in which a module is called: as it is, compiled, as TorchScript.
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda module: module,
    "compile": compiled,
    "compile, dynamic": lambda module: compiled(module, dynamic=True),
    "script": torch.jit.script,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dims", [None, 2])
def test_an_image_without_a_batch_is_torchvisions(dims: int | None, form: str) -> None:
    theirs, se = like_torchvisions(dims=dims)
    call = FORMS[form](se)
    sizes = [(5, 7), (7, 5), (C + 1, C)] + ([(C, 5), (C, C)] if dims else [])
    for size in sizes:
        x, x64 = (t.requires_grad_() for t in [make_map((C, *size), torch.float64)] for t in (t, t.clone()))
        y, expected = call(x), theirs(x64)
        assert_close(y.detach(), expected.detach(), torch.float64, summed=size[0] * size[1] + C)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert_close(x.grad, x64.grad, torch.float64, summed=1000)
        batch = make_map((3, C, *size), torch.float64)
        assert_close(call(batch).detach(), theirs(batch).detach(), torch.float64, summed=size[0] * size[1] + C)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_map_of_a_given_number_of_spatial_dims(dims: int, form: str) -> None:
    """Is the batch's with that one map, residual and activation included; sizes equal to C do not matter."""
    se = SqueezeExcitation(C, M, post_activation=nn.ReLU, dims=dims)
    call = FORMS[form](se)
    for size in ((5, 3, 4), (C, C, C)):
        batch, residual = make_map((2, C, *size[:dims])), make_map((2, C, *size[:dims]))
        together = formula(se, batch, residual)
        assert_close(call(batch, residual).detach(), together, torch.float32, summed=C**dims + C)
        for i in range(2):
            assert_close(call(batch[i], residual[i]).detach(), together[i], torch.float32, summed=C**dims + C)


def test_three_dims_are_a_batch_or_an_image() -> None:
    theirs, se = like_torchvisions()
    signal, image = make_map((4, C, 9), torch.float64), make_map((C, 4, 9), torch.float64)
    assert_close(se(signal).detach(), formula(se, signal), torch.float64, summed=9 + C)
    assert_close(se(image).detach(), theirs(image).detach(), torch.float64, summed=36 + C)
    message = (
        f"SqueezeExcitation: expected an input that is either a batch [N, C, L] or one image [C, H, W], got [{C}, {C}, "
        f"9], which with C = {C} is both; pass dims=1 or dims=2 to the module"
    )
    both = make_map((C, C, 9), torch.float64)
    with pytest.raises(ValueError, match="either a batch") as caught:
        se(both)
    assert str(caught.value) == message
    with pytest.raises(torch.jit.Error, match="either a batch"):
        torch.jit.script(se)(both)
    with pytest.raises(RuntimeError, match=r"squeeze_excite: expected w1 of shape"):
        se(make_map((4, 5, 9), torch.float64))
    results = []
    for dims in (1, 2):
        module = SqueezeExcitation(C, M, dims=dims).double()
        module.load_state_dict(se.state_dict())
        results.append(module(both).detach())
    assert_close(results[0], formula(se, both), torch.float64, summed=9 + C)
    assert_close(results[1], theirs(both).detach(), torch.float64, summed=9 * C)
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_an_input_of_another_number_of_dims() -> None:
    for dims, shape in ((1, (2, C, 4, 3)), (2, (2, 2, C, 4, 3)), (3, (2, C, 4)), (2, (C, 4))):
        with pytest.raises(ValueError, match=r"^SqueezeExcitation: expected input of shape") as caught:
            SqueezeExcitation(C, M, dims=dims)(make_map(shape))
        assert str(caught.value) == (
            "SqueezeExcitation: expected input of shape [N, C, *spatial] or [C, *spatial] with "
            f"{dims} spatial dims (the module's dims), got {list(shape)}"
        )
    for bad, error in ((0, ValueError), (4, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=r"^expected dims to be "):
            SqueezeExcitation(C, M, dims=bad)  # type: ignore[arg-type]
    assert "dims=2" in repr(SqueezeExcitation(C, M, dims=2))
    assert "dims" not in repr(SqueezeExcitation(C, M))


@pytest.mark.parametrize("channels_last", [False, True], ids=["chw", "hwc"])
def test_an_unbatched_map_in_place(channels_last: bool) -> None:
    se = SqueezeExcitation(C, M, inplace=True)
    x = make_map((1, C, 5, 4), channels_last=channels_last)[0]
    exact = formula(se, x[None])[0]
    with torch.no_grad():
        y = se(x)
    assert y is x
    assert_close(x, exact, torch.float32, summed=20 + C)
    before = x.clone()
    assert se(x).data_ptr() != x.data_ptr()  # grad mode
    assert torch.equal(x, before)


def test_an_unbatched_map_keeps_its_strides() -> None:
    x = make_map((1, C, 5, 4), channels_last=True)[0]
    assert SqueezeExcitation(C, M)(x).stride() == x.stride()


@pytest.mark.parametrize("dims", [None, 2])
def test_unbatched_under_vmap(dims: int | None) -> None:
    theirs, se = like_torchvisions(dims=dims)
    x = make_map((3, C, 5, 4), torch.float64)
    y = torch.func.vmap(se)(x)
    assert_close(y.detach(), torch.func.vmap(theirs)(x).detach(), torch.float64, summed=20 + C)
    ours, exact = (
        torch.func.vmap(torch.func.grad(lambda t, m=module: m(t).square().sum()))(x) for module in (se, theirs)
    )
    assert_close(ours.detach(), exact.detach(), torch.float64, summed=1000)


def test_unbatched_between_convolutions() -> None:
    """torch's convolutions take one image as well; the network gives what it gives for the batch, compiled and copied
    too."""
    network = nn.Sequential(nn.Conv2d(3, C, 3), SqueezeExcitation(C, M), nn.Conv2d(C, 2, 3)).double()
    shapes: list[tuple[int, ...]] = []
    network[1].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    images = make_map((2, 3, 8, 9), torch.float64)
    expected = network(images).detach()
    for call in (network, copy.deepcopy(network), FORMS["compile"](network)):
        shapes.clear()
        assert_close(call(images[0]).detach(), expected[0], torch.float64, summed=1000)
        assert shapes == [(C, 6, 7)]  # the hook runs once, and sees the image


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dims", [None, 1])
def test_an_exported_signals_batch_may_be_of_any_size(dims: int | None, strict: bool) -> None:
    """Also of C samples, though with C = N the module itself asks for dims."""
    se = SqueezeExcitation(C, M, dims=dims)
    sizes = {"input": {0: torch.export.Dim("n", min=1), 2: torch.export.Dim("l", min=1)}}
    exported = torch.export.export(se, (make_map((4, C, 9)),), dynamic_shapes=sizes, strict=strict).module()
    for n in (1, C, C + 3):
        x = make_map((n, C, 12))
        assert_close(exported(x).detach(), formula(se, x), torch.float32, summed=12 + C)


def test_an_exported_image_stays_one() -> None:
    theirs, se = like_torchvisions()
    exported = torch.export.export(se, (make_map((C, 5, 7), torch.float64),)).module()
    x = make_map((C, 5, 7), torch.float64)
    assert_close(exported(x).detach(), theirs(x).detach(), torch.float64, summed=35 + C)


def test_a_module_pickled_before_it_had_dims() -> None:
    """As it was then: without the attributes that came later. It loads, runs, compiles and scripts."""
    se = SqueezeExcitation(C, M)
    expected = SqueezeExcitation(C, M)
    expected.load_state_dict(se.state_dict())
    for attribute in ("dims", "input_channels"):
        del se.__dict__[attribute]
    old = pickle.loads(pickle.dumps(se))
    for x in (make_map((2, C, 5, 4)), make_map((C, 5, 4)), make_map((2, C, 4))):
        for form in FORMS.values():
            assert torch.equal(form(old)(x), expected(x))
    assert repr(old) == repr(expected)


# ---- in place ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_writes_into_the_input_where_nothing_is_recorded(mode: Any) -> None:
    se = SqueezeExcitation(C, M, post_activation=nn.ReLU, inplace=True)
    x, r = make_map((2, C, 5, 4)), make_map((2, C, 5, 4))
    exact = formula(se, x, r)
    with mode():
        y = se(x, r)
    assert y is x
    assert_close(x, exact, torch.float32, summed=20 + C)


def test_in_place_makes_a_new_tensor_under_grad_mode() -> None:
    se = SqueezeExcitation(C, M, inplace=True)
    x = make_map((2, C, 5, 4), requires_grad=True)
    before = x.detach().clone()
    y = se(x)
    y.sum().backward()
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)
    assert x.grad is not None
    frozen = SqueezeExcitation(C, M, inplace=True).requires_grad_(False)
    frozen(before)
    assert torch.equal(x, before)  # grad mode decides, not what happens to require grad


def test_without_inplace_the_input_stays() -> None:
    se, x = SqueezeExcitation(C, M), make_map((2, C, 5, 4))
    before = x.clone()
    with torch.no_grad():
        assert se(x).data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


# ---- copies and conversions ----


def full() -> SqueezeExcitation:
    return SqueezeExcitation(C, M, nn.SiLU, nn.Hardsigmoid, bias=False, post_activation=nn.ReLU, inplace=True)


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(_saved(m), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_computes_the_same_apart(clone: Any) -> None:
    se = full()
    twin = clone(se)
    assert repr(twin) == repr(se)
    x, r = make_map((2, C, 5, 4)), make_map((2, C, 5, 4))
    assert torch.equal(twin(x, r), se(x, r))
    with torch.no_grad():
        twin.fc1.weight.add_(1)
    assert not torch.equal(twin(x, r), se(x, r))


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_repr() -> None:
    layers = (
        f"(fc1): Conv2d({C}, {M}, kernel_size=(1, 1), stride=(1, 1){{0}})",
        f"(fc2): Conv2d({M}, {C}, kernel_size=(1, 1), stride=(1, 1){{0}})",
    )
    expected = "SqueezeExcitation(\n  activation=relu, scale_activation=sigmoid\n  {}\n  {}\n)"
    assert repr(SqueezeExcitation(C, M)) == expected.format(*(line.format("") for line in layers))
    assert repr(full()) == (
        "SqueezeExcitation(\n  activation=silu, scale_activation=hardsigmoid, post_activation=relu, inplace=True\n"
        "  {}\n  {}\n)"
    ).format(*(line.format(", bias=False") for line in layers))


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
    ],
    ids=["bfloat16", "half", "double"],
)
def test_conversion_to_another_dtype(convert: Any, dtype: torch.dtype) -> None:
    se = convert(SqueezeExcitation(C, M, post_activation=nn.ReLU))
    x, r = make_map((2, C, 5, 4), dtype), make_map((2, C, 5, 4), dtype)
    y = se(x, r)
    assert y.dtype is dtype
    assert_close(y.detach(), formula(se, x, r), dtype, summed=20 + C)
    y.sum().backward()
    assert all(p.grad.dtype is dtype for p in se.parameters())


def test_float32_weights_beside_a_half_typed_map() -> None:
    se = SqueezeExcitation(C, M)
    x = make_map((2, C, 5, 4), torch.bfloat16)
    y = se(x)
    assert y.dtype is torch.bfloat16
    assert_close(y.detach(), formula(se, x), torch.bfloat16, summed=20 + C)
    y.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in se.parameters())


def test_a_model_converted_to_channels_last_stays_channels_last() -> None:
    """`.to(memory_format=…)` also restrides the 1×1 weights."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), SqueezeExcitation(C, M), nn.Conv2d(C, 4, 3)).double()
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    expected = model(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)
    between: list[Tensor] = []
    model[1].register_forward_hook(lambda *a: between.append(a[2]))
    y = model(x.contiguous(memory_format=torch.channels_last))
    y.square().sum().backward()
    assert between[0].is_contiguous(memory_format=torch.channels_last)
    assert not between[0].is_contiguous()
    assert_close(y.detach(), expected.detach(), torch.float64, summed=1000)
    for p, g in zip(model.parameters(), grads, strict=True):
        assert_close(p.grad, g, torch.float64, summed=1000)


# ---- weights that are not plain parameters ----


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def test_computed_weights() -> None:
    """parametrize and pruning compute a layer's weight from others; it is used as it comes out. (Pruning does so in a
    hook, so that layer is called: see test_fusion.py.)"""
    plain = SqueezeExcitation(C, M).eval()
    computed = copy.deepcopy(plain)
    mask = torch.ones_like(plain.fc2.weight)
    mask[0] = 0
    with torch.no_grad():
        plain.fc1.weight.mul_(0.5)
        plain.fc2.weight.mul_(mask)
    parametrize.register_parametrization(computed.fc1, "weight", Half())
    prune.custom_from_mask(computed.fc2, "weight", mask)
    x = torch.randn(2, C, 3, 3)
    assert torch.allclose(computed(x), plain(x), rtol=1e-5, atol=1e-6)


def test_symbolic_trace() -> None:
    """torch.fx sees one call of the op, on the module's parameters."""
    module = SqueezeExcitation(C, M).eval()
    traced = torch.fx.symbolic_trace(module)
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 1
    assert {node.target for node in traced.graph.nodes if node.op == "get_attr"} == {
        n for n, _ in module.named_parameters()
    }
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(traced(x), module(x))


# ---- training ----


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("post", [None, nn.ReLU, nn.SiLU])
def test_training_follows_the_reference(post: Any, optimizer: Any) -> None:
    """Five steps in float64, with momentum: both end at the same weights."""
    torch.manual_seed(4)
    ours = SqueezeExcitation(C, M, nn.SiLU, post_activation=post).double()
    theirs = Reference(ours)
    start = [p.detach().clone() for p in ours.parameters()]
    kwargs = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steppers = [optimizer(m.parameters(), lr=0.05, **kwargs) for m in (ours, theirs)]
    for step in range(5):
        torch.manual_seed(step)
        x, r, target = (make_map((4, C, 5, 3), torch.float64, channels_last=step % 2 == 0) for _ in range(3))
        losses = []
        for module, stepper in zip((ours, theirs), steppers, strict=True):
            stepper.zero_grad()
            loss = (module(x, r) - target).square().sum() / 50
            loss.backward()
            stepper.step()
            losses.append(loss.detach())
        assert torch.allclose(losses[0], losses[1], rtol=1e-11, atol=0)
    for p, q, s in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert (p - s).abs().max() > 1e-3  # it did train
        # Adam divides by the gradients' size, so a small gradient's rounding counts in full: a factor on the table.
        assert_close(p.detach(), q.detach(), torch.float64, summed=1_000_000)
