"""What holds for every op holds for bn_squeeze_excite: memory, errors, compile, export, TorchScript, autocast, func."""

from __future__ import annotations

import io
from typing import Optional

import pytest
import torch
from helpers import assert_moved_alike, device, make_map, make_weights, saved_maps
from test_memory import full_and_small
from torch import Tensor, nn

import se_ext

# ruff: noqa: UP045
C, M = 16, 4
OP = torch.ops.se_ext.bn_squeeze_excite
TAILS = {
    "SE-ResNet": {"post_activation": nn.ReLU},
    "EfficientNet": {"pre_activation": nn.SiLU},
}


@pytest.fixture(params=TAILS)
def tail(request) -> se_ext.BatchNormSqueezeExcitation:
    module = se_ext.BatchNormSqueezeExcitation(C, M, **TAILS[request.param])
    nn.init.uniform_(module.bn.weight, 0.5, 1.0)
    nn.init.normal_(module.bn.bias)
    return module


def arguments(tail: se_ext.BatchNormSqueezeExcitation, channels_last: bool = False) -> list[Tensor]:
    """The map; where the tail ends in a ReLU, the shortcut too."""
    count = 2 if tail.post_activation == "relu" else 1
    return [make_map((4, C, 9, 7), channels_last=channels_last, requires_grad=True) for _ in range(count)]


