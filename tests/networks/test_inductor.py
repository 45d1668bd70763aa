"""What Inductor, the default backend of torch.compile, makes of networks with our blocks: one op a block, which writes
into its input where nobody reads that afterwards, and no copy of a map that the network without SE blocks has not.
Generated programs are read, and their results compared with the plain formula in float64.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_near
from timm_networks import random_statistics, replace_blocks, timm_network
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import se_ext
from se_ext import _inductor, models, reference
from se_ext._residual import BasicBlock

C, M = 32, 8
IN_PLACE = "se_ext.squeeze_excite_.default"
FRESH = "se_ext.squeeze_excite.default"

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def compiled_anew(restore_threads: None) -> Iterator[None]:
    """On one thread, and without the programs that Inductor keeps on disk: those are of another version of se_ext."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def calls(code: str, op: str) -> int:
    """Of an op of ours in a generated program."""
    return code.count(f"torch.ops.{op}(")


def maps_made(code: str) -> int:
    """The maps [N, C, H, W] that a generated program allocates for kernels of its own: a copy of a map is one more."""
    return len(re.findall(r"= empty_strided_cpu\(\([^,()]+, [^,()]+, [^,()]+, [^,()]+\), ", code))


def residual() -> tuple[nn.Module, nn.Module, int]:
    """A network with our blocks, the same without SE blocks, and how many there were; and so below."""
    ours = random_statistics(models.SEResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, zero_init_last=False))
    return ours, without_se(ours), 4


def mobilenet() -> tuple[nn.Module, nn.Module, int]:
    theirs = timm_network("mobilenetv3_small_050").train()
    ours = replace_blocks(copy.deepcopy(theirs))
    blocks = sum(isinstance(module, se_ext.SqueezeExcitation) for module in ours.modules())
    return ours, without_se(theirs), blocks


def without_se(network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if hasattr(module, "se"):
            module.se = nn.Identity()
    return copied


NETWORKS = {"residual": residual, "mobilenet": mobilenet}


def images(n: int, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("residual", "default"),
        ("residual", "freezing"),
        ("residual", "freezing, dynamic"),
        ("residual", "max-autotune"),
        ("mobilenet", "freezing"),
    ],
)
def test_inference_has_one_op_per_block_in_place_and_no_copy(name: str, mode: str) -> None:
    ours, without, blocks = NETWORKS[name]()
    dynamic, options = "dynamic" in mode, {"mode": mode} if mode == "max-autotune" else {}
    programs = []
    with torch.no_grad(), config.patch(freezing="freezing" in mode):
        for network in (ours.eval(), without.eval()):
            plain = copy.deepcopy(network).double()
            compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, **options)
            x = images(2)
            y, code = run_and_get_code(compiled, x)
            programs.append("\n".join(code))
            assert_near(y, plain(x.double()), allowed=2e-4)
            if dynamic:
                x = images(3, 96)
                assert_near(compiled(x), plain(x.double()), allowed=2e-4)
    assert calls(programs[0], IN_PLACE) == blocks
    assert programs[0].count("torch.ops.se_ext.") == blocks
    assert maps_made(programs[0]) <= maps_made(programs[1])


def test_a_training_step_has_one_op_per_block_and_pass_and_no_copy() -> None:
    """Dynamic shapes: test_compiled_networks.py."""
    ours, without, blocks = residual()
    x = images(4).to(memory_format=torch.channels_last)

    def program(network: nn.Module) -> list[str]:
        """Forward's and backward's."""
        compiled = torch.compile(network, fullgraph=True)
        _, code = run_and_get_code(lambda: compiled(x).square().sum().backward())
        return code

    eager = copy.deepcopy(ours)
    eager(x).square().sum().backward()
    programs = program(ours), program(without)
    for (key, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        # ReLUs whose sign a rounding changes
        assert (a.grad - b.grad).norm() <= 1e-2 * b.grad.norm().clamp_min(1e-3), key
    for direction, with_ours, plain in zip(("forward", "backward"), *programs, strict=True):
        assert calls(with_ours, f"se_ext._bn_squeeze_excite_{direction}.default") == blocks
        assert maps_made(with_ours) <= maps_made(plain), direction


# ---- when the op may write into its input ----


class Between(nn.Module):
    """`middle` between two convolutions, with a convolution's result for a shortcut."""

    def __init__(self, middle: Callable[..., Tensor]) -> None:
        super().__init__()
        self.middle = middle
        self.conv1, self.conv2 = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, C, 1)
        self.conv3 = nn.Conv2d(C, 4, 3, padding=1)
        self.se = se_ext.SqueezeExcitation(C, M)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.middle(self, self.conv1(x), self.conv2))


def block(m: Any, x: Tensor, *more: Any) -> Tensor:
    """The block of a network in float32; of its float64 twin, the plain formula."""
    weights = m.se.fc1.weight, m.se.fc1.bias, m.se.fc2.weight, m.se.fc2.bias
    if x.dtype == torch.float64:
        return reference.squeeze_excite(x, *weights, "relu", "sigmoid", *more)
    return se_ext.squeeze_excite(x, *weights, "relu", "sigmoid", *more)


