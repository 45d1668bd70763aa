"""What stands for an activation: names, classes, modules and functions, of torch and of the libraries that networks
come from. Each is taken for the formula that it computes, or refused."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, make_map, package
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import se_ext
from se_ext import SqueezeExcitation
from se_ext._names import ACTIVATIONS, GATES, name_of

pytestmark = pytest.mark.cpu_only  # which name it is does not depend on the device
C, M = 6, 4
TIMM = {  # all of its activations that are one of ours; a gate has hardsigmoid, an activation has not
    "GELU": "gelu",
    "HardSigmoid": "hardsigmoid",
    "HardSigmoidMe": "hardsigmoid",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
    "Sigmoid": "sigmoid",
    "Swish": "silu",
    "SwishMe": "silu",
    "Tanh": "tanh",
}
REFUSED_OF_TIMM = {"GELUTanh", "HardMish", "HardMishMe", "Mish", "MishMe", "PReLU", "QuickGELU"}
TORCH = {
    "Identity": "identity",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "GELU": "gelu",
    "Hardswish": "hardswish",
    "Hardsigmoid": "hardsigmoid",
    "LeakyReLU": "leaky_relu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Sequential": "identity",  # an empty one
}


def recognised(activation: Any, known: dict[str, type[nn.Module]]) -> str | None:
    try:
        return name_of("activation", activation, known)
    except ValueError:
        return None


def expect(activation: Any, name: str | None) -> None:
    """That it is taken for this formula as an activation and as a gate, where that is one, and refused otherwise."""
    assert recognised(activation, ACTIVATIONS) == (name if name in ACTIVATIONS else None)
    assert recognised(activation, GATES) == (name if name in GATES else None)


def timm_module(name: str) -> Any:
    package("torchvision_shim")  # timm imports torchvision
    return package(name)


def module_classes(namespace: Any) -> dict[str, type[nn.Module]]:
    classes = dict(inspect.getmembers(namespace, inspect.isclass))
    return {name: cls for name, cls in classes.items() if issubclass(cls, nn.Module)}


def default(cls: type[nn.Module], **kwargs: Any) -> nn.Module | None:
    """An instance, or None where the class wants more arguments."""
    try:
        return cls(**kwargs)
    except (TypeError, AssertionError):
        return None


# ---- classes of the libraries ----


@pytest.mark.parametrize("kwargs", [{}, {"inplace": True}], ids=["", "inplace"])
def test_each_of_timms_activations_is_its_formula_or_refused(kwargs: dict[str, bool]) -> None:
    classes = {
        **module_classes(timm_module("timm.layers.activations")),
        **module_classes(timm_module("timm.layers.activations_me")),
    }
    assert set(classes) == set(TIMM) | REFUSED_OF_TIMM
    for name, cls in classes.items():
        expect(cls(**kwargs), TIMM.get(name))
        expect(partial(cls, **kwargs), TIMM.get(name))


def test_each_name_of_timms_factory_is_its_formula_or_refused() -> None:
    """create_act_layer gives timm's classes, torch's, or the memory-efficient ones."""
    factory = timm_module("timm.layers.create_act")
    ours = {"hard_sigmoid": "hardsigmoid", "hard_swish": "hardswish", "swish": "silu"}
    refused = {"mish", "elu", "prelu", "celu", "selu", "gelu_tanh", "quick_gelu", "hard_mish"}
    for layers in (factory._ACT_LAYER_DEFAULT, factory._ACT_LAYER_ME):
        for name, cls in layers.items():
            expect(cls, None if name in refused else ours.get(name, name))


def test_each_of_torchs_modules_is_its_formula_or_refused() -> None:
    recognised_classes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # implicit dims, deprecated classes
        for name, cls in module_classes(nn).items():
            module = default(cls)
            if module is None or name in ("Transformer", "Module", "Container"):
                continue
            expect(module, TORCH.get(name))
            recognised_classes |= {name} if name in TORCH else set()
    assert recognised_classes == set(TORCH)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Hardtanh(0, 6), "relu6"),
        (lambda: nn.Hardtanh(0.0, 6.0, inplace=True), "relu6"),
        (lambda: nn.Threshold(0, 0), "relu"),
        (lambda: nn.Dropout(0.0), "identity"),
        (lambda: nn.LeakyReLU(0.2), None),
        (lambda: nn.Hardtanh(0, 1), None),
        (lambda: nn.Threshold(0.1, 0), None),
        (lambda: nn.RReLU(0.01, 0.01), None),  # random, though every slope is that of LeakyReLU
        (lambda: nn.Dropout(0.5), None),
        (lambda: nn.Dropout(1e-7), None),  # drops none of the points that are compared
        (lambda: nn.AlphaDropout(), None),
        (lambda: nn.Flatten(), None),
        (lambda: nn.Flatten(0, 1), None),
        (lambda: nn.AdaptiveAvgPool2d((17, 19)), None),  # the identity on the one grid
        (lambda: nn.AdaptiveAvgPool2d((19, 17)), None),  # … and on the other
        (lambda: nn.AvgPool2d(3, 1, 1), None),
        (lambda: nn.InstanceNorm2d(3), None),
        (lambda: nn.Softmax(1), None),
        (lambda: nn.Sequential(nn.ReLU()), None),
        (lambda: nn.PReLU(), None),
        (lambda: nn.PReLU(init=0.01), None),  # its slope is learnt
        (lambda: nn.BatchNorm2d(3, affine=False), None),
        (lambda: nn.Softplus(), None),
        (lambda: nn.GELU("tanh"), None),
    ],
)
def test_a_module_of_torch_with_arguments(make: Callable[[], nn.Module], name: str | None) -> None:
    expect(make(), name)
    expect(make, name)
    expect(make().eval(), name)


def library_class(forward: Callable[[nn.Module, Tensor], Tensor], library: str = "timm") -> type[nn.Module]:
    """A class as if it came from a module of this library."""
    return type("Activation", (nn.Module,), {"forward": forward, "__module__": f"{library}.layers"})


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda self, x: x * torch.sigmoid(x), "silu"),
        (lambda self, x: F.relu6(x + 3) / 6, "hardsigmoid"),
        (lambda self, x: (0.2 * x + 0.5).clamp(0, 1), None),  # PaddleClas, Keras
        (lambda self, x: x.maximum(torch.zeros(())), None),  # its slope at 0 is 1/2; ReLU's is 0
        (lambda self, x: F.gelu(x, approximate="tanh"), None),
        (lambda self, x: StraightThrough.apply(x), None),
        (lambda self, x: x.relu().detach(), None),
        (lambda self, x: x + (x.relu() - x).detach(), None),
        (lambda self, x: x.relu() if self.training else x.sigmoid(), None),
        (lambda self, x: x.sigmoid() if self.training else x.relu(), None),
        (lambda self, x: x.relu() + 1e-6, None),
        (lambda self, x: x.relu().clamp(max=1e6), None),
        (lambda self, x: x.relu().float(), None),
        (lambda self, x: x.relu()[:1], None),
        (lambda self, x: x.relu().mean((2, 3), keepdim=True), None),
        (lambda self, x: (x.relu(), x), None),
        (lambda self, x: x.relu() + 0 * torch.rand(1), None),
    ],
)
def test_a_class_of_a_library_is_what_it_computes(forward: Callable[..., Any], name: str | None) -> None:
    expect(library_class(forward), name)
    expect(library_class(forward, "somebody"), None)  # whatever it computes


def test_a_library_class_with_state_is_refused() -> None:
    class Base(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    for kind in ("parameter", "buffer", "child"):
        module = type("Activation", (Base,), {"__module__": "timm.layers"})()
        assert recognised(module, ACTIVATIONS) == "relu"
        if kind == "parameter":
            module.slope = nn.Parameter(torch.zeros(1))
        elif kind == "buffer":
            module.register_buffer("slope", torch.zeros(1))
        else:
            module.inner = nn.ReLU()
        assert recognised(module, ACTIVATIONS) is None, kind


def test_a_modules_own_forward_is_not_its_classs() -> None:
    module = nn.ReLU()
    module.forward = lambda x: x.sigmoid()  # type: ignore[method-assign]
    expect(module, None)


def test_what_recognition_leaves_as_it_was() -> None:
    """The mode, the random numbers and the gradients of the module's surroundings."""
    activations = timm_module("timm.layers.activations")
    for train in (True, False):
        module = activations.Sigmoid().train(train)
        dropout = nn.Dropout().train(train)
        state = torch.random.get_rng_state()
        expect(module, "sigmoid")
        expect(dropout, None)
        assert (module.training, dropout.training) == (train, train)
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, FakeTensorMode, partial(torch.device, "meta")],
    ids=["no_grad", "inference_mode", "fake", "meta"],
)
def test_a_model_may_be_built_in_any_mode(context: Callable[[], Any]) -> None:
    activations = timm_module("timm.layers.activations")
    with context():
        expect(activations.Sigmoid(), "sigmoid")
        expect(activations.Swish(inplace=True), "silu")
        expect(activations.Mish(), None)


