"""Means beyond the half types' range, long sums, the half types' rounding, NaN and Inf, the activations' accuracy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import ACTIVATIONS, DTYPES, GATES, HALF, assert_close, make_map, make_weights, memory_format, one_thread
from ops import BY_NAME, Options, cases, layouts

import se_ext
from se_ext import reference

HALF_TYPES = sorted(HALF, key=str)
NAN, INF = float("nan"), float("inf")
EPS = torch.finfo(torch.float32).eps


# ---- sums ----


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_mean_whose_sum_overflows_float16(dtype, channels_last):
    """4096 values near 1000: the sum is 63 times float16's largest number."""
    x = (torch.randn(2, 5, 64, 64) + 1000).to(dtype).contiguous(memory_format=memory_format(4, channels_last))
    z = se_ext.squeeze(x)
    assert x.double().sum(dim=(2, 3)).min() > 60 * torch.finfo(torch.float16).max
    assert_close(z, x.double().mean(dim=(2, 3)), dtype, 4096)

    weights = make_weights(5, 3, dtype)
    weights[0] /= 1000
    exact = reference.squeeze_excite(x.double(), *(w.double() for w in weights))
    assert_close(se_ext.squeeze_excite(x, *weights), exact, dtype, 4096 + 5 + 3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_whose_sum_overflows_float16(channels_last):
    """Σ g ⊙ x passes 65504 on its way to gradients that do not."""
    x = torch.full((1, 4, 64, 64), 30.0, dtype=torch.float16).contiguous(memory_format=memory_format(4, channels_last))
    x.requires_grad_()
    scale = torch.rand(1, 4, requires_grad=True)  # float32: its gradient may be large
    y = se_ext.rescale(x, scale)
    (grad,) = torch.autograd.grad(y, scale, torch.ones_like(y))
    assert_close(grad, torch.full((1, 4), 30.0 * 4096, dtype=torch.float64), torch.float32, 4096)

    weights = make_weights(4, 2, torch.float16)
    weights[2] *= 1e-3
    weights[3][:] = -9  # the gate is nearly shut: its slope, 1e-4, brings the sums back into range
    exact_x = x.detach().double().requires_grad_()
    exact = reference.squeeze_excite(exact_x, *(w.double() for w in weights))
    (exact_grad,) = torch.autograd.grad(exact, exact_x, torch.ones_like(exact))
    (grad,) = torch.autograd.grad(y := se_ext.squeeze_excite(x, *weights), x, torch.ones_like(y))
    assert_close(grad, exact_grad, torch.float16, 4096)


@pytest.mark.large
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("points", [10**6, 2**25])
def test_long_sums(points, channels_last):
    """2²⁵ values around 1 in float32: one running sum would stop growing at 2²⁴."""
    x = torch.rand(1, 1 if points > 10**6 else 3, points, 1).add_(0.5)
    x = torch.cat([x, x], dim=1).contiguous(memory_format=memory_format(4, channels_last))
    with one_thread():
        exact = x.double().mean(dim=(2, 3))
    assert_close(se_ext.squeeze(x), exact, torch.float32, points)
    scale = torch.ones(x.shape[:2], requires_grad=True)
    (grad,) = torch.autograd.grad(se_ext.rescale(x, scale).sum(), scale)
    assert_close(grad, exact * points, torch.float32, points)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("spatial", [(7, 7), (56, 56), pytest.param((224, 224), marks=pytest.mark.large)], ids=str)
def test_mean_far_from_zero(spatial, channels_last):
    """Mean 10⁴, deviation 1: the mean is right to float32, not only to a part of the deviation."""
    x = (torch.randn(2, 37, *spatial) + 1e4).contiguous(memory_format=memory_format(4, channels_last))
    assert_close(se_ext.squeeze(x), x.double().mean(dim=(2, 3)), torch.float32, spatial[0] * spatial[1])


@layouts
@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (4, 24, 7, 7)], ids=str)
@cases(lambda case: case.name in ("bn_squeeze_excite", "_bn_activation"))
def test_variance_around_a_large_mean(case, shape, channels_last):
    """Mean 1e4, standard deviation 1: the raw E[x²] - E[x]² would lose every digit in float32."""
    arguments = case.make(Options(shape, 6, channels_last=channels_last))
    x = (1e4 + torch.randn(shape)).contiguous(memory_format=memory_format(4, channels_last))
    _, mean, var, *_ = case.run(arguments | {"input": x})
    exact = x.double()
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6)
    error = (var.double() / exact.var((0, 2, 3), correction=0) - 1).abs().max().item()
    assert error < 1e-3, error


