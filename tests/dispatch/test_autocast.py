"""Autocast: the map runs in the autocast dtype, the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same_bits, device, make_map, make_weights
from ops import OpCase, Options, cases, differentiable, in_float64
from torch import Tensor, nn

import se_ext
from se_ext import SqueezeExcitation, reference

C, M = 16, 4
SHAPE = (3, C, 5, 4)
P = 20
HALF_TYPES = [torch.bfloat16, torch.float16]


def autocast(dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device().type, dtype=dtype, enabled=enabled)


def double(t: Any) -> Any:
    return t.detach().double() if isinstance(t, Tensor) else t


OPTIONS = Options(SHAPE, M, activation="silu", pre_activation="silu")
CAST = ("input", "residual", "z")  # what runs in the autocast dtype; everything else stays as it is


def cast(arguments: dict[str, Any], dtype: torch.dtype, names: tuple[str, ...] = CAST) -> dict[str, Any]:
    """Copies, with the named ones in that dtype."""
    return {
        k: t.detach().to(dtype if k in names else t.dtype, copy=True) if isinstance(t, Tensor) else t
        for k, t in arguments.items()
    }


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@cases(differentiable)
def test_the_map_is_cast_and_the_weights_are_not(case: OpCase, dtype: torch.dtype, batch_statistics: bool) -> None:
    """Bitwise the op on a cast map beside float32 weights, which is close to the formula on the cast map."""
    options = replace(OPTIONS, batch_statistics=batch_statistics)
    arguments = case.make(options)
    given = cast(arguments, dtype)
    with autocast(dtype):
        found = case.run(cast(arguments, torch.float32))
    assert found[0].dtype is dtype
    assert_same_bits(found, case.run(given))
    (y, *_) = case.exact(in_float64(cast(arguments, dtype)))
    assert_close(found[0], y, dtype, case.summed(options)[0])
    # That the weights were not cast shows: with cast ones the bits are others.
    if "w1" in given:
        rounded = cast(arguments, dtype) | {k: arguments[k].to(dtype).float() for k in ("w1", "b1", "w2", "b2")}
        assert not torch.equal(found[0], case.run(rounded)[0])


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("map_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@cases(differentiable)
def test_gradients_have_the_dtype_of_what_was_given(case: OpCase, map_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """And the values of those of the op on the cast map."""
    arguments = case.make(replace(OPTIONS, dtype=map_dtype, weight_dtype=torch.float32, requires_grad=True))
    given = cast(arguments, dtype)
    for name in case.leaves(arguments):
        given[name].requires_grad_()
    with autocast(dtype):
        y = case.run(arguments)[0]
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(case.run(given)[0], list(case.leaves(given).values()), grad)
    ours = torch.autograd.grad(y, list(case.leaves(arguments).values()), grad)
    for (name, leaf), a, b in zip(case.leaves(arguments).items(), ours, expected, strict=True):
        assert a.dtype is leaf.dtype, name
        assert torch.equal(a, b.to(leaf.dtype)), name


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("map_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_leaves_float32_gradients(dtype: torch.dtype, map_dtype: torch.dtype) -> None:
    """The gradients are those of the cast map, and arrive in the dtype of what was given."""
    se = SqueezeExcitation(C, M, nn.SiLU, post_activation=nn.ReLU)
    x, r = (make_map(SHAPE, map_dtype, requires_grad=True) for _ in range(2))
    with autocast(dtype):
        y = se(x, r)
    assert y.dtype is dtype
    grad = torch.randn(SHAPE).to(dtype)
    y.backward(grad)
    assert x.grad.dtype is r.grad.dtype is map_dtype
    assert all(p.grad.dtype is torch.float32 for p in se.parameters())

    exact = [x.detach().to(dtype).double().requires_grad_(), r.detach().to(dtype).double().requires_grad_()]
    w = [double(p).requires_grad_() for p in (se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias)]
    y64 = reference.squeeze_excite(exact[0], *w, "silu", "sigmoid", exact[1])
    y64 = torch.where(y > 0, y64, 0.0)  # the mask of the rounded result: its kink is not this test's subject
    y64.backward(grad.double())
    assert_close(y.detach(), y64.detach(), dtype, P + C)
    wider = max(dtype, map_dtype, key=lambda t: torch.finfo(t).eps)
    for ours, theirs in zip((x, r), exact, strict=True):
        assert_close(ours.grad, theirs.grad, wider, 3 * P)
    for p, q in zip((se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias), w, strict=True):
        assert_close(p.grad, q.grad, torch.float32, 3 * P * C)


@cases(differentiable)
def test_float64_stays_float64(case: OpCase) -> None:
    arguments = case.make(replace(OPTIONS, dtype=torch.float64))
    expected = case.run(cast(arguments, torch.float64))
    with autocast(torch.bfloat16):
        found = case.run(cast(arguments, torch.float64))
    assert found[0].dtype is torch.float64
    assert_same_bits(found, expected)


def test_a_disabled_region_inside() -> None:
    se, x = SqueezeExcitation(C, M), make_map(SHAPE)
    plain = se(x)
    with autocast(torch.bfloat16):
        assert se(x).dtype is torch.bfloat16
        with autocast(torch.bfloat16, enabled=False):
            inside = se(x)
        assert se(x).dtype is torch.bfloat16
        with autocast(torch.float16):
            assert se(x).dtype is torch.float16
        assert se(x).dtype is torch.bfloat16
    assert inside.dtype is torch.float32
    assert torch.equal(inside, plain)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@cases(lambda case: "residual" in case.differentiable)
def test_a_residual_of_another_dtype_is_cast_along(case: OpCase, residual_dtype: torch.dtype) -> None:
    """A convolution's output is bfloat16 under autocast where the shortcut may still be float32."""
    arguments = case.make(replace(OPTIONS, dtype=torch.bfloat16, weight_dtype=torch.float32))
    arguments["residual"] = arguments["residual"].to(residual_dtype)
    given = cast(arguments, torch.bfloat16)
    with autocast(torch.bfloat16):
        found = case.run(cast(arguments, torch.bfloat16, names=()))
    assert_same_bits(found, case.run(given))