# ---- the module ----


def test_the_arguments_of_timms_blocks() -> None:
    """A block of timm's, with its activation and gate as they stand there, is replaced between two convolutions; the
    network computes and learns the same."""
    squeeze_excite = timm_module("timm.models._efficientnet_blocks").SqueezeExcite
    layers = timm_module("timm.layers")
    for act, gate in ((nn.SiLU, layers.Sigmoid), (layers.HardSwish, "hard_sigmoid"), (layers.GELU, layers.HardSigmoid)):
        block = squeeze_excite(C, rd_channels=M, act_layer=act, gate_layer=gate)
        theirs = nn.Sequential(nn.Conv2d(3, C, 3), block, nn.Conv2d(C, 2, 1)).double()
        ours = copy.deepcopy(theirs)
        ours[1] = SqueezeExcitation(C, M, block.act1, block.gate).double()
        ours[1].load_state_dict(block.state_dict())
        ours = copy.deepcopy(ours)
        x = make_map((2, 3, 7, 6), torch.float64)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        expected = theirs(x)
        expected.square().sum().backward()
        for network in (ours, compiled):
            ours.zero_grad()
            y = network(x)
            assert_close(y.detach(), expected.detach(), torch.float64, summed=100)
            y.square().sum().backward()
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                # 1e-7: the slope of ATen's hardsigmoid is 1/6 in float32.
                assert (p.grad - q.grad).abs().max() <= 1e-7 * q.grad.abs().max()