# ---- memory ----


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_a_training_step_saves_the_map_alone(tail, channels_last):
    """And y, where the ReLU's mask needs it: eager saves three to five full-size tensors."""
    given = arguments(tail, channels_last)
    y, saved = saved_maps(lambda: tail(*given), given[0].numel())
    expected = [given[0].data_ptr()] + ([y.data_ptr()] if tail.post_activation == "relu" else [])
    assert sorted(saved) == sorted(expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_a_training_step_allocates_results_and_gradients(tail, channels_last):
    given = [make_map((8, C, 56, 56), channels_last=channels_last, requires_grad=True) for _ in arguments(tail)]
    grad = make_map((8, C, 56, 56), channels_last=channels_last)

    def step():
        y = tail(*given)
        return y, torch.autograd.grad(y, [*given, *tail.parameters()], grad)

    full, small = full_and_small(step, given[0])
    assert full == [1] * (1 + len(given))
    assert small < given[0].nbytes / 8


# ---- torch.compile, torch.export, TorchScript ----


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_is_one_graph(tail, train, dynamic):
    """With eager's results, to the bit; the running statistics, which eager updates in a loop of its own and the graph
    by ATen's operators, to a rounding."""
    tail.train(train)
    state = {key: value.clone() for key, value in tail.state_dict().items()}
    compiled = torch.compile(tail, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((4, C, 9, 7), (6, C, 5, 8)) if dynamic else ((4, C, 9, 7),):
        given = [make_map(shape, requires_grad=True) for _ in arguments(tail)]
        found = []
        for form in (tail, compiled):
            tail.load_state_dict(state)
            y = form(*given)
            grads = torch.autograd.grad(y.square().sum(), [*given, *tail.parameters()])
            found.append(([y.detach(), *grads], {name: b.clone() for name, b in tail.named_buffers()}))
        (eager, eager_buffers), (graph, graph_buffers) = found
        assert all(map(torch.equal, eager, graph))
        for name, ours in eager_buffers.items():
            assert_moved_alike(state[name], ours, graph_buffers[name])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_export(tail, train):
    tail.train(train)
    given = tuple(t.detach() for t in arguments(tail))
    batch = torch.export.Dim("batch", min=2, max=64)
    names = ("input", "residual")[: len(given)]
    program = torch.export.export(tail, given, dynamic_shapes={name: {0: batch} for name in names}, strict=True)
    more = tuple(torch.cat([t, t]) for t in given)
    state = {key: value.clone() for key, value in tail.state_dict().items()}
    assert torch.equal(program.module()(*more), tail(*more))
    tail.load_state_dict(state)
    assert sum("bn_squeeze_excite" in str(node.target) for node in program.graph.nodes) == 1


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_torchscript(tail, train):
    tail.train(train)
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


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch_statistics", [False, True], ids=["affine", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pre", ["identity", "silu"])
def test_opcheck(pre, dtype, batch_statistics, channels_last):
    def vector() -> Tensor:
        return torch.rand(8).to(dtype).requires_grad_()

    x, r = (make_map((3, 8, 5, 4), dtype, channels_last, requires_grad=True) for _ in range(2))
    w1, b1, w2, b2 = make_weights(8, M, dtype, requires_grad=True)
    drop = torch.tensor([0.0, 2.0, 2.0])
    args = (x, vector(), vector(), w1, b1, w2, b2, batch_statistics, 1e-5, pre, "relu", "sigmoid", r, "relu", drop)
    torch.library.opcheck(OP.default, args)
    torch.library.opcheck(OP.default, (x, None, None, w1, None, w2, None, batch_statistics))


# ---- autocast, torch.func, forward-mode AD ----


def test_autocast(tail):
    tail.double().float()
    given = arguments(tail)
    with torch.autocast(device().type, torch.bfloat16):
        y = tail(*given)
    assert y.dtype is torch.bfloat16
    torch.autograd.backward(y, torch.ones_like(y))
    assert tail.bn.weight.grad.dtype is torch.float32
    assert tail.bn.running_mean.dtype is torch.float32
    with torch.no_grad():
        tail.load_state_dict(tail.state_dict())
        exact = tail(*given)
    assert (y.float() - exact).abs().max() < 0.1


def test_func_transforms(tail):
    tail.double().eval()
    parameters = {key: value.detach() for key, value in tail.named_parameters()}
    buffers = dict(tail.named_buffers())
    given = [t.detach().double() for t in arguments(tail)]

    def loss(parameters, *given):
        return torch.func.functional_call(tail, {**parameters, **buffers}, given).square().sum()

    found = torch.func.grad(loss)(parameters, *given)
    tail.zero_grad()
    tail(*given).square().sum().backward()
    assert all(torch.allclose(found[key], p.grad, rtol=1e-8, atol=1e-10) for key, p in tail.named_parameters())
    each = torch.func.vmap(lambda *one: loss(parameters, *(t[None] for t in one)))(*given)
    assert torch.allclose(each.sum(), loss(parameters, *given))


def test_forward_mode_derivatives(tail):
    tail.double()
    given = [t.detach().double() for t in arguments(tail)]
    tangents = [torch.randn_like(t) for t in given]
    state = {key: value.clone() for key, value in tail.state_dict().items()}

    def forward(*t: Tensor) -> Tensor:
        return OP(t[0], *weights_of(tail), *options_of(tail, t))[0]

    _, found = torch.func.jvp(forward, tuple(given), tuple(tangents))
    step = 1e-6
    ahead, behind = (tail(*(t + sign * step * d for t, d in zip(given, tangents, strict=True))) for sign in (1, -1))
    tail.load_state_dict(state)
    assert torch.allclose(found, (ahead - behind) / (2 * step), atol=1e-5)


def weights_of(tail: se_ext.BatchNormSqueezeExcitation) -> list[Tensor]:
    se = tail.se
    return [tail.bn.weight, tail.bn.bias, se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias]


def options_of(tail: se_ext.BatchNormSqueezeExcitation, given: tuple[Tensor, ...]) -> tuple[object, ...]:
    residual = given[1] if len(given) > 1 else None
    return (True, 1e-5, tail.pre_activation, "relu", "sigmoid", residual, tail.post_activation)


# ---- errors ----

# What is changed in a good call, by a map x and a vector v.
ERRORS = {
    "bn_weight of shape": (
        RuntimeError,
        r"expected bn_weight of shape \[8\], got \[4\]",
        lambda x, v: {"bn_weight": v[:4]},
    ),
    "bn_bias of shape": (
        RuntimeError,
        r"expected bn_bias of shape \[8\], got \[8, 1\]",
        lambda x, v: {"bn_bias": v[:, None]},
    ),
    "bn_weight of dtype": (
        TypeError,
        "expected bn_weight of dtype float32, got float64",
        lambda x, v: {"bn_weight": v.double()},
    ),
    "drop_scale of shape": (
        RuntimeError,
        r"expected drop_scale of shape \[2\], got \[8\]",
        lambda x, v: {"drop_scale": v},
    ),
    "drop_scale that requires grad": (
        RuntimeError,
        "expected drop_scale that does not require grad",
        lambda x, v: {"drop_scale": torch.rand(2, requires_grad=True)},
    ),
    "pre_activation": (
        ValueError,
        'expected pre_activation to be one of .*, got "elu"',
        lambda x, v: {"pre_activation": "elu"},
    ),
    "residual": (
        RuntimeError,
        r"expected residual of shape \[2, 8, 3, 3\], got \[2, 8\]",
        lambda x, v: {"residual": x[..., 0, 0]},
    ),
    "one value": (
        ValueError,
        r"expected more than one value per channel when training, got input of shape \[1, 8, 1, 1\]",
        lambda x, v: {"input": x[:1, :, :1, :1]},
    ),
    "running_mean": (
        RuntimeError,
        r"expected running_mean of shape \[8\], got \[4\]",
        lambda x, v: {"running_mean": v[:4]},
    ),
    "running_var": (
        RuntimeError,
        r"expected running_var of shape \[8\], got \[\]",
        lambda x, v: {"running_var": v[0]},
    ),
    "running_var of integers": (
        TypeError,
        "expected running_var of dtype float32, float64, bfloat16 or float16, got int64",
        lambda x, v: {"running_var": v.long()},
    ),
    "no statistics": (
        RuntimeError,
        "expected running_mean and running_var when training is False",
        lambda x, v: {"training": False, "running_mean": None, "running_var": None},
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, message, change = ERRORS[name]
    changed = change(torch.randn(2, 8, 3, 3), torch.rand(8))
    weights = [torch.randn(4, 8), None, torch.randn(8, 4), None]
    names = ("input", "bn_weight", "bn_bias", "running_mean", "running_var", "w1", "b1", "w2", "b2")
    running = (torch.zeros(8), torch.ones(8))
    good = (torch.randn(2, 8, 3, 3), None, None, *running, *weights)
    given = dict(zip(names, good, strict=True)) | {"training": True} | changed
    with pytest.raises(kind, match=f"^bn_squeeze_excite: {message}"):
        se_ext.bn_squeeze_excite(**given)
    meta = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in given.items()}
    with pytest.raises(kind, match=f"^bn_squeeze_excite: {message}"):
        se_ext.bn_squeeze_excite(**meta)
    assert torch.equal(running[0], torch.zeros(8))  # nothing was touched
    assert torch.equal(running[1], torch.ones(8))


def test_a_statistic_elsewhere_is_an_error_before_anything_is_touched():
    tail = se_ext.BatchNormSqueezeExcitation(8, 4)
    tail.bn.running_var = tail.bn.running_var.to("meta")
    with pytest.raises(RuntimeError, match=r"^bn_squeeze_excite: expected running_var on device cpu, got meta"):
        tail(torch.randn(2, 8, 3, 3))
    assert int(tail.bn.num_batches_tracked) == 0
    assert torch.equal(tail.bn.running_mean, torch.zeros(8))
