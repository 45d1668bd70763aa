"""TorchScript: script, trace, freeze, save; and load in a process that knows the library only as libse_ext.so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from helpers import assert_close, emulated_cuda, make_map, make_weights
from torch import Tensor, nn

import se_ext
from se_ext import SqueezeExcitation, _loader

# TorchScript reads annotations of the scripted functions, so they say Optional[Tensor].
# ruff: noqa: UP045
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

C, M = 16, 4
OP = "se_ext::squeeze_excite"

# Runs what the parent saved, with no Python package of ours: only torch and the shared object.
FRESH_PROCESS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
module = torch.jit.load(sys.argv[2])
x, r = torch.load(sys.argv[3])
with torch.set_grad_enabled(sys.argv[5] == "grad"):
    y = module(x) if r is None else module(x, r)
    grads = []
    if sys.argv[5] == "grad":
        x.requires_grad_()
        y = module(x) if r is None else module(x, r)
        y.square().sum().backward()
        grads = [x.grad] + [p.grad for p in module.parameters()]
torch.save([y.detach(), x.detach(), *grads], sys.argv[4])
assert not any(name.split(".")[0] == "se_ext" for name in sys.modules)
"""


def run_in_a_fresh_process(path: Path, args: tuple[Tensor, Tensor | None], grad: bool = False) -> list[Tensor]:
    if emulated_cuda():
        pytest.skip("a fresh process has the CPU kernels")
    given, result = path.with_suffix(".in"), path.with_suffix(".out")
    torch.save(args, given)
    command = [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, _loader.LIBRARY, path, given, result]
    done = subprocess.run(
        [*map(str, command), "grad" if grad else "no grad"],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(result)


MODULES: dict[str, tuple[Any, bool]] = {
    "plain": (lambda: SqueezeExcitation(C, M), False),
    "no bias": (lambda: SqueezeExcitation(C, M, nn.SiLU, nn.Hardsigmoid, bias=False), False),
    "residual": (lambda: SqueezeExcitation(C, M), True),
    "post": (lambda: SqueezeExcitation(C, M, post_activation=nn.ReLU), True),
    "post alone": (lambda: SqueezeExcitation(C, M, post_activation=nn.Tanh), False),
}


def inputs(residual: bool, channels_last: bool = True) -> tuple[Tensor, ...]:
    x = make_map((3, C, 5, 4), channels_last=channels_last)
    return (x, make_map((3, C, 5, 4), channels_last=channels_last)) if residual else (x,)


def gradients(module: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    x = args[0].detach().clone().requires_grad_()
    module.zero_grad()
    module(x, *args[1:]).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("name", MODULES)
def test_a_scripted_module_gives_the_same_bits(name: str) -> None:
    make, residual = MODULES[name]
    module = make()
    scripted = torch.jit.script(module)
    for channels_last in (False, True):
        args = inputs(residual, channels_last)
        y, eager = scripted(*args), module(*args)
        assert torch.equal(y, eager)
        assert y.stride() == eager.stride()
        ours = gradients(scripted, args)
        assert all(torch.equal(a, b) for a, b in zip(ours, gradients(module, args), strict=True))
    assert str(scripted.inlined_graph).count(f"{OP}(") == 1


def test_a_scripted_module_takes_its_residual_or_none() -> None:
    module = SqueezeExcitation(C, M, post_activation=nn.ReLU)
    scripted = torch.jit.script(module)
    x, r = inputs(True)
    for args in ((x,), (x, None), (x, r)):
        assert torch.equal(scripted(*args), module(*args))
    assert not torch.equal(scripted(x), scripted(x, r))


def test_a_scripted_in_place_module_follows_grad_mode() -> None:
    scripted = torch.jit.script(SqueezeExcitation(C, M, inplace=True))
    (x,) = inputs(False)
    before = x.clone()
    y = scripted(x)
    assert torch.equal(x, before)
    assert y.requires_grad
    with torch.no_grad():
        z = scripted(x)
    assert z.data_ptr() == x.data_ptr()
    assert torch.equal(x, y)


def functional_api(
    x: Tensor, w1: Tensor, b1: Optional[Tensor], w2: Tensor, b2: Optional[Tensor], residual: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = se_ext.squeeze(x)
    s = se_ext.excite(z, w1, b1, w2, b2, activation="silu", gate="hardsigmoid")
    y = se_ext.rescale(x, s, residual, post_activation="relu")
    return z, s, y, se_ext.squeeze_excite(x, w1, b1, w2, b2, "silu", "hardsigmoid", residual, "relu")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_functional_api_scripts(bias: bool, residual: bool) -> None:
    args = [make_map((2, C, 5, 4)), *make_weights(C, M, bias=bias), make_map((2, C, 5, 4)) if residual else None]
    scripted = torch.jit.script(functional_api)(*args)
    assert all(torch.equal(a, b) for a, b in zip(scripted, functional_api(*args), strict=True))
    assert torch.equal(scripted[2], scripted[3])


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["no bias", "post"])
def test_a_saved_module_runs_where_only_the_library_is_loaded(name: str, grad: bool, tmp_path: Path) -> None:
    make, residual = MODULES[name]
    module, args = make(), inputs(residual)
    expected = gradients(module, args) if grad else []
    module.zero_grad()
    torch.jit.script(module).save(tmp_path / "module.pt")
    y, x, *grads = run_in_a_fresh_process(tmp_path / "module.pt", (args[0], args[1] if residual else None), grad)
    assert torch.equal(y, module(*args))
    assert torch.equal(x, args[0])
    assert len(grads) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_a_saved_in_place_module_writes_into_its_input_there(tmp_path: Path) -> None:
    module = SqueezeExcitation(C, M, inplace=True)
    (x,) = inputs(False)
    torch.jit.script(module).save(tmp_path / "module.pt")
    y, written = run_in_a_fresh_process(tmp_path / "module.pt", (x, None))
    with torch.no_grad():
        expected = module(x.clone())
    assert torch.equal(y, expected)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("name", ["plain", "post"])
def test_a_frozen_module_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    make, residual = MODULES[name]
    module, args = make().eval(), inputs(residual)
    frozen = torch.jit.freeze(torch.jit.script(module))
    with torch.no_grad():
        expected = module(*args)
        for _ in range(3):  # the profiling executor optimises after the first runs
            assert torch.equal(frozen(*args), expected)
        optimised = torch.jit.optimize_for_inference(torch.jit.script(module))
        for _ in range(3):
            assert torch.equal(optimised(*args), expected)
    assert str(frozen.graph).count(f"{OP}(") == 1
    assert not list(frozen.parameters())
    frozen.save(tmp_path / "frozen.pt")
    assert torch.equal(run_in_a_fresh_process(tmp_path / "frozen.pt", (args[0], (*args, None)[1]))[0], expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_traced_module_gives_the_same_bits_at_other_sizes(name: str, tmp_path: Path) -> None:
    make, residual = MODULES[name]
    module = make().eval()
    traced = torch.jit.trace(module, inputs(residual))
    other = tuple(make_map((2, C, 9, 7)) for _ in inputs(residual))
    assert torch.equal(traced(*other), module(*other))
    assert str(traced.inlined_graph).count(f"{OP}(") == 1
    torch.jit.save(traced, tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(*other), module(*other))


def test_an_error_in_script_is_ours() -> None:
    scripted = torch.jit.script(SqueezeExcitation(C, M))
    with pytest.raises(RuntimeError, match=r"squeeze_excite: expected w1 of shape \[M, 15\] or \[M, 15, 1, 1\], got"):
        scripted(make_map((2, C - 1, 5, 4)))


def test_without_the_library_the_error_names_an_op(tmp_path: Path) -> None:
    torch.jit.script(SqueezeExcitation(C, M)).save(tmp_path / "module.pt")
    command = [sys.executable, "-W", "ignore", "-c", "import sys, torch; torch.jit.load(sys.argv[1])"]
    done = subprocess.run([*command, tmp_path / "module.pt"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "RuntimeError" in done.stderr
    assert "Unknown builtin op: se_ext::" in done.stderr


# ---- the depthwise convolution, whose arguments have several types ----


class Depthwise(nn.Module):
    """The function with the attributes of torch's module: tuples, or the name of a padding."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        return se_ext.depthwise_conv(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(C, C, 5, 2, 2, groups=C), (2, C, 11)),
    "2d": (lambda: nn.Conv2d(C, C, 3, (1, 2), (0, 1), (2, 1), groups=C, bias=False), (2, C, 9, 8)),
    "2d same": (lambda: nn.Conv2d(C, C, 7, padding="same", groups=C), (2, C, 9, 8)),
    "2d valid": (lambda: nn.Conv2d(C, C, 3, padding="valid", groups=C), (2, C, 9, 8)),
    "3d": (lambda: nn.Conv3d(C, C, (2, 1, 3), (1, 2, 1), (1, 0, 2), groups=C), (2, C, 5, 4, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_depthwise_convolution_scripts(name: str, tmp_path: Path) -> None:
    make, shape = CONVOLUTIONS[name]
    module, x = Depthwise(make()), make_map(shape)
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(x), module(x))
    assert_close(module(x).detach(), module.conv.double()(x.double()).detach(), torch.float32, 64)
    module.conv.float()
    assert all(torch.equal(a, b) for a, b in zip(gradients(scripted, (x,)), gradients(module, (x,)), strict=True))
    assert str(scripted.inlined_graph).count("se_ext::depthwise_conv(") == 1
    scripted.save(tmp_path / "module.pt")
    y, *_ = run_in_a_fresh_process(tmp_path / "module.pt", (x, None))
    assert torch.equal(y, module(x))


def convolve_by_numbers(x: Tensor, weight: Tensor, zeros: int, each: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    one = se_ext.depthwise_conv(x, weight, stride=2, padding=zeros)
    pairs = se_ext.depthwise_conv(x, weight, None, [1, 2], each, [1])
    return one, pairs, torch.ops.se_ext.depthwise_conv(x, weight, None, 1, (zeros, 1))


def test_a_script_takes_numbers_and_lists() -> None:
    x, weight = make_map((2, C, 9, 8)), torch.randn(C, 1, 3, 3)
    scripted = torch.jit.script(convolve_by_numbers)(x, weight, 1, [0, 1, 2, 1])
    for ours, eager in zip(scripted, convolve_by_numbers(x, weight, 1, [0, 1, 2, 1]), strict=True):
        assert torch.equal(ours, eager)


# ---- between convolutions ----


class Between(nn.Module):
    """A block between convolutions, which takes the place of a tensor that is read again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(3, C, 3), block
        self.second, self.third = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x)
        y = self.block(u)
        return self.second(y) + self.third(u) * y


class InPlace(nn.Module):
    """The function in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, M), nn.Linear(M, C)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return se_ext.squeeze_excite(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, inplace=True)


class Called(nn.Linear):
    """A layer that has to be called."""


def with_a_called_layer() -> SqueezeExcitation:
    block = SqueezeExcitation(C, M, inplace=True)
    block.add_module("fc1", Called(C, M))
    return block


IN_PLACE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "module": (lambda: SqueezeExcitation(C, M, inplace=True), (2, 3, 12, 11)),
    "one image": (lambda: SqueezeExcitation(C, M, inplace=True, dims=2), (3, 12, 11)),
    "function": (InPlace, (2, 3, 12, 11)),
    "called layer": (with_a_called_layer, (2, 3, 12, 11)),
}


# Not scripted: a module whose layer is called is refused, and optimize_for_inference takes no image without a batch.
SCRIPTED = [(name, "script") for name in ("module", "function")]


@pytest.mark.parametrize(("name", "how"), [*SCRIPTED, *((name, "trace") for name in IN_PLACE)])
def test_what_is_written_in_place_is_read_afterwards(name: str, how: str) -> None:
    """optimize_for_inference moves convolutions; not in front of the op that writes their input."""
    make, shape = IN_PLACE[name]
    network, x = Between(make()).eval(), torch.randn(shape)
    with torch.no_grad():
        program = torch.jit.script(network) if how == "script" else torch.jit.trace(network, x)
        expected = network(x)
        for form in (program, torch.jit.freeze(program), torch.jit.optimize_for_inference(program)):
            assert_close(form(x), expected.double(), torch.float32, 9 * C)
            assert_close(form(x), expected.double(), torch.float32, 9 * C)
        y = make_map((2, C, 5, 4)) if len(shape) == 4 else make_map((1, C, 5, 4))[0]
        assert network.block(y).data_ptr() == y.data_ptr()