def scaled(m: Any, x: Tensor, s: Tensor) -> Tensor:
    return (reference if x.dtype == torch.float64 else se_ext).rescale(x, s)


def halves(m: Any, u: Tensor, conv: nn.Module) -> Tensor:
    """Two blocks, each on a view of the same map."""
    u = torch.cat((u, u.relu()), 2)
    first, second = u.chunk(2, 2)
    return block(m, first) + block(m, second)


# What stands between the convolutions; how many of its blocks write into their inputs, and how many must not.
MIDDLES: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "a dead input": (lambda m, u, conv: block(m, u), 1, 0),
    "one block after the other": (lambda m, u, conv: block(m, block(m, u)), 2, 0),
    "with a shortcut": (lambda m, u, conv: block(m, conv(u), u, "relu"), 1, 0),
    "the input is read later": (lambda m, u, conv: block(m, u) * u, 0, 1),
    "the input is read later, through a view": (lambda m, u, conv: block(m, u) + u.flip(3)[:, :, ::1], 0, 1),
    "the input is read later, by a convolution": (lambda m, u, conv: block(m, u) + conv(u), 0, 1),
    "the input is the residual": (lambda m, u, conv: block(m, u, u, "silu"), 0, 1),
    "the input is a view": (lambda m, u, conv: block(m, u.transpose(2, 3)), 0, 1),
    "the input is another view": (lambda m, u, conv: block(m, u.flatten(2)).unflatten(2, u.shape[2:]), 0, 1),
    "the input is a part": (lambda m, u, conv: block(m, u[:1]), 0, 1),
    "the input has other strides than the output": (lambda m, u, conv: block(m, u.transpose(2, 3) * 2), 0, 1),
    "the inputs share memory": (halves, 0, 2),
    "what is read later was computed before": (lambda m, u, conv: (t := u * 2 + 1, block(m, u.relu()) - t)[1], 1, 0),
}


# Middles with our ops, and the same network without SE.
WITHOUT_COPIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "block": (lambda m, u, conv: m.se(u), lambda m, u, conv: u),
    "batch norm and block": (lambda m, u, conv: m.tail(u), lambda m, u, conv: m.tail.bn(u)),
    "stages": (
        lambda m, u, conv: se_ext.rescale(u, se_ext.squeeze(u).sigmoid()),
        lambda m, u, conv: u * u.mean((2, 3), keepdim=True).sigmoid(),
    ),
}


@pytest.mark.parametrize("name", WITHOUT_COPIES)
def test_a_contiguous_training_step_has_no_copy(name: str) -> None:
    """Eager mode's maps are contiguous here, and Inductor's convolutions choose channels_last for them: an op that asks
    for eager mode's strides would get copies. (In channels_last both agree.)"""
    made = []
    for middle in WITHOUT_COPIES[name]:
        network, x = Between(middle), images(2, 16)
        network.tail = se_ext.BatchNormSqueezeExcitation(C, M)
        compiled = torch.compile(network, fullgraph=True)
        _, code = run_and_get_code(lambda f=compiled, x=x: f(x).square().sum().backward())
        made.append([maps_made(program) for program in code])
    for direction, ours, plain in zip(("forward", "backward"), *made, strict=True):
        assert ours <= plain, direction


@pytest.mark.parametrize("freezing", [False, True], ids=["", "freezing"])
@pytest.mark.parametrize("name", MIDDLES)
def test_only_a_dead_input_is_written(name: str, freezing: bool) -> None:
    middle, in_place, fresh = MIDDLES[name]
    network = Between(middle).eval()
    x = images(2, 16)
    with torch.no_grad(), config.patch(freezing=freezing):
        y, code = run_and_get_code(torch.compile(network, fullgraph=True), x)
        assert_near(y, copy.deepcopy(network).double()(x.double()))
    code = "\n".join(code)
    assert (calls(code, IN_PLACE), calls(code, FRESH)) == (in_place, fresh)
    assert not re.search(r"cpp_fused\w*squeeze_excite", code)  # no pass over the map beside the op