# ---- functions ----


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "relu"),
        (torch.relu_, "relu"),
        (torch.tanh, "tanh"),
        (torch.sigmoid, "sigmoid"),
        (torch.Tensor.relu, "relu"),
        (torch.Tensor.sigmoid_, "sigmoid"),
        (F.relu, "relu"),
        (F.relu6, "relu6"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (F.hardswish, "hardswish"),
        (F.hardsigmoid, "hardsigmoid"),
        (F.leaky_relu, "leaky_relu"),
        (F.tanh, "tanh"),
        (F.sigmoid, "sigmoid"),
        (torch.exp, None),
        (F.mish, None),
        (F.softmax, None),
        (abs, None),
        (lambda x: x.relu(), None),
        (lambda: "relu", None),
        (lambda: None, None),
        (partial(F.leaky_relu, negative_slope=0.2), None),
        (nn.Threshold, None),  # a class that wants arguments
        (nn.Module, None),
        (5, None),
        ([nn.ReLU], None),  # not hashable
    ],
)
def test_functions(function: Any, name: str | None) -> None:
    expect(function, name)
    if name is not None:
        points = torch.linspace(-8, 8, 401)
        cls = (ACTIVATIONS | GATES)[name]
        assert torch.equal(function(points.clone()), cls()(points))


def test_functions_as_arguments() -> None:
    x, residual = make_map((2, C, 4, 3)), make_map((2, C, 4, 3))
    se = SqueezeExcitation(C, M, F.silu, torch.sigmoid, post_activation=torch.relu)
    assert (se.activation, se.scale_activation, se.post_activation) == ("silu", "sigmoid", "relu")
    wide = copy.deepcopy(se).double()
    gate = wide.fc2(F.silu(wide.fc1(x.double().mean((2, 3), keepdim=True)))).sigmoid()
    expected = (gate * x.double() + residual.double()).relu()
    assert_close(se(x, residual).detach(), expected.detach(), torch.float32, summed=12 + C)
    tail = se_ext.BatchNormSqueezeExcitation(C, M, F.silu, F.hardsigmoid, pre_activation=F.silu, post_activation=F.relu)
    assert (tail.pre_activation, tail.post_activation) == ("silu", "relu")
    assert (tail.se.activation, tail.se.scale_activation) == ("silu", "hardsigmoid")


# ---- messages ----


def message(activation: Any, argument: str = "activation") -> str:
    with pytest.raises(ValueError, match=f"^expected {argument} ") as caught:
        SqueezeExcitation(C, M, **{argument: activation})
    return str(caught.value)


def test_a_message_names_the_class_in_full_and_says_what_to_do() -> None:
    class Swish(nn.Module):
        pass

    activations = timm_module("timm.layers.activations")
    known = "Identity, ReLU, ReLU6, SiLU, GELU, Hardswish, LeakyReLU, Tanh, Sigmoid"
    assert message(activations.Mish) == (
        f"expected activation to be one of {known}, or to compute the same, got timm.layers.activations.Mish"
    )
    text = message(Swish)
    assert text.startswith(f"expected activation to be one of {known}, or a class of torch, torchvision, timm, monai, ")
    assert text.endswith(
        f"got {__name__}.{Swish.__qualname__}; if that computes one of them, pass its name, e.g. activation='silu'"
    )
    assert message(Swish, "scale_activation").endswith("pass its name, e.g. scale_activation='sigmoid'")
    assert message(F.hardsigmoid) == f"expected activation to be one of {known}, got the function hardsigmoid"
    assert message(torch.exp) == (
        f"expected activation to be one of {known}, a function of torch or torch.nn.functional that computes one of "
        f"them, a module, or a callable that makes a module when called without arguments, got {torch.exp!r}"
    )


def hook(*args: Any) -> None: ...


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_module_with_hooks_is_refused(kind: str) -> None:
    module = nn.ReLU()
    handle = getattr(module, f"register_{kind}")(hook)
    assert message(module) == (
        "expected activation without hooks, which would not run, got a torch.nn.modules.activation.ReLU with hooks"
    )
    handle.remove()
    assert SqueezeExcitation(C, M, module).activation == "relu"


def test_the_error_of_a_factory_is_the_cause() -> None:
    with pytest.raises(ValueError, match="callable that makes a module") as caught:
        SqueezeExcitation(C, M, partial(nn.LeakyReLU, slope=0.1))
    assert "unexpected keyword argument 'slope'" in str(caught.value.__cause__)


def test_importing_loads_no_other_library() -> None:
    code = "import sys, se_ext; print(sorted({'timm', 'torchvision', 'monai', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
