"""Autocast: the map runs in the autocast dtype, the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close, device, make_map, make_weights
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


def scale() -> Tensor:
    return torch.rand(3, C)


# The four ops: (op, its arguments, how many of the first of them run in the autocast dtype, terms summed)
OPS: dict[str, tuple[str, Callable[[], list[Any]], tuple[int, ...], int]] = {
    "squeeze": ("squeeze", lambda: [make_map(SHAPE)], (0,), P),
    "excite": ("excite", lambda: [torch.randn(3, C), *make_weights(C, M)], (0,), C),
    "rescale": ("rescale", lambda: [make_map(SHAPE), scale(), make_map(SHAPE), "relu"], (0, 2), 1),
    "squeeze_excite": (
        "squeeze_excite",
        lambda: [make_map(SHAPE), *make_weights(C, M), "relu", "sigmoid", make_map(SHAPE), "relu"],
        (0, 7),
        P + C,
    ),
}


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_map_is_cast_and_the_weights_are_not(op: str, dtype: torch.dtype) -> None:
    """Bitwise the op on a cast map beside float32 weights, which is close to the formula on the cast map."""
    name, make, cast, summed = OPS[op]
    args = make()
    with autocast(dtype):
        y = getattr(se_ext, name)(*args)
    assert y.dtype is dtype
    given = [a.to(dtype) if i in cast else a for i, a in enumerate(args)]
    assert torch.equal(y, getattr(se_ext, name)(*given))
    assert_close(y, getattr(reference, name)(*map(double, given)), dtype, summed)
    # That the weights were not cast shows: with cast ones the bits are others.
    if name in ("excite", "squeeze_excite"):
        rounded = [a.to(dtype).float() if isinstance(a, Tensor) and i not in cast else a for i, a in enumerate(given)]
        assert not torch.equal(y, getattr(se_ext, name)(*rounded))


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


def test_float64_stays_float64() -> None:
    x, w = make_map(SHAPE, torch.float64), make_weights(C, M, torch.float64)
    with autocast(torch.bfloat16):
        results = [
            se_ext.squeeze_excite(x, *w, residual=x),
            se_ext.squeeze(x),
            se_ext.excite(x.mean((2, 3)), *w),
            se_ext.rescale(x, torch.rand(3, C, dtype=torch.float64)),
        ]
        assert torch.equal(results[0], torch.ops.se_ext.squeeze_excite(x, *w, "relu", "sigmoid", x))
    assert all(y.dtype is torch.float64 for y in results)
    assert_close(results[0], reference.squeeze_excite(x, *w, residual=x), torch.float64, P + C)
    assert_close(results[1], reference.squeeze(x), torch.float64, P)


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
def test_a_residual_of_another_dtype_is_cast_along(residual_dtype: torch.dtype) -> None:
    """A convolution's output is bfloat16 under autocast where the shortcut may still be float32."""
    x, r, w = make_map(SHAPE, torch.bfloat16), make_map(SHAPE, residual_dtype), make_weights(C, M)
    with autocast(torch.bfloat16):
        y = se_ext.squeeze_excite(x, *w, residual=r, post_activation="relu")
        z = se_ext.rescale(x, torch.ones(3, C), r)
    assert torch.equal(y, se_ext.squeeze_excite(x, *w, residual=r.bfloat16(), post_activation="relu"))
    assert torch.equal(z, se_ext.rescale(x, torch.ones(3, C), r.bfloat16()))


@pytest.mark.parametrize("weights", HALF_TYPES, ids=str)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_weights_of_a_half_type_run_in_the_autocast_dtype(dtype: torch.dtype, weights: torch.dtype) -> None:
    """The kernels refuse weights of the other half type: autocast casts them; their gradients come back in theirs."""
    x, w = make_map(SHAPE), make_weights(C, M, weights, requires_grad=True)
    with autocast(dtype):
        y = se_ext.squeeze_excite(x, *w)
        s = se_ext.rescale(x, torch.ones(3, C, dtype=weights) * 0.3)
    assert torch.equal(y, se_ext.squeeze_excite(x.to(dtype), *[t.to(dtype) for t in w]))
    assert torch.equal(s, se_ext.rescale(x.to(dtype), (torch.ones(3, C, dtype=weights) * 0.3).to(dtype)))
    y.float().square().sum().backward()
    assert all(t.grad.dtype is weights for t in w)
    assert all(t.grad.abs().max() > 0 for t in w)


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


def test_func_transforms_run_in_the_autocast_dtype_too() -> None:
    x, w = make_map((2, *SHAPE)), make_weights(C, M)
    with autocast(torch.bfloat16):
        y = torch.func.vmap(lambda t: se_ext.squeeze_excite(t, *w))(x)
        z = torch.func.vmap(se_ext.squeeze)(x)
    cast = x.bfloat16()
    assert y.dtype is torch.bfloat16
    assert z.dtype is torch.bfloat16
    exact = torch.stack([reference.squeeze_excite(double(t), *map(double, w)) for t in cast])
    assert_close(y, exact, torch.bfloat16, P + C)
