"""bn_squeeze_excite against the formula in float64: values, gradients, running statistics, second derivatives."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    DTYPES,
    HALF,
    Watch,
    assert_close,
    assert_moved_alike,
    check_against_float64,
    make_map,
    make_weights,
)
from torch import Tensor, nn

import se_ext
from se_ext import reference

SHAPES = [(3, 5, 9), (4, 24, 7, 7), (2, 19, 5, 6), (3, 72, 14, 14), (2, 9, 3, 4, 5), (6, 40, 1, 1), (1, 8, 4, 4)]
HIDDEN = 6
# What is compiled in for itself, and one pair that goes through the switch.
PAIRS = [
    ("identity", "identity"),
    ("identity", "relu"),
    ("identity", "silu"),
    ("relu", "identity"),
    ("silu", "identity"),
    ("hardswish", "identity"),
    ("gelu", "tanh"),
]


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    residual: bool = True,
    affine: bool = True,
    requires_grad: bool = True,
    weight_dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """input, bn_weight, bn_bias, w1, b1, w2, b2, residual"""
    weight_dtype = weight_dtype or dtype
    channels = shape[1]

    def vector(center: float) -> Tensor | None:
        drawn = center + torch.rand(channels, dtype=torch.float64) - 0.5
        return drawn.to(weight_dtype).requires_grad_(requires_grad) if affine else None

    x, shortcut = (make_map(shape, dtype, channels_last, requires_grad) for _ in range(2))
    weights = make_weights(channels, HIDDEN, weight_dtype, requires_grad=requires_grad)
    return [x, vector(1.0), vector(0.0), *weights, shortcut if residual else None]


def statistics(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(channels, dtype=torch.float64).to(dtype), (0.5 + torch.rand(channels)).to(dtype)


def apply(module: Any, tensors: tuple[Tensor | None, ...], **options: Any) -> Tensor:
    x, weight, bias, w1, b1, w2, b2, residual = tensors
    mean, var = options.pop("statistics", (None, None))
    if mean is not None and module is reference:
        mean, var = mean.double(), var.double()
    if module is reference and options.get("drop_scale") is not None:
        options["drop_scale"] = options["drop_scale"].double()
    return module.bn_squeeze_excite(
        x, weight, bias, mean, var, w1, b1, w2, b2, residual=residual, **{"training": True, **options}
    )


def check(tensors: list[Tensor | None], **options: Any) -> None:
    x = tensors[0]
    batch, channels = x.shape[:2]
    values = batch * x[0, 0].numel()
    check_against_float64(
        lambda *t: apply(se_ext, t, **options),
        lambda *t: apply(reference, t, **options),
        tensors,
        # A channel has N P values, forward and backward; a weight's gradient has N terms, each a sum over C.
        summed=(values + channels, values + batch * channels),
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_of_every_shape(pair, shape, channels_last):
    pre, post = pair
    check(make_case(shape, channels_last=channels_last), pre_activation=pre, post_activation=post)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("pre", "post"), itertools.product(ACTIVATIONS, ACTIVATIONS))
def test_every_pair_of_activations(pre, post, residual, training):
    options = {} if training else {"statistics": statistics(10, torch.float64)}
    check(
        make_case((3, 10, 5, 7), torch.float64, residual=residual),
        training=training,
        pre_activation=pre,
        post_activation=post,
        drop_scale=torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64),
        **options,
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("float_weights", [False, True], ids=["", "float32 weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_dtype(training, pair, dtype, float_weights, channels_last):
    weight_dtype = torch.float32 if float_weights and dtype in HALF else dtype
    options = {} if training else {"statistics": statistics(24, weight_dtype)}
    tensors = make_case((4, 24, 7, 7), dtype, channels_last, weight_dtype=weight_dtype)
    check(tensors, training=training, pre_activation=pair[0], post_activation=pair[1], **options)


@pytest.mark.parametrize("wanted", range(8))
def test_every_gradient_by_itself(wanted):
    tensors = make_case((3, 12, 5, 5), torch.float64, requires_grad=False)
    tensors[wanted].requires_grad_()
    for training, (pre, post) in itertools.product([False, True], [("identity", "relu"), ("silu", "identity")]):
        options = {} if training else {"statistics": statistics(12, torch.float64)}
        check(tensors, training=training, pre_activation=pre, post_activation=post, **options)


@pytest.mark.parametrize("pre", ["identity", "silu"])
def test_without_affine_parameters_and_biases(pre):
    tensors = make_case((3, 12, 5, 5), torch.float64, affine=False)
    tensors[4] = tensors[6] = None
    check(tensors, pre_activation=pre)
    check(tensors, pre_activation=pre, training=False, statistics=statistics(12, torch.float64))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pre", ["identity", "relu", "silu", "hardswish", "tanh"])
def test_bias_and_activation_before_the_block(pre, channels_last):
    """What is left of a batch norm that was folded into the convolution."""
    x, _, bias, *rest = make_case((3, 24, 7, 5), channels_last=channels_last)

    def run(module: Any, x: Tensor, bias: Tensor | None, *rest: Tensor | None) -> Tensor:
        *weights, residual = rest
        return module.squeeze_excite(x, *weights, residual=residual, pre_bias=bias, pre_activation=pre)

    for pre_bias in (bias, None):
        check_against_float64(
            lambda *t: run(se_ext, *t), lambda *t: run(reference, *t), [x, pre_bias, *rest], summed=(35, 3 * 35 + 24)
        )


def test_in_place_does_not_go_with_a_prologue():
    x, _, bias, *weights, _ = make_case((2, 8, 3, 3), requires_grad=False)
    with pytest.raises(ValueError, match="squeeze_excite: expected inplace=False with a pre_bias or a pre_activation"):
        se_ext.squeeze_excite(x, *weights, inplace=True, pre_bias=bias)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (4, 24, 7, 7)], ids=str)
def test_variance_around_a_large_mean(shape, channels_last):
    """Mean 1e4, standard deviation 1: the raw E[x²] - E[x]² would lose every digit in float32."""
    x = (1e4 + torch.randn(shape)).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    weights = make_weights(shape[1], HIDDEN)
    mean, var = torch.zeros(shape[1]), torch.zeros(shape[1])
    se_ext.bn_squeeze_excite(x, None, None, mean, var, *weights, training=True, momentum=1.0)
    exact = x.double()
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6)
    error = (var.double() / exact.var((0, 2, 3)) - 1).abs().max().item()
    assert error < 1e-3, error


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


def test_dropped_samples_are_their_shortcut():
    x, weight, bias, *weights, residual = make_case((4, 12, 5, 5), requires_grad=False)
    drop_scale = torch.tensor([0.0, 2.0, 0.0, 2.0])
    y = se_ext.bn_squeeze_excite(
        x, weight, bias, None, None, *weights, training=True, residual=residual, drop_scale=drop_scale
    )
    assert torch.equal(y[::2], residual[::2])
    assert not torch.allclose(y[1::2], residual[1::2])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("pair", [*PAIRS, ("tanh", "relu")], ids="-".join)
def test_second_derivatives(pair, residual, training):
    tensors = make_case((2, 3, 2, 3), torch.float64, residual=residual)
    given = [t for t in tensors if t is not None]
    options = {} if training else {"statistics": statistics(3, torch.float64)}

    def run(*present: Tensor) -> Tensor:
        rest = iter(present)
        filled = tuple(None if t is None else next(rest) for t in tensors)
        return apply(se_ext, filled, training=training, pre_activation=pair[0], post_activation=pair[1], **options)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_bitwise_the_same_for_any_number_of_threads(pair, channels_last, restore_threads):
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        tensors = make_case((7, 40, 14, 14), channels_last=channels_last)
        mean, var = torch.zeros(40), torch.ones(40)
        y = apply(se_ext, tuple(tensors), statistics=(mean, var), pre_activation=pair[0], post_activation=pair[1])
        results.append([y.detach(), mean, var, *torch.autograd.grad(y, tensors, torch.randn_like(y))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_in_evaluation_a_sample_does_not_depend_on_its_batch(pair, channels_last):
    tensors = make_case((9, 40, 7, 7), channels_last=channels_last, requires_grad=False)
    given = statistics(40, torch.float32)

    def run(tensors: list[Tensor | None]) -> Tensor:
        names = {"pre_activation": pair[0], "post_activation": pair[1]}
        return apply(se_ext, tuple(tensors), training=False, statistics=given, **names)

    whole = run(tensors)
    for n in range(9):
        one = [t[n : n + 1] if t is not None and t.shape[0] == 9 else t for t in tensors]
        assert torch.equal(run(one), whole[n : n + 1])


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty_maps(shape):
    mean, var = torch.zeros(8), torch.ones(8)
    tensors = make_case(shape)
    y = apply(se_ext, tuple(tensors), statistics=(mean, var))
    assert y.shape == shape
    y.sum().backward()
    assert tensors[0].grad.shape == shape
    assert torch.equal(mean, torch.zeros(8))
    assert torch.equal(var, torch.ones(8))


def test_strided_and_misaligned_inputs():
    x, weight, bias, *weights, residual = make_case((3, 12, 5, 8), torch.float64, requires_grad=False)
    shifted = torch.empty(x.numel() + 1, dtype=torch.float64)[1:].view(x.shape).copy_(x)
    for strange in (x.transpose(2, 3).contiguous().transpose(2, 3), x[:1].expand(3, -1, -1, -1), shifted):
        check([strange, weight, bias, *weights, residual], post_activation="relu")


def test_infinity_and_nan_stay_in_their_channel():
    x, weight, bias, *weights, _ = make_case((2, 6, 4, 4), requires_grad=False)
    x[0, 1, 0, 0], x[1, 4, 2, 2] = torch.inf, torch.nan
    _, mean, var = torch.ops.se_ext.bn_squeeze_excite(x, weight, bias, *weights, True)
    healthy = [0, 2, 3, 5]
    assert torch.allclose(mean[healthy], x.mean((0, 2, 3))[healthy], atol=1e-6)
    assert torch.isfinite(var).tolist() == [i in healthy for i in range(6)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [pytest.param((8, 256, 56, 56), marks=pytest.mark.large), (4, 2048, 7, 7)], ids=str)
def test_against_float64_on_real_shapes(shape, channels_last):
    tensors = make_case(shape, channels_last=channels_last, requires_grad=False)
    y = apply(se_ext, tuple(tensors), post_activation="relu")
    exact = apply(reference, tuple(t.double() for t in tensors), post_activation="relu")
    assert_close(y, exact, torch.float32, shape[0] * shape[2] * shape[3])


@pytest.mark.parametrize("pre", ["identity", "silu"])
def test_a_shortcut_s_gradient_without_an_activation(pre):
    """Autograd hands the gradient itself on and never asks for it; the op gives it all the same."""
    x, weight, bias, *w, shortcut = make_case((3, 8, 5, 4), requires_grad=False)
    names = (pre, "relu", "sigmoid")
    _, mean, _, *small = torch.ops.se_ext._bn_squeeze_excite_forward(
        x, weight, bias, *w, True, 1e-5, *names, shortcut, "identity", None
    )
    grad = torch.randn_like(x)
    given = (grad, x, weight, bias, *w, mean, *small, None, None, True, 1e-5, *names, "identity")
    all_but_one = torch.ops.se_ext._bn_squeeze_excite_backward(*given, [True] * 7 + [False])
    *others, of_shortcut = torch.ops.se_ext._bn_squeeze_excite_backward(*given, [True] * 8)
    assert torch.equal(of_shortcut, grad)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(others, all_but_one, strict=False))


@pytest.mark.large
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(8, 256, 56, 56), (8, 128, 55, 57)], ids=str)
def test_gradients_written_past_the_caches(shape, channels_last):
    """Of maps that exceed the last cache together, bit for bit those of one sample, which does not."""
    x, *vectors, shortcut = make_case(shape, channels_last=channels_last, requires_grad=False)
    running, grad = statistics(shape[1], torch.float32), torch.randn_like(x)

    def gradients(samples: slice) -> tuple[Tensor, ...]:
        leaves = [t[samples].detach().requires_grad_() for t in (x, shortcut)]
        tensors = (leaves[0], *vectors, leaves[1])
        y = apply(se_ext, tensors, training=False, statistics=running, post_activation="relu")
        return torch.autograd.grad(y, leaves, grad[samples])

    for found, alone in zip(gradients(slice(None)), gradients(slice(5, 6)), strict=True):
        assert torch.equal(found[5:6], alone)