@pytest.mark.parametrize("weights", HALF_TYPES, ids=str)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@cases(differentiable)
def test_weights_of_a_half_type_run_in_the_autocast_dtype(
    case: OpCase, dtype: torch.dtype, weights: torch.dtype
) -> None:
    """The kernels refuse weights of the other half type: autocast casts them; their gradients come back in theirs."""
    arguments = case.make(replace(OPTIONS, weight_dtype=weights, requires_grad=True))
    statistics = ("running_mean", "running_var")
    given = cast(arguments, dtype, names=(*(k for k in arguments if k not in (*statistics, "num_batches_tracked")),))
    with autocast(dtype):
        found = case.run(arguments)
    assert_same_bits([found[0]], [case.run(given)[0]])
    found[0].float().square().sum().backward()
    for name, leaf in case.leaves(arguments).items():
        assert leaf.grad.dtype is leaf.dtype, name
        assert leaf.grad.abs().max() > 0, name


@pytest.mark.parametrize("grad_mode", [False, True])
def test_the_in_place_module(grad_mode: bool) -> None:
    """In place the input's dtype must stay: autocast leaves it alone."""
    se, x = SqueezeExcitation(C, M, inplace=True), make_map(SHAPE)
    before = x.clone()
    with autocast(torch.bfloat16), torch.set_grad_enabled(grad_mode):
        y = se(x)
    if grad_mode:
        assert y.dtype is torch.bfloat16
        assert torch.equal(x, before)
    else:
        assert y is x
        with torch.no_grad():
            assert torch.equal(y, se(before))


def test_among_convolutions() -> None:
    """The usual place: the block takes what the convolution gives, and gives what the next one takes."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, C, 3), SqueezeExcitation(C, M), nn.Conv2d(C, 4, 1))
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model[1].register_forward_hook(lambda _, args, y: seen.append((args[0].dtype, y.dtype)))
    x = torch.randn(2, 3, 8, 8)
    with autocast(torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert all(p.grad.dtype is torch.float32 and p.grad.abs().max() > 0 for p in model.parameters())


def test_double_backward_through_autocast() -> None:
    x, w = make_map(SHAPE, requires_grad=True), make_weights(C, M, requires_grad=True)

    def penalty(f: Callable, x: Tensor, w: list[Tensor]) -> list[Tensor]:
        y = f(x, *w, "silu").double()
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(g.double().square().sum(), [x, *w]))

    with autocast(torch.bfloat16):
        ours = penalty(se_ext.squeeze_excite, x, w)
    exact = penalty(
        reference.squeeze_excite,
        x.detach().bfloat16().double().requires_grad_(),
        [t.detach().double().requires_grad_() for t in w],
    )
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype is torch.float32
        assert_close(a, b, torch.bfloat16, 3 * P * C)


@cases(lambda case: case.differentiable and not case.writes)
def test_func_transforms_run_in_the_autocast_dtype_too(case: OpCase) -> None:
    options = replace(OPTIONS, activation="relu", pre_activation="identity")
    arguments = case.make(options)
    first = case.names[0]
    stack = torch.stack([case.make(options)[first] for _ in range(2)])
    with autocast(torch.bfloat16):
        y = torch.func.vmap(lambda t: case.run(arguments | {first: t})[0])(stack)
    assert y.dtype is torch.bfloat16
    for ours, t in zip(y, stack, strict=True):
        (exact, *_) = case.exact(in_float64(cast(arguments | {first: t}, torch.bfloat16)))
        assert_close(ours, exact, torch.bfloat16, case.summed(options)[0])