@pytest.mark.parametrize("returned", [False, True], ids=["", "returned"])
def test_what_the_caller_holds_is_not_written(returned: bool) -> None:
    """The program's input, and a map that it returns."""
    network = Between(lambda m, u, conv: u)
    x = torch.randn(2, C, 8, 8)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        u = x + 1 if returned else x
        return (block(network, u), u) if returned else (block(network, u),)

    with torch.no_grad():
        before = x.clone()
        ours, eager = torch.compile(f, fullgraph=True)(x), f(before.clone())
    assert torch.equal(x, before)
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(2, C, 64),
    "reshape": lambda x: x.reshape(2, C, 2, 32),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x, [2, C, 64]),
    "transpose": lambda x: x.transpose(2, 3),
    "slice": lambda x: x[:, :, ::2],
    "half of the batch": lambda x: x[1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_an_input_that_is_to_be_written_is_written(name: str) -> None:
    """In place, on a view of what the caller holds: the program writes there what eager mode does."""
    network, view = Between(lambda m, u, conv: u), VIEWS[name]
    weights = network.se.fc1.weight, network.se.fc1.bias, network.se.fc2.weight, network.se.fc2.bias

    def f(x: Tensor) -> Tensor:
        return se_ext.squeeze_excite(view(x), *weights, inplace=True) + 1

    x = torch.randn(2, C, 8, 8)
    eager = x.clone()
    with torch.no_grad():
        assert torch.equal(torch.compile(f, fullgraph=True)(x), f(eager))
    assert torch.equal(x, eager)


RETURNED = ["itself", "view", "reshape", "unsafe view", "half of the batch"]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_shares_no_memory_with_what_the_caller_holds(name: str, blocks: int) -> None:
    """A result that is copied into the input and returned as well is a tensor of its own, as in eager mode."""
    network, view = Between(lambda m, u, conv: u), VIEWS[name]

    def f(x: Tensor) -> Tensor:
        y = x
        for _ in range(blocks):
            y = block(network, y)
        x.copy_(y)
        return view(y)

    x = torch.randn(2, C, 8, 8)
    with torch.no_grad():
        expected = f(x.clone())
        y = torch.compile(f, fullgraph=True)(x)
        assert torch.equal(y, expected)
        before = x.clone()
        y.zero_()
    assert torch.equal(x, before)


def test_a_block_in_place_by_itself_writes_into_its_input() -> None:
    module, x = se_ext.SqueezeExcitation(C, M, inplace=True), torch.randn(2, C, 8, 8)
    with torch.no_grad():
        expected = module(x.clone())
        y, code = run_and_get_code(torch.compile(module, fullgraph=True), x)
    assert y is x
    assert torch.equal(x, expected)
    assert calls("\n".join(code), IN_PLACE) == 1


def test_arguments_by_name() -> None:
    network = Between(lambda m, u, conv: torch.ops.se_ext.rescale(scale=u.mean((2, 3)), input=u)).eval()
    x = images(2, 16)
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(network, fullgraph=True), x)
        assert_near(y, network(x).double())
    assert calls("\n".join(code), "se_ext.rescale_.default") == 1


def test_an_unknown_inductor_is_left_alone() -> None:
    """A version of torch whose pass has no such pairs: its import goes on, and says what is missing."""
    with pytest.warns(UserWarning, match="se_ext: compiled blocks do not write in place with torch .*InplaceableOp"):
        _inductor.add_pairs_or_warn(SimpleNamespace(inplaceable_ops={}))


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_rescale_writes_into_a_dead_input(shared: bool) -> None:
    """Unless the scale is a part of it."""
    network = Between(lambda m, u, conv: scaled(m, u, u[:, :, 0, 0] if shared else u.mean((2, 3)).sigmoid())).eval()
    x = images(2, 16)
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(network, fullgraph=True), x)
        assert_near(y, copy.deepcopy(network).double()(x.double()))
    assert calls("\n".join(code), "se_ext.rescale_.default") == (not shared)


# ---- batch norms that a compiler folds ----


def test_batch_norms_in_evaluation_are_folded() -> None:
    """With freezing none is left: their scale is in the weights of the convolutions, their shift is the bias."""
    network = residual()[0].eval()
    x = images(2)
    with torch.no_grad(), config.patch(freezing=True):
        _, code = run_and_get_code(torch.compile(network, fullgraph=True), x)
    code = "\n".join(code)
    convolutions = sum(
        isinstance(module, nn.Conv2d) and module.weight.shape[2:] != (1, 1) for module in network.modules()
    )
    assert "_bn_" not in code
    assert "rsqrt" not in code
    assert code.count("mkldnn._convolution_pointwise.default(") >= convolutions


def test_batch_norms_in_evaluation_stay_fused_where_gradients_flow() -> None:
    """A network that is tuned with its batch norms in evaluation: nothing could be folded."""
    network = residual()[0].eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(network, fullgraph=True, backend=counter), images(2)
    assert torch.equal(compiled(x), network(x))
    [graph] = counter.graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("_bn_squeeze_excite_running" in target for target in targets) == 4
    assert not any("batch_norm" in target for target in targets)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_network_has_ordinary_batch_norms_in_evaluation(strict: bool) -> None:
    network, x = residual()[0], images(2)
    for training in (False, True):
        program = torch.export.export(network.train(training), (x,), strict=strict)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("se_ext.squeeze_excite.default" in target for target in targets) == (0 if training else 4)
        assert any("batch_norm" in target for target in targets) != training
        if not training:
            torch.testing.assert_close(program.module()(x), network(x))


def test_a_hooked_batch_norm_and_a_pre_activation() -> None:
    """What is called for its hooks is called under a compiler too, and the pre_activation is applied once."""
    module = se_ext.BatchNormSqueezeExcitation(C, M, pre_activation=nn.SiLU, post_activation=nn.ReLU).eval()
    random_statistics(module)
    x, r = torch.randn(2, C, 6, 6), torch.randn(2, C, 6, 6)
    with torch.no_grad():
        expected = module(x, r)
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x, r), expected)
        module.bn.register_forward_hook(lambda module, args, output: 2 * output)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module)(x, r), module(x, r))
        assert not torch.allclose(module(x, r), expected)
