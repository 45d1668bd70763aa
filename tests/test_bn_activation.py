"""The batch norm with an activation and no block behind it, as the networks in se_ext.models call it: against torch's
own two modules in float64, and what holds for every op."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    DTYPES,
    HALF,
    assert_close,
    assert_moved_alike,
    check_against_float64,
    device,
    make_map,
    redispatch,
    saved_maps,
)
from test_memory import full_and_small
from torch import Tensor, nn

from se_ext._fusion import batch_norm
from se_ext.reference import ACTIVATIONS as PLAIN

SHAPES = [(3, 5, 9), (4, 24, 7, 7), (2, 19, 5, 6), (3, 72, 14, 14), (2, 9, 3, 4, 5), (6, 40, 1, 1), (1, 8, 4, 4)]
OP = torch.ops.se_ext._bn_activation
C = 16
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    weight_dtype: torch.dtype | None = None,
    requires_grad: bool = True,
) -> list[Tensor | None]:
    """input, weight, bias"""

    def vector(center: float) -> Tensor:
        drawn = center + torch.rand(shape[1], dtype=torch.float64) - 0.5
        return drawn.to(weight_dtype or dtype).requires_grad_(requires_grad)

    return [make_map(shape, dtype, channels_last, requires_grad), vector(1.0), vector(0.0)]


def check(tensors: list[Tensor | None], training: bool, activation: str) -> None:
    """Without training the op takes an affine map, which is a batch norm of mean 0 and variance 1."""

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        given = (None, None) if training else (x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))
        return PLAIN[activation](F.batch_norm(x, *given, weight, bias, training, 0.0, 1e-5 if training else 0.0))

    x = tensors[0]
    values = x.shape[0] * x[0, 0].numel()
    check_against_float64(lambda *t: OP(*t, training, 1e-5, activation)[0], plain, tensors, summed=(values, 2 * values))


@modes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_of_every_shape(activation, shape, channels_last, training):
    check(make_case(shape, channels_last=channels_last), training, activation)


@modes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, training):
    check(make_case((3, 10, 5, 7), torch.float64), training, activation)


@modes
@layouts
@pytest.mark.parametrize("float_weights", [False, True], ids=["", "float32 weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_every_dtype(activation, dtype, float_weights, channels_last, training):
    weight_dtype = torch.float32 if float_weights and dtype in HALF else dtype
    check(make_case((4, 24, 7, 7), dtype, channels_last, weight_dtype), training, activation)


@modes
@pytest.mark.parametrize("wanted", range(3))
def test_every_gradient_by_itself(wanted, training):
    tensors = make_case((3, 12, 5, 5), torch.float64, requires_grad=False)
    tensors[wanted].requires_grad_()
    check(tensors, training, "relu")


@modes
def test_without_weight_or_bias(training):
    x, weight, bias = make_case((3, 12, 5, 5), torch.float64)
    for tensors in ([x, None, None], [x, weight, None], [x, None, bias]):
        check(tensors, training, "relu")


@modes
@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "silu"])
def test_second_derivatives(activation, training):
    tensors = make_case((2, 3, 2, 3), torch.float64)

    def run(*t: Tensor) -> Tensor:
        return OP(*t, training, 1e-5, activation)[0]

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_strided_and_misaligned_inputs():
    x, weight, bias = make_case((3, 12, 5, 8), torch.float64, requires_grad=False)
    shifted = torch.empty(x.numel() + 1, dtype=torch.float64)[1:].view(x.shape).copy_(x)
    for strange in (x.transpose(2, 3).contiguous().transpose(2, 3), x[:1].expand(3, -1, -1, -1), shifted):
        check([strange.detach().requires_grad_(), weight, bias], True, "relu")


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty_maps(shape):
    bn = nn.BatchNorm2d(8)
    x = make_map(shape, requires_grad=True)
    y = batch_norm(bn, nn.ReLU(), x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(bn.running_mean, torch.zeros(8))


@layouts
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_bitwise_the_same_for_any_number_of_threads(activation, channels_last, restore_threads):
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        tensors = make_case((7, 40, 14, 14), channels_last=channels_last)
        y, *found = OP(*tensors, True, 1e-5, activation)
        results.append([y.detach(), *found, *torch.autograd.grad(y, tensors, torch.randn_like(y))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@layouts
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_in_evaluation_a_sample_does_not_depend_on_its_batch(activation, channels_last):
    x, weight, bias = make_case((9, 40, 7, 7), channels_last=channels_last, requires_grad=False)
    whole = OP(x, weight, bias, False, 1e-5, activation)[0]
    for n in range(9):
        assert torch.equal(OP(x[n : n + 1], weight, bias, False, 1e-5, activation)[0], whole[n : n + 1])


@layouts
def test_infinity_and_nan_stay_in_their_channel(channels_last):
    x, weight, bias = make_case((2, 6, 4, 4), channels_last=channels_last, requires_grad=False)
    x[0, 1, 0, 0], x[1, 4, 2, 2] = torch.inf, torch.nan
    y, _, var, _ = OP(x, weight, bias, True, 1e-5, "relu")
    healthy = [i in (0, 2, 3, 5) for i in range(6)]
    assert y.isfinite().all(0).flatten(1).all(1).tolist() == healthy
    assert var.isfinite().tolist() == healthy
    exact = F.relu(F.batch_norm(x, None, None, weight, bias, True))
    assert torch.equal(y.isnan(), exact.isnan())


@layouts
def test_nothing_but_the_map_is_saved(channels_last):
    x, weight, bias = make_case((4, C, 9, 7), channels_last=channels_last)
    _, saved = saved_maps(lambda: OP(x, weight, bias, True, 1e-5, "relu")[0], x.numel())
    assert saved == [x.data_ptr()]


@pytest.mark.cpu_only
@layouts
def test_a_training_step_allocates_results_and_gradients(channels_last):
    tensors = make_case((8, C, 56, 56), channels_last=channels_last)
    grad = make_map((8, C, 56, 56), channels_last=channels_last)

    def step():
        y = OP(*tensors, True, 1e-5, "relu")[0]
        return y, torch.autograd.grad(y, tensors, grad)

    full, small = full_and_small(step, tensors[0])
    assert full == [1, 1]
    assert small < tensors[0].nbytes / 8


# ---- in the place of modules ----


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


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(C), nn.ReLU()
        nn.init.uniform_(self.bn.weight, 0.5, 1.0)
        nn.init.normal_(self.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self.bn, self.act, x)


@modes
def test_compile_is_one_graph(training):
    module = Fused().train(training)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = make_map((4, C, 9, 7), requires_grad=True)
    found = []
    for form in (module, compiled):
        module.load_state_dict(state)
        y = form(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        found.append(([y.detach(), *grads], {name: b.clone() for name, b in module.named_buffers()}))
    (eager, eager_buffers), (graph, graph_buffers) = found
    assert all(map(torch.equal, eager, graph))
    for name, ours in eager_buffers.items():
        assert_moved_alike(state[name], ours, graph_buffers[name])


@modes
def test_export(training):
    module, x = Fused().train(training), make_map((4, C, 9, 7))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}}, strict=True)
    module.load_state_dict(state)
    more = torch.cat([x, x])
    expected = module(more)
    assert torch.equal(program.module()(more), expected)
    assert sum("bn_activation" in str(node.target) for node in program.graph.nodes) == 1


def test_autocast():
    module, x = Fused(), make_map((4, C, 9, 7), requires_grad=True)
    with torch.autocast(device().type, torch.bfloat16):
        y = module(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert module.bn.weight.grad.dtype is module.bn.running_mean.dtype is torch.float32
    assert (y.float() - Fused.forward(module, x)).abs().max() < 0.1


def test_func_transforms():
    module, x = Fused().double().eval(), make_map((4, C, 9, 7), torch.float64)
    parameters = {key: value.detach() for key, value in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {**parameters, **buffers}, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    module(x).square().sum().backward()
    assert all(torch.allclose(found[key], p.grad, rtol=1e-10) for key, p in module.named_parameters())
    each = torch.func.vmap(lambda one: loss(parameters, one[None]))(x)
    assert torch.allclose(each.sum(), loss(parameters, x))


def test_forward_mode_derivatives():
    tensors = [t.detach() for t in make_case((3, 4, 5, 3), torch.float64)]
    tangents = [torch.randn_like(t) for t in tensors]

    def run(*t: Tensor) -> Tensor:
        return OP(*t, True, 1e-5, "silu")[0]

    _, found = torch.func.jvp(run, tuple(tensors), tuple(tangents))
    step = 1e-6
    ahead, behind = (run(*(t + s * step * d for t, d in zip(tensors, tangents, strict=True))) for s in (1, -1))
    assert torch.allclose(found, (ahead - behind) / (2 * step), atol=1e-6)


@pytest.mark.cpu_only
@pytest.mark.parametrize("training", [False, True], ids=["affine", "batch"])
def test_other_devices_get_the_formula(training):
    x, weight, bias = make_case((3, 8, 5, 5), requires_grad=False)
    y, mean, var, inverse = redispatch("_bn_activation", x, weight, bias, training, 1e-5, "silu")
    ours = OP(x, weight, bias, training, 1e-5, "silu")
    for found, expected in zip((y, mean, var, inverse), ours, strict=True):
        assert_close(found, expected.double(), torch.float32, 75)


# ---- errors ----

ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "weight": (RuntimeError, r"expected weight of shape \[8\], got \[4\]", {"weight": torch.ones(4)}),
    "bias": (TypeError, "expected bias of dtype float32, got float64", {"bias": torch.ones(8).double()}),
    "activation": (ValueError, 'expected activation to be one of .*, got "elu"', {"activation": "elu"}),
    "rank": (RuntimeError, r"expected input of shape \[N, C, \*spatial\]", {"input": torch.ones(2, 8)}),
    "one value": (
        ValueError,
        r"expected more than one value per channel when training, got input of shape \[1, 8, 1, 1\]",
        {"input": torch.ones(1, 8, 1, 1)},
    ),
    "running_mean": (RuntimeError, r"expected running_mean of shape \[8\]", {"running_mean": torch.ones(4)}),
    "no statistics": (
        RuntimeError,
        "expected running_mean and running_var when training is False",
        {"training": False, "running_mean": None},
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, message, changed = ERRORS[name]
    running = {"running_mean": torch.zeros(8), "running_var": torch.ones(8), "num_batches_tracked": torch.tensor(0)}
    good = {"input": torch.randn(2, 8, 3, 3), "weight": None, "bias": None, **running}
    given = {**good, "training": True, "momentum": 0.1, "eps": 1e-5, "activation": "relu", **changed}
    for where in (device().type, "meta"):
        placed = {key: t.to(where) if isinstance(t, Tensor) else t for key, t in given.items()}
        with pytest.raises(kind, match=f"^bn_activation: {message}"):
            torch.ops.se_ext._bn_activation_running(**placed)
    assert torch.equal(running["running_mean"], torch.zeros(8))  # nothing was touched
    assert int(running["num_batches_tracked"]) == 0