@pytest.mark.large
@layouts
def test_variance_of_many_points(channels_last):
    """2²⁴ points a channel in float32: a tile that grows with the map would sum up too many, one after the other."""
    x = (torch.randn(1, 3, 4096, 4096) + 2).contiguous(memory_format=memory_format(4, channels_last))
    case = BY_NAME["_bn_activation"]
    _, mean, var, *_ = case.run(case.make(Options((1, 3, 2, 2), residual=False)) | {"input": x})
    with one_thread():
        exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    for found, expected in zip((var, mean), exact, strict=True):
        assert (found.double() / expected - 1).abs().max().item() < 1e-5


# ---- conversions ----


def all_bit_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def as_bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row", [1, 5, 16, 4096], ids=lambda n: f"rows of {n}")
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_half_comes_through_unchanged(dtype, row, channels_last):
    """Load, times 1, store: every bit pattern in body and tail, subnormals, -0 and Inf; a NaN stays a NaN."""
    values = all_bit_patterns(dtype)
    rows = -(-values.numel() // row)
    shape = (1, row, rows, 1) if channels_last else (1, rows, row, 1)
    x = torch.cat([values, values.new_zeros(rows * row - values.numel())])
    x = x.view(1, rows, row, 1).transpose(1, 2) if channels_last else x.view(shape)
    assert x.is_contiguous(memory_format=memory_format(4, channels_last))
    y = se_ext.rescale(x, torch.ones(shape[:2]))
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(as_bits(y)[~y.isnan()], as_bits(x)[~x.isnan()])


@pytest.mark.large
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row", [15, 16, 128], ids=lambda n: f"rows of {n}")
def test_results_are_rounded_like_torch_rounds(dtype, row):
    """float32 products to the half type, bit by bit: ties to even, overflow to Inf, subnormals. In rows without, with a
    few and with many whole registers, which are rounded two at a time."""
    scale = torch.cat([torch.randn(30), 2.0 ** torch.randint(-30, 30, (20,)), torch.tensor([1 / 3, 3e-8, 1e38, 1.5])])
    scale = scale * torch.tensor([1.0, -1.0])[torch.arange(scale.numel()) % 2]
    values = all_bit_patterns(dtype)
    values = values[: values.numel() // row * row].view(-1, row)
    x = values[None].expand(scale.numel(), *values.shape).contiguous()
    y = se_ext.rescale(x, scale[:, None].expand(x.shape[:2]))
    expected = (x.float() * scale[:, None, None]).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(as_bits(y)[~y.isnan()], as_bits(expected)[~expected.isnan()])
    smallest_normal = torch.finfo(dtype).tiny
    assert expected.isinf().sum() > 1000
    assert ((expected != 0) & (expected.abs() < smallest_normal)).sum() > 1000


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("row", [3, 16, 128], ids=lambda n: f"rows of {n}")
def test_a_nan_of_any_payload_stays_one(dtype, row):
    """Rounding adds to the bits: a NaN of all ones, as uninitialised memory may hold, must not carry into a number."""
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    scale = payloads.view(torch.float32)[None]
    assert scale.isnan().all()
    y = se_ext.rescale(torch.ones(1, scale.numel(), row, dtype=dtype), scale)
    assert y.isnan().all()


# ---- NaN and Inf ----

POISONS = [NAN, INF, -INF]


def signature(t: torch.Tensor) -> torch.Tensor:
    """0 where finite, else which of NaN, Inf, -Inf."""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


def assert_same_signature(fused, plain, tensors, grad, what, gradients=True) -> None:
    """Non-finite where the formula in float64 is, and in the same way.

    In float64 because torch's float32 and bfloat16 gelu, oneDNN's, makes a NaN of Inf.
    """
    results = []
    for function, widen in ((fused, torch.Tensor.clone), (plain, torch.Tensor.double)):
        leaves = [None if t is None else widen(t).requires_grad_() for t in tensors]
        with one_thread():
            y = function(*leaves)
            results.append([y])
            if gradients:
                results[-1] += torch.autograd.grad(y, [t for t in leaves if t is not None], widen(grad))
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        name = "value" if i == 0 else f"gradient {i - 1}"
        wrong = (signature(actual) != signature(expected)).nonzero()
        assert wrong.numel() == 0, (
            f"{what}: {name} at {wrong[0].tolist()} is {actual[tuple(wrong[0])]}, eager {expected[tuple(wrong[0])]}"
        )


@pytest.fixture
def torch_hardsigmoid(monkeypatch) -> None:
    """The reference's hardsigmoid has no one slope at a NaN (hardtanh's body and tail differ); torch's own has."""
    monkeypatch.setitem(reference.GATES, "hardsigmoid", torch.nn.functional.hardsigmoid)


def positions(points: int) -> tuple[int, int]:
    """In the body of a row, and in its tail."""
    return 2, points - 1


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("post", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_poison_in_rescale(dtype, channels_last, post, poison):
    """In x, in scale, in residual and in dL/dy, value and gradients are non-finite where the eager formula's are.

    At a NaN torch's hardswish has the slope NaN in a vector's body and 1 in its tail: either is right.
    """
    shape = (2, 35, 5, 7)
    for with_residual in (False, True):
        for where in ("x", "scale", "residual", "grad"):
            if where == "residual" and not with_residual:
                continue
            for c, p in ((3, positions(35)[0]), (34, positions(35)[1])):
                maps = {name: make_map(shape, dtype, channels_last) for name in ("x", "residual", "grad")}
                maps["scale"] = torch.randn(2, 35).to(dtype)
                target = maps[where]
                target[(1, c) if where == "scale" else (1, c, p // 7, p % 7)] = poison
                assert_same_signature(
                    partial(se_ext.rescale, post_activation=post),
                    partial(reference.rescale, post_activation=post),
                    [maps["x"], maps["scale"], maps["residual"] if with_residual else None],
                    maps["grad"],
                    f"{where}, residual {with_residual}",
                    gradients=post != "hardswish" or where == "grad",
                )


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_poison_in_excite(activation, gate, poison, torch_hardsigmoid):
    """At a NaN torch's hardswish has two slopes; which one depends on the CPU (see test_poison_in_rescale)."""
    for where in range(6):
        tensors = [torch.randn(3, 19), *make_weights(19, 5), torch.randn(3, 19)]
        tensors[where].view(-1)[-1] = poison
        assert_same_signature(
            partial(se_ext.excite, activation=activation, gate=gate),
            partial(reference.excite, activation=activation, gate=gate),
            tensors[:5],
            tensors[5],
            ("z", "w1", "b1", "w2", "b2", "grad")[where],
            gradients=activation != "hardswish" or where == 5,
        )


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_poison_in_squeeze(dtype, channels_last, poison):
    for c, p in ((3, positions(35)[0]), (34, positions(35)[1])):
        x = make_map((2, 35, 5, 7), dtype, channels_last)
        x[1, c, p // 7, p % 7] = poison
        assert torch.equal(signature(se_ext.squeeze(x)), signature(x.mean(dim=(2, 3))))
    x[1, c, 0, 0] = -INF  # Inf - Inf
    assert torch.equal(signature(se_ext.squeeze(x)), signature(x.mean(dim=(2, 3))))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_poison_in_squeeze_excite(channels_last, activation, poison, torch_hardsigmoid):
    """A poisoned sample spoils itself, the gradients of the weights, and no other sample."""
    shape = (5, 19, 5, 7)
    index = ACTIVATIONS.index(activation)
    gate, post = GATES[index % len(GATES)], ACTIVATIONS[(index * 2 + 1) % len(ACTIVATIONS)]
    for where in ("x", "residual", "grad"):
        for p in positions(35):
            maps = {name: make_map(shape, channels_last=channels_last) for name in ("x", "residual", "grad")}
            maps[where][1, 18, p // 7, p % 7] = poison
            weights = make_weights(19, 5)
            assert_same_signature(
                lambda x, r, *w: se_ext.squeeze_excite(x, *w, activation, gate, r, post),
                lambda x, r, *w: reference.squeeze_excite(x, *w, activation, gate, r, post),
                [maps["x"], maps["residual"], *weights],
                maps["grad"],
                f"{where}, {gate}, {post}",
                gradients=post != "hardswish" or where == "grad",
            )
            y = se_ext.squeeze_excite(maps["x"], *weights, activation, gate, maps["residual"], post)
            assert y[[0, 2, 3, 4]].isfinite().all()


@layouts
@cases(lambda case: case.name in ("bn_squeeze_excite", "_bn_activation"))
def test_infinity_and_nan_stay_in_their_channel(case, channels_last):
    """Of a batch's statistics, and of y where no excitation mixes the channels."""
    arguments = case.make(Options((2, 6, 4, 4), channels_last=channels_last, post_activation="relu"))
    x = arguments["input"]
    x[0, 1, 0, 0], x[1, 4, 2, 2] = INF, NAN
    y, mean, var, *_ = case.run(arguments)
    healthy = torch.tensor([i in (0, 2, 3, 5) for i in range(6)])
    assert torch.allclose(mean[healthy], x.mean((0, 2, 3))[healthy], atol=1e-6)
    assert torch.equal(var.isfinite(), healthy)
    if case.name == "_bn_activation":
        assert torch.equal(y.isfinite().all(0).flatten(1).all(1), healthy)
        assert torch.equal(y.isnan(), case.exact(arguments)[0].isnan())


# ---- the activations ----


def sweep() -> torch.Tensor:
    """[-90, 90] evenly, both signs of every magnitude from 1e-37, and the edges of the float32 formulas."""
    magnitudes = torch.logspace(-37, 1.9, 200_000, dtype=torch.float64)
    special = torch.tensor([0.0, 0.625, 0.6249999, 3.0, 6.0, 9.01, 16.6, 88.72283, 88.72284, 87.33655, 89.0, 90.0])
    return torch.cat([torch.linspace(-90, 90, 1_000_001), magnitudes, -magnitudes, special, -special]).float()


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    return se_ext.rescale(x[None, None], torch.ones(1, 1, dtype=x.dtype), None, name)[0, 0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_accuracy_of_activations(name):
    """Within 4 ulp of the exact value. Below exp's range (x < -88.7) what underflows may read as 0; gelu: absolute."""
    x = sweep()
    exact = reference.ACTIVATIONS[name](x.double())
    error = (apply(name, x).double() - exact).abs()
    if name == "gelu":
        allowed = 2e-7 * x.double().abs().clamp_min(1)
    else:
        allowed = (
            4 * EPS * exact.abs().clamp_min(torch.finfo(torch.float32).tiny)
            + (x < -88.7) * 90 * torch.finfo(torch.float32).tiny
        )
    worst = (error / allowed.clamp_min(1e-300)).argmax()
    assert (error <= allowed).all(), f"{name}({x[worst]}) = {exact[worst]}, off by {error[worst]}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_accuracy_of_activations_in_float64(name):
    """Against torch in float64, itself within an ulp or two."""
    x = torch.cat([sweep().double(), torch.linspace(-700, 700, 10_001, dtype=torch.float64)])
    exact = reference.ACTIVATIONS[name](x)
    error = (apply(name, x) - exact).abs()
    eps = torch.finfo(torch.float64).eps
    allowed = 8 * eps * (x.abs().clamp_min(1) if name == "gelu" else exact.abs())
    worst = (error / allowed.clamp_min(1e-300)).argmax()
    assert (error <= allowed).all(), f"{name}({x[worst]}) = {exact[worst]}, off by {error[worst]}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_accuracy_of_slopes(name):
    """The slope over the sweep: 8 float32 roundings of its largest value, with the sum's input saved or its output."""
    x = sweep()
    exact_x = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.ACTIVATIONS[name](exact_x).sum(), exact_x)
    for residual in (None, torch.zeros_like(x)[None, None]):
        leaf = x[None, None].requires_grad_()
        y = se_ext.rescale(leaf, torch.ones(1, 1), residual, name)
        assert_close(torch.autograd.grad(y.sum(), leaf)[0][0, 0], exact, torch.float32)


@pytest.mark.parametrize("gate", GATES)
def test_accuracy_of_gates(gate):
    """Through excite, with W1 = W2 = 1: one hidden unit, one channel, a million samples."""
    z = sweep()[::10, None]
    one = torch.ones(1, 1)
    exact = reference.GATES[gate](z.double())
    error = (se_ext.excite(z, one, None, one, None, "identity", gate).double() - exact).abs()
    # v + 3 rounds before it is clamped: hardsigmoid is exact to the rounding of 3.
    allowed = 4 * EPS * (exact.abs() + (gate == "hardsigmoid")) + (z < -88.7) * 2 * torch.finfo(torch.float32).tiny
    assert (error <= allowed).all()
