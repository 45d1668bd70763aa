"""torch.compile(fullgraph=True): one op node, eager's bits and strides, static and dynamic shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_moved_alike, device, make_map, make_weights
from ops import OpCase, Options, cases, differentiable
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import se_ext

C, M = 16, 4


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code or recompile count from another test."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


def leaves(args: list[Any]) -> list[Any]:
    return [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]


def run(f: Callable, args: list[Any], grad: Tensor | None) -> list[Tensor]:
    """The result and the gradients of all arguments that require one."""
    args = leaves(args)
    y = f(*args)
    if grad is None:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, [a for a in args if isinstance(a, Tensor) and a.requires_grad], grad)]


def assert_identical(ours: list[Tensor], eager: list[Tensor]) -> None:
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a, b)  # the same op underneath: the same bits


def map_and(n: int, size: int, channels_last: bool, requires_grad: bool, dtype: torch.dtype = torch.float32) -> list:
    shape = (n, C, size, size + 1)
    maps = [make_map(shape, dtype, channels_last, requires_grad) for _ in range(2)]
    return [maps[0], *make_weights(C, M, dtype, requires_grad=requires_grad), maps[1]]


def whole_block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
    return se_ext.squeeze_excite(x, w1, b1, w2, b2, "silu", "hardsigmoid", residual, "relu")


def three_ops(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
    return se_ext.rescale(x, se_ext.excite(se_ext.squeeze(x), w1, b1, w2, b2, "gelu"), residual, "silu")


def no_residual(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor) -> Tensor:
    return se_ext.squeeze_excite(x, w1, b1, w2, b2)


FUNCTIONS = {"block": whole_block, "three ops": three_ops, "no residual": no_residual}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_aot_eager_gives_eagers_bits(name: str, dynamic: bool, channels_last: bool, training: bool) -> None:
    f = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=dynamic)
    sizes = [(3, 5), (4, 7), (2, 6), (8, 4), (5, 9)] if dynamic else [(3, 5)]
    for n, size in sizes:
        args = map_and(n, size, channels_last, requires_grad=training and name != "no residual")
        if training and name == "no residual":
            args = [a.requires_grad_() for a in args[:-1]] + [None]
        grad = torch.randn_like(args[0]) if training else None
        with torch.set_grad_enabled(training):
            assert_identical(run(compiled, args, grad), run(f, args, grad))
    assert counter.frame_count == 1


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@cases(differentiable)
def test_every_op_is_one_graph(case: OpCase, dynamic: bool, training: bool, batch_statistics: bool) -> None:
    """With eager's bits and strides. Running statistics move by ATen's operators in the graph, and by a loop of our own
    in eager: to a rounding."""
    if not batch_statistics and not {"batch_statistics", "training"} & set(case.names):
        return
    counter = CompileCounterWithBackend("aot_eager")
    names, compiled_once = case.names, 0

    def f(*values: Any) -> Any:
        return case.op(*values)

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=dynamic)
    # At first no two sizes are equal (a filter's are 3): torch would take them for one symbol.
    for n, size in [(8, 5), (4, 7), (2, 6)] if dynamic else [(3, 5)]:
        options = Options((n, C, size, size + 1), M, channels_last=True, batch_statistics=batch_statistics)
        given = case.make(replace(options, pre_activation="silu", post_activation="relu", requires_grad=training))
        results = []
        for call in (compiled, f):
            copies = dict(zip(names, leaves(list(given.values())), strict=True))
            found = call(*copies.values())
            y, *others = [found] if isinstance(found, Tensor) else found
            torch.manual_seed(0)
            wanted = list(case.leaves(copies).values())
            grads = torch.autograd.grad(y, wanted, torch.randn_like(y)) if training else ()
            results.append(([y.detach(), *others, *grads], [copies[name] for name in case.writes]))
        assert_identical(*(tensors for tensors, _ in results))
        for name, ours, theirs in zip(case.writes, results[1][1], results[0][1], strict=True):
            assert_moved_alike(given[name], ours, theirs)
        compiled_once = compiled_once or counter.frame_count  # 2 where torch first takes a float for a symbol
    assert counter.frame_count == compiled_once <= 2


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_varying_sizes_recompile_once(training: bool) -> None:
    """Without `dynamic`, the second size makes the shape dynamic, and no later one compiles again."""
    counter = CompileCounterWithBackend("aot_eager")
    module = se_ext.SqueezeExcitation(C, M, post_activation=nn.ReLU)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for n, size in [(3, 5), (4, 6), (5, 8), (6, 11), (2, 7), (9, 3)]:
        x, *_, r = map_and(n, size, channels_last=True, requires_grad=training)
        with torch.set_grad_enabled(training):
            y, eager = compiled(x, r), module(x, r)
        assert torch.equal(y, eager)
        assert y.stride() == eager.stride()
        if training:
            y.sum().backward()
    assert counter.frame_count == 2


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_inductor_gives_eagers_bits(training: bool, channels_last: bool) -> None:
    compiled = torch.compile(whole_block, fullgraph=True, backend="inductor", dynamic=True)
    for n, size in [(3, 5), (2, 7)]:
        args = map_and(n, size, channels_last, requires_grad=training)
        grad = torch.randn_like(args[0]) if training else None
        with torch.set_grad_enabled(training):
            assert_identical(run(compiled, args, grad), run(whole_block, args, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    compiled = torch.compile(three_ops, fullgraph=True, backend="aot_eager")
    args = map_and(2, 5, True, requires_grad=True, dtype=dtype)
    grad = torch.randn_like(args[0])
    assert_identical(run(compiled, args, grad), run(three_ops, args, grad))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "one point", "empty batch", "1d", "3d"])
def test_strides_of_unusual_maps(layout: str) -> None:
    """The fake kernel's strides are those of the real run: a later view or as_strided in the graph relies on them."""
    x = {
        "transposed": lambda: make_map((2, C, 4, 5)).transpose(2, 3),
        "sliced": lambda: make_map((2, C, 8, 5))[:, :, ::2],
        "expanded": lambda: make_map((1, C, 4, 5)).expand(3, C, 4, 5),
        "one point": lambda: make_map((3, C, 1, 1), channels_last=True),
        "empty batch": lambda: make_map((0, C, 4, 5), channels_last=True),
        "1d": lambda: make_map((2, C, 9)),
        "3d": lambda: make_map((2, C, 2, 3, 4), channels_last=True),
    }[layout]()
    args = [x.requires_grad_(), *make_weights(C, M, requires_grad=True), None]
    compiled = torch.compile(no_residual, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(*args), no_residual(*args)
    grad = torch.randn_like(eager)
    given = [a for a in args if a is not None]
    assert_identical(
        [ours.detach(), *torch.autograd.grad(ours, given, grad)],
        [eager.detach(), *torch.autograd.grad(eager, given, grad)],
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("channels_last", [(True, False, False), (False, True, True), (True, True, False)])
def test_maps_of_one_op_may_differ_in_layout(channels_last: tuple[bool, bool, bool], backend: str) -> None:
    """input, residual and the output's gradient, each contiguous or channels_last: a compiler may choose them apart."""
    shape = (2, C, 5, 6)
    x, residual, grad = (make_map(shape, channels_last=last) for last in channels_last)
    args = [x.requires_grad_(), *make_weights(C, M, requires_grad=True), residual.requires_grad_()]
    compiled = torch.compile(whole_block, fullgraph=True, backend=backend)
    assert_identical(run(compiled, args, grad), run(whole_block, args, grad))


# ---- what is in the graphs ----


class Graphs:
    """A backend that keeps the graphs which AOTAutograd made, and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []
        self.inference: list[list[str]] = []
        keep = self._keep
        self.backend = aot_autograd(
            fw_compiler=keep(self.forward), bw_compiler=keep(self.backward), inference_compiler=keep(self.inference)
        )

    @staticmethod
    def _keep(kept: list[list[str]]) -> Callable:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable:
            kept.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
            return make_boxed_func(graph.forward)

        return compiler


def computing(graph: list[str]) -> list[str]:
    """The nodes that compute: not the unpacking of a tuple, nor the view that stands for a saved output."""
    return [target for target in graph if "getitem" not in target and target != "aten.detach.default"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_inference_graph_holds_one_node(dynamic: bool) -> None:
    graphs = Graphs()
    module = se_ext.SqueezeExcitation(C, M, post_activation=nn.ReLU).eval()
    compiled = torch.compile(module, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    x, r = make_map((2, C, 5, 6)), make_map((2, C, 5, 6))
    with torch.no_grad():
        assert torch.equal(compiled(x, r), module(x, r))
    assert [computing(g) for g in graphs.inference] == [["se_ext.squeeze_excite.default"]]
    assert not graphs.forward
    assert not graphs.backward


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_training_graphs_hold_one_node_each(dynamic: bool) -> None:
    graphs = Graphs()
    module = se_ext.SqueezeExcitation(C, M, post_activation=nn.ReLU)
    compiled = torch.compile(module, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    x, r = make_map((2, C, 5, 6), requires_grad=True), make_map((2, C, 5, 6), requires_grad=True)
    grad = torch.randn_like(x)
    ours = torch.autograd.grad(compiled(x, r), [x, r, *module.parameters()], grad)
    assert_identical(list(ours), list(torch.autograd.grad(module(x, r), [x, r, *module.parameters()], grad)))
    assert [computing(g) for g in graphs.forward] == [["se_ext._squeeze_excite_forward.default"]]
    assert [computing(g) for g in graphs.backward] == [["se_ext._squeeze_excite_backward.default"]]
    assert not graphs.inference


def test_the_training_graphs_of_the_single_ops() -> None:
    graphs = Graphs()
    compiled = torch.compile(three_ops, fullgraph=True, backend=graphs.backend)
    args = map_and(2, 5, False, requires_grad=True)
    compiled(*args).sum().backward()
    ours = [target for target in graphs.forward[0] if "se_ext" in target]
    assert ours == ["se_ext.squeeze.default", "se_ext._excite_forward.default", "se_ext.rescale.default"]
    ours = [target for target in graphs.backward[0] if "se_ext" in target]
    assert ours == ["se_ext._rescale_backward.default", "se_ext._excite_backward.default"]


# ---- in place ----


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_place_writes_into_its_input_and_returns_it(backend: str) -> None:
    def f(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return se_ext.squeeze_excite(x, w1, b1, w2, b2, inplace=True)

    x, w = make_map((2, C, 5, 6)), make_weights(C, M)
    expected = se_ext.squeeze_excite(x, *w)
    y = torch.compile(f, fullgraph=True, backend=backend)(x, *w)
    assert y is x
    assert torch.equal(x, expected)


def test_in_place_on_a_temporary_and_then_used_again() -> None:
    def f(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        t = x + 1
        view = t[:, :2]
        torch.ops.se_ext.rescale_(t, s, x, "relu")
        return t * 2, view * 3  # the write shows through the view

    x, s = make_map((2, C, 5, 6), torch.float64), torch.rand(2, C, dtype=torch.float64)
    for ours, eager in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(x, s), f(x, s), strict=True):
        assert torch.equal(ours, eager)
    assert torch.equal(f(x, s)[1], f(x, s)[0][:, :2] * 1.5)


@pytest.mark.parametrize("grad_mode", [False, True])
def test_the_in_place_module_follows_grad_mode(grad_mode: bool) -> None:
    module = se_ext.SqueezeExcitation(C, M, inplace=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = make_map((2, C, 5, 6))
    before = x.clone()
    with torch.set_grad_enabled(grad_mode):
        y = compiled(x)
        expected = module(before.clone())
    assert torch.equal(y, expected)
    assert (y is x) is not grad_mode
    assert torch.equal(x, before) is grad_mode


# ---- in a model, and beside torch's other transformations ----


class Net(nn.Module):
    """A small residual CNN with the block where an SE-ResNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)
        self.se = se_ext.SqueezeExcitation(C, M, post_activation=nn.ReLU)
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.se(self.norm(self.conv(x)), x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("backend", "channels_last"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_a_cnn_trains_as_in_eager(backend: str, channels_last: bool) -> None:
    torch.manual_seed(1)
    eager = Net().double()
    if channels_last:
        eager = eager.to(memory_format=torch.channels_last)
    twin = Net().double()
    twin.load_state_dict(eager.state_dict())
    twin = twin.to(memory_format=torch.channels_last) if channels_last else twin
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, twin)]
    for step in range(3):
        torch.manual_seed(step)
        x, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    for (name, a), b in zip(eager.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name  # inductor orders the other layers' sums its own way


class Separable(nn.Module):
    """Depthwise convolutions of two kinds between convolutions, as a MobileNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, C, 1), nn.Conv2d(C, 5, 1)
        self.first, self.second = (nn.Conv2d(C, C, size, 2, size // 2, groups=C) for size in (3, 5))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first, self.second
        u = self.expand(x).relu()
        u = se_ext.depthwise_conv(u, first.weight, first.bias, first.stride, first.padding, first.dilation).relu()
        return self.project(se_ext.depthwise_conv(u, second.weight, None, 1, "same"))


@pytest.mark.parametrize(("dynamic", "channels_last"), [(False, True), (True, True), (True, False)])
def test_depthwise_convolutions_between_convolutions(dynamic: bool, channels_last: bool) -> None:
    """In the layout that the compiler chooses, at sizes of the run, trained."""
    network = Separable().double()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic)
    for n, size in [(4, 11), (2, 8)] if dynamic else [(4, 11)]:
        x = torch.randn(n, 3, size, size + 3, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(p for name, p in network.named_parameters() if name != "second.bias")]
        y, expected = compiled(x), network(x)
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(t, leaves, grad) for t in (y, expected))
        for a, b in zip([y, *ours], [expected, *theirs], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_autocast_inside_the_graph() -> None:
    module = se_ext.SqueezeExcitation(C, M)

    def f(x: Tensor) -> Tensor:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            return module(x)

    x = make_map((2, C, 5, 6))
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, f(x))


def test_func_transforms_inside_the_graph() -> None:
    w = make_weights(C, M, torch.float64)

    def f(x: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda t: se_ext.squeeze_excite(t, *w, "silu").square().sum())(x)
        return gradient + torch.func.vmap(lambda t: se_ext.squeeze_excite(t, *w))(x[None])[0]

    x = make_map((2, C, 3, 2), torch.float64)
    assert torch.allclose(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bad_input_raises_with_our_message(dynamic: bool) -> None:
    compiled = torch.compile(whole_block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, w1, b1, _, b2, r = map_and(2, 5, False, requires_grad=False)
    message = r"squeeze_excite: expected w2 of shape \[\w+, \w+\] or \[\w+, \w+, 1, 1\], got \[\w+, \w+\]"
    if not dynamic:
        message = r"squeeze_excite: expected w2 of shape \[16, 4\] or \[16, 4, 1, 1\], got \[4, 16\]"
    with pytest.raises(RuntimeError, match=message):
        compiled(x, w1, b1, w1.clone(), b2, r)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: se_ext.squeeze(x), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pytest.raises(RuntimeError, match=r"squeeze: expected input of dtype float32, .*, got int64"):
        compiled(torch.ones(2, 3, 4, dtype=torch.int64))


def test_bad_input_after_good_raises_too() -> None:
    """The compiled code for good input must not run on bad: its guards fail, and the check speaks."""
    compiled = torch.compile(lambda x, s: se_ext.rescale(x, s), fullgraph=True, backend="aot_eager")
    x = make_map((3, C, 5, 6))
    compiled(x, torch.rand(3, C))
    with pytest.raises(RuntimeError, match=r"rescale: expected scale of shape \["):
        compiled(x, torch.rand(3, C + 1))


# ---- compiled autograd ----


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("f", [whole_block, three_ops, no_residual], ids=FUNCTIONS)
def test_compiled_autograd_records_backward_whole(f: Callable, dynamic: bool) -> None:
    """Of an eager forward: the graph of all of backward holds our backward ops, without a break, and gives eager's
    bits."""
    counter = CompileCounterWithBackend("aot_eager")
    for n, size in [(2, 5), (3, 4)] if dynamic else [(2, 5)]:
        args = map_and(n, size, channels_last=True, requires_grad=True)
        grad = torch.randn_like(args[0])
        args = [*args[:-1], None] if f is no_residual else args
        ours, eager = leaves(args), leaves(args)
        with compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)):
            f(*ours).backward(grad)
        f(*eager).backward(grad)
        assert_identical(*([a.grad for a in given if a is not None] for given in (ours, eager)))
    assert counter.frame_count >= 1


def test_compiled_autograd_of_a_network() -> None:
    """A batch norm in training, its running statistics, and a hook on a parameter."""
    module = se_ext.BatchNormSqueezeExcitation(C, M, post_activation=nn.ReLU)
    network = nn.Sequential(nn.Conv2d(3, C, 3), module, nn.Conv2d(C, 2, 1))
    twin = copy.deepcopy(network)
    for net in (network, twin):
        net[0].weight.register_hook(lambda grad: 2 * grad)
    x = torch.randn(2, 3, 8, 8)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        network(x).square().sum().backward()
    twin(x).square().sum().backward()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(network.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
