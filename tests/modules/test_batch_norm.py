"""Batch norms in modules: alone with an activation, and before a block. Statistics, counts and outputs are torch's;
compiled, exported and scripted they are eager's."""

from __future__ import annotations

import copy
import io
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from helpers import HALF, Watch, assert_moved_alike, make_map, make_weights
from torch import Tensor, nn

import se_ext
from se_ext._fusion import batch_norm

# ruff: noqa: UP045
C, M = 16, 4
TAILS = {
    "SE-ResNet": {"post_activation": nn.ReLU},
    "EfficientNet": {"pre_activation": nn.SiLU},
}
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


# ---- running statistics ----


@pytest.mark.parametrize("options", [{}, {"momentum": 0.3}, {"momentum": None}, {"affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_are_those_of_batch_norm(dtype, options):
    tail = se_ext.BatchNormSqueezeExcitation(12, 4, **options).to(dtype)
    plain = nn.BatchNorm2d(12, **options).to(dtype)
    eps = torch.finfo(dtype).eps
    # In a half type the statistics of the batch are exact beside the rounding of the running ones, once a step.
    rtol, atol = ((4 if dtype in HALF else 16) * eps, 4 * eps)
    for step in range(3):
        x = make_map((4, 12, 5, 6), dtype) * (1 + step)
        tail(x)
        plain(x)
        assert int(tail.bn.num_batches_tracked) == int(plain.num_batches_tracked) == step + 1
        for name in ("running_mean", "running_var"):
            ours, theirs = getattr(tail.bn, name), getattr(plain, name)
            assert torch.allclose(ours, theirs, rtol=rtol, atol=atol), name
    before = {name: buffer.clone() for name, buffer in tail.bn.named_buffers()}
    tail.eval()(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in tail.bn.named_buffers())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_dispatch_mode_sees_running_statistics_change(dtype, options):
    """Without a mode they are updated by a plain loop, to the same values."""
    tail = se_ext.BatchNormSqueezeExcitation(12, 4, **options).to(dtype)
    for _ in range(3):
        before, watched = dict(copy.deepcopy(tail).named_buffers()), copy.deepcopy(tail)
        x = make_map((4, 12, 5, 6), dtype)
        tail(x)
        with Watch() as watch:
            watched(x)
        assert watch.names.count("aten::lerp_") == 2
        for (name, ours), theirs in zip(tail.named_buffers(), watched.buffers(), strict=True):
            assert_moved_alike(before[name], ours, theirs)


def test_autograd_notices_that_running_statistics_changed():
    tail = se_ext.BatchNormSqueezeExcitation(12, 4)
    factor = torch.ones(12, requires_grad=True)
    for name in ("running_mean", "running_var"):
        kept = factor * getattr(tail.bn, name)  # saves the statistic for backward
        tail(make_map((4, 12, 5, 6)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.sum().backward()


def test_running_statistics_of_any_strides_are_updated():
    tail, plain = se_ext.BatchNormSqueezeExcitation(12, 4), nn.BatchNorm2d(12)
    for statistic, start in (("running_mean", torch.zeros(24)), ("running_var", torch.ones(24))):
        tail.bn._buffers[statistic] = start[::2]
    x = make_map((4, 12, 5, 6))
    tail(x)
    plain(x)
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(tail.bn, name), getattr(plain, name), rtol=1e-6, atol=1e-6), name


def test_without_running_statistics_the_batch_s_are_used_in_evaluation_too():
    tail = se_ext.BatchNormSqueezeExcitation(12, 4, track_running_stats=False)
    x = make_map((4, 12, 5, 6))
    assert torch.equal(tail(x), tail.eval()(x))
    assert {key for key in tail.state_dict() if key.startswith("bn")} == {"bn.weight", "bn.bias"}


# ---- in the place of modules ----


@pytest.mark.parametrize("pre", [None, nn.SiLU])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_module_is_its_parts(training, pre):
    """Its state loads into the separate modules and back, and the results are the same."""
    tail = se_ext.BatchNormSqueezeExcitation(12, 4, pre_activation=pre, post_activation=nn.ReLU).double()
    nn.init.uniform_(tail.bn.weight)
    nn.init.normal_(tail.bn.bias)
    tail(make_map((4, 12, 5, 6), torch.float64))  # running statistics of their own
    parts = nn.ModuleDict({"bn": nn.BatchNorm2d(12), "se": se_ext.SqueezeExcitation(12, 4)}).double()
    parts.load_state_dict(tail.state_dict())
    tail.load_state_dict(parts.state_dict())
    tail.train(training)
    parts.train(training)
    x, residual = make_map((4, 12, 5, 6), torch.float64), make_map((4, 12, 5, 6), torch.float64)
    u = parts["bn"](x)
    expected = torch.relu(parts["se"](u if pre is None else pre()(u)) + residual)
    assert torch.allclose(tail(x, residual), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(tail.bn.buffers(), parts["bn"].buffers(), strict=True))


def test_any_other_normalisation_is_called():
    """SyncBatchNorm and what a user puts there keep their own formula; the rest stays fused."""
    tail = se_ext.BatchNormSqueezeExcitation(12, 4, pre_activation="silu", post_activation="relu").double()
    fused = se_ext.BatchNormSqueezeExcitation(12, 4, pre_activation="silu", post_activation="relu").double()
    fused.load_state_dict(tail.state_dict())
    called = []

    class Other(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            called.append(input)
            return super().forward(input)

    tail.bn.__class__ = Other
    x, residual = make_map((4, 12, 5, 6), torch.float64), make_map((4, 12, 5, 6), torch.float64)
    drop = torch.tensor([0.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    assert torch.allclose(tail(x, residual, drop), fused(x, residual, drop), rtol=1e-12, atol=1e-12)
    assert len(called) == 1
    assert torch.allclose(tail.bn.running_var, fused.bn.running_var)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("activation", [None, nn.ReLU(inplace=True)], ids=["", "relu"])
def test_it_is_the_modules_it_stands_for(activation, options):
    ours = nn.BatchNorm2d(12, **options).double()
    theirs = copy.deepcopy(ours)
    for step in range(6):
        for bn in (ours, theirs):
            bn.train(step < 3)
        x = make_map((4, 12, 5, 6), torch.float64) * (1 + step)
        expected = theirs(x)
        expected = expected if activation is None else torch.relu(expected)
        assert torch.allclose(batch_norm(ours, activation, x), expected, rtol=1e-12, atol=1e-12)
        for (name, found), exact in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            if name == "num_batches_tracked":
                assert int(found) == int(exact) == min(step + 1, 3)
            else:
                assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12), name


def test_any_other_module_is_called():
    called: list[str] = []

    class Norm(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            called.append("norm")
            return super().forward(input)

    class Activation(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            called.append("activation")
            return super().forward(input)

    x = make_map((4, C, 5, 5))
    expected = batch_norm(nn.BatchNorm2d(C), nn.ReLU(), x)
    for bn, activation in ((Norm, nn.ReLU), (nn.BatchNorm2d, Activation), (Norm, Activation)):
        assert torch.allclose(batch_norm(bn(C), activation(), x), expected, atol=1e-5)
    assert called == ["norm", "activation", "norm", "activation"]
    assert torch.allclose(batch_norm(nn.BatchNorm2d(C), nn.SiLU(), x), F.silu(nn.BatchNorm2d(C)(x)), atol=1e-5)


# ---- torch.compile, torch.export, TorchScript, torch.func ----


class NormAndActivation(nn.Module):
    """As the networks of se_ext.models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(C), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self.bn, self.act, x)


@pytest.fixture(params=[*TAILS, "norm and activation"])
def module(request) -> nn.Module:
    alone = request.param not in TAILS
    made = NormAndActivation() if alone else se_ext.BatchNormSqueezeExcitation(C, M, **TAILS[request.param])
    nn.init.uniform_(made.bn.weight, 0.5, 1.0)
    nn.init.normal_(made.bn.bias)
    return made


def arguments(module: nn.Module, shape: tuple[int, ...] = (4, C, 9, 7)) -> list[Tensor]:
    """The map; where the module ends in a ReLU, the shortcut too."""
    count = 2 if getattr(module, "post_activation", None) == "relu" else 1
    return [make_map(shape, requires_grad=True) for _ in range(count)]


@modes
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_is_one_graph(module, training, dynamic):
    """With eager's results, to the bit; the running statistics, which eager updates in a loop of its own and the graph
    by ATen's operators, to a rounding."""
    module.train(training)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((4, C, 9, 7), (6, C, 5, 8)) if dynamic else ((4, C, 9, 7),):
        given = arguments(module, shape)
        found = []
        for form in (module, compiled):
            module.load_state_dict(state)
            y = form(*given)
            grads = torch.autograd.grad(y.square().sum(), [*given, *module.parameters()])
            found.append(([y.detach(), *grads], {name: b.clone() for name, b in module.named_buffers()}))
        (eager, eager_buffers), (graph, graph_buffers) = found
        assert all(map(torch.equal, eager, graph))
        for name, ours in eager_buffers.items():
            assert_moved_alike(state[name], ours, graph_buffers[name])


@modes
def test_export(module, training):
    """In training one op, which gives eager's bits; in evaluation an ordinary batch norm, for compilers to fold."""
    module.train(training)
    given = tuple(t.detach() for t in arguments(module))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, given, dynamic_shapes=tuple({0: batch} for _ in given), strict=True)
    more = tuple(torch.cat([t, t]) for t in given)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    ours = program.module()(*more)
    if training:
        assert torch.equal(ours, module(*more))
    else:
        torch.testing.assert_close(ours, module(*more))
    module.load_state_dict(state)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("se_ext._bn" in target for target in targets) == training
    assert sum("aten.batch_norm" in target for target in targets) == (not training)


@modes
@pytest.mark.parametrize("name", TAILS)
def test_torchscript(name, training):
    tail = se_ext.BatchNormSqueezeExcitation(C, M, **TAILS[name]).train(training)
    given = arguments(tail)
    state = {key: value.clone() for key, value in tail.state_dict().items()}
    expected = tail(*given)
    statistics = [b.clone() for b in tail.buffers()]
    tail.load_state_dict(state)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(tail), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(*given), expected)
    assert all(map(torch.equal, loaded.buffers(), statistics))


def test_the_function_scripts():
    def function(x: Tensor, mean: Tensor, var: Tensor, w1: Tensor, w2: Tensor, r: Optional[Tensor]) -> Tensor:
        y = se_ext.bn_squeeze_excite(x, None, None, mean, var, w1, None, w2, None, training=False, residual=r)
        return se_ext.squeeze_excite(y, w1, None, w2, None, pre_bias=mean, pre_activation="silu")

    x, (w1, _, w2, _) = make_map((2, C, 5, 5)), make_weights(C, M)
    given = (x, torch.randn(C), torch.rand(C), w1, w2, x)
    assert torch.equal(torch.jit.script(function)(*given), function(*given))


def test_functional_call_under_torch_func(module):
    """Gradients with respect to parameters, and vmap, through torch.func.functional_call in evaluation."""
    module.double().eval()
    parameters = {key: value.detach() for key, value in module.named_parameters()}
    buffers = dict(module.named_buffers())
    given = [t.detach().double() for t in arguments(module)]

    def loss(parameters, *given):
        return torch.func.functional_call(module, {**parameters, **buffers}, given).square().sum()

    found = torch.func.grad(loss)(parameters, *given)
    module(*given).square().sum().backward()
    assert all(torch.allclose(found[key], p.grad, rtol=1e-8, atol=1e-10) for key, p in module.named_parameters())
    each = torch.func.vmap(lambda *one: loss(parameters, *(t[None] for t in one)))(*given)
    assert torch.allclose(each.sum(), loss(parameters, *given))
