"""Values and gradients are those of the formula in float64, for every activation, gate, dtype, rank and layout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    DTYPES,
    GATES,
    HALF,
    assert_close,
    check_against_float64,
    make_map,
    make_weights,
    to_float64,
    tolerance,
)

import se_ext
from se_ext import reference

N, C, M = 3, 19, 5
# (spatial shape, channels_last)
LAYOUTS = [((37,), False), ((5, 7), False), ((5, 7), True), ((3, 4, 3), False), ((3, 4, 3), True)]
BIASES = [(True, True), (False, False), (True, False), (False, True)]
WEIGHTS_AND_DTYPES = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES if d in HALF]


def points(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[2:]).numel()


def block_cases() -> Iterator[object]:
    """Every activation with every post-activation, with and without residual; gate, layout and biases turn with them.

    Seven steps of a wheel per activation and post-activation reach every pair with a gate, a layout or a bias.
    """
    for a, activation in enumerate(ACTIVATIONS):
        for p, post in enumerate(ACTIVATIONS):
            for with_residual in (False, True):
                gate = GATES[(a + p) % len(GATES)]
                layout = LAYOUTS[(a + 2 * p + with_residual) % len(LAYOUTS)]
                bias = BIASES[(a + 3 * p + with_residual) % len(BIASES)]
                name = f"{activation}-{gate}-{post}" + ("-residual" if with_residual else "")
                yield pytest.param(activation, gate, post, with_residual, layout, bias, id=name)


def tensors_for(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    spatial: tuple[int, ...],
    channels_last: bool,
    with_residual: bool = False,
    bias: tuple[bool, bool] = (True, True),
    four_dims: bool = False,
) -> list[torch.Tensor | None]:
    """[x, w1, b1, w2, b2, residual], all requiring grad."""
    shape = (N, C, *spatial)
    w1, b1, w2, b2 = make_weights(C, M, weight_dtype, requires_grad=True)
    if four_dims:
        w1, w2 = (w.detach()[:, :, None, None].requires_grad_() for w in (w1, w2))
    return [
        make_map(shape, dtype, channels_last, requires_grad=True),
        w1,
        b1 if bias[0] else None,
        w2,
        b2 if bias[1] else None,
        make_map(shape, dtype, channels_last, requires_grad=True) if with_residual else None,
    ]


def block(function, activation, gate, post):
    """The function of the six tensors alone."""
    return lambda x, w1, b1, w2, b2, residual: function(x, w1, b1, w2, b2, activation, gate, residual, post)


def test_the_cases_cover_every_pair():
    rows = [(*c.values[:4], c.values[4], c.values[5]) for c in block_cases()]
    domains = [ACTIVATIONS, GATES, ACTIVATIONS, [False, True], LAYOUTS, BIASES]
    for i, first in enumerate(domains):
        for j, second in enumerate(domains[:i]):
            assert len({(str(r[i]), str(r[j])) for r in rows}) == len(first) * len(second), (i, j)


@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS_AND_DTYPES)
@pytest.mark.parametrize(("activation", "gate", "post", "with_residual", "layout", "bias"), list(block_cases()))
def test_squeeze_excite(dtype, weight_dtype, activation, gate, post, with_residual, layout, bias):
    spatial, channels_last = layout
    tensors = tensors_for(dtype, weight_dtype, spatial, channels_last, with_residual, bias, len(spatial) == 2)
    length = points(tensors[0].shape) + C + M
    check_against_float64(
        block(se_ext.squeeze_excite, activation, gate, post),
        block(reference.squeeze_excite, activation, gate, post),
        tensors,
        (length, N * length),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spatial", "channels_last"), LAYOUTS)
def test_squeeze(dtype, spatial, channels_last):
    x = make_map((N, C, *spatial), dtype, channels_last, requires_grad=True)
    length = points(x.shape)
    check_against_float64(se_ext.squeeze, reference.squeeze, [x], (length, 1))


@pytest.mark.parametrize("four_dims", [False, True], ids=["[M,C]", "[M,C,1,1]"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS_AND_DTYPES)
def test_excite(dtype, weight_dtype, activation, gate, four_dims):
    _, w1, b1, w2, b2, _ = tensors_for(dtype, weight_dtype, (1,), False, four_dims=four_dims)
    for bias in BIASES:
        z = torch.randn(7, C).to(dtype).requires_grad_()
        tensors = [z, w1, b1 if bias[0] else None, w2, b2 if bias[1] else None]
        check_against_float64(
            partial(se_ext.excite, activation=activation, gate=gate),
            partial(reference.excite, activation=activation, gate=gate),
            tensors,
            (C + M, 7 * (C + M)),
        )


# Whole blocks of samples, rows and registers and what is left of each; squeezes narrow and wide, more samples than are
# copied beside each other, matrices within the first-level cache and beyond it.
SIZES = [
    (1, 64, 8),
    (4, 72, 24),
    (6, 96, 32),
    (9, 130, 40),
    (8, 1031, 33),
    (16, 2048, 128),
    (65, 300, 33),
    (66, 40, 70),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS_AND_DTYPES)
def test_excite_of_every_size(dtype, weight_dtype, size):
    samples, channels, hidden = size
    z = torch.randn(samples, channels).to(dtype).requires_grad_()
    tensors = [z, *make_weights(channels, hidden, weight_dtype, requires_grad=True)]
    names = {"activation": "silu", "gate": "sigmoid"}  # without kinks, where float32 may rightly take the other branch
    check_against_float64(
        partial(se_ext.excite, **names),
        partial(reference.excite, **names),
        tensors,
        (channels + hidden, samples * (channels + hidden)),
    )


@pytest.mark.parametrize("channels", [8, 24, 40, 72, 200, 264, 1032, 77])
@pytest.mark.parametrize("points", [(1, 1), (3, 5), (20, 19)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_of_every_width(dtype, points, channels):
    """Bands of eight, four, two and one registers of channels, and part of one."""
    x = make_map((2, channels, *points), dtype, channels_last=True, requires_grad=True)
    tensors = [x, *make_weights(channels, 4, dtype, requires_grad=True)]
    names = {"activation": "silu", "post_activation": "silu"}
    length = points[0] * points[1] * channels
    check_against_float64(
        partial(se_ext.squeeze_excite, **names),
        partial(reference.squeeze_excite, **names),
        tensors,
        (length, 2 * length),
    )


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("post", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "scale_dtype"), WEIGHTS_AND_DTYPES)
def test_rescale(dtype, scale_dtype, post, with_residual):
    for spatial, channels_last in LAYOUTS:
        shape = (N, C, *spatial)
        x = make_map(shape, dtype, channels_last, requires_grad=True)
        scale = torch.randn(N, C, dtype=torch.float64).to(scale_dtype).requires_grad_()
        residual = make_map(shape, dtype, channels_last, requires_grad=True) if with_residual else None
        # Where v rounds to relu6's kink in `dtype`, either slope is right: no gradient is asked for there.
        v = reference.rescale(*map(to_float64, (x, scale, residual))).detach()
        grad = torch.randn(shape).masked_fill((v - 6).abs() < 6 * torch.finfo(dtype).eps, 0).to(dtype)
        check_against_float64(
            partial(se_ext.rescale, post_activation=post),
            partial(reference.rescale, post_activation=post),
            [x, scale, residual],
            (1, points(shape)),
            grad,
        )


KINKS = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0]


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("post", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_at_the_kinks(dtype, post, with_residual):
    """Exactly at a kink the slope is the one torch gives there, in the body and in the tail of a vector loop."""
    x = torch.tensor(KINKS, dtype=dtype).repeat(9)[None, None, :-3].requires_grad_()
    residual = torch.zeros_like(x) if with_residual else None
    check_against_float64(
        partial(se_ext.rescale, post_activation=post),
        partial(reference.rescale, post_activation=post),
        [x, torch.ones(1, 1, dtype=dtype), residual],
        (1, 1),
        torch.ones_like(x),
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_the_kinks_of_excite(activation, gate):
    """W1 and W2 are the identity, so that z itself arrives at the activation (or, past the identity, at the gate)."""
    z = torch.tensor(KINKS).repeat(3)[:-3].expand(2, -1).clone().requires_grad_()
    eye = torch.eye(z.shape[1])
    for act in (activation, "identity"):
        check_against_float64(
            partial(se_ext.excite, activation=act, gate=gate),
            partial(reference.excite, activation=act, gate=gate),
            [z, eye, None, eye, None],
            (1, 1),
            torch.ones_like(z),
        )


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("post", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS_AND_DTYPES)
def test_in_place(dtype, weight_dtype, post, with_residual):
    """The in-place twins write the same bits into input, and return it."""
    for spatial, channels_last in LAYOUTS:
        with torch.no_grad():
            x, w1, b1, w2, b2, residual = tensors_for(dtype, weight_dtype, spatial, channels_last, with_residual)
            scale = torch.randn(N, C).to(weight_dtype)
            exact = reference.squeeze_excite(*map(to_float64, (x, w1, b1, w2, b2)), "silu", "hardsigmoid")
            exact = reference.ACTIVATIONS[post](exact if residual is None else exact + residual.double())
            target = x.clone()
            returned = se_ext.squeeze_excite(
                target, w1, b1, w2, b2, "silu", "hardsigmoid", residual, post, inplace=True
            )
            assert returned is target
            assert target.stride() == x.stride()
            assert_close(target, exact, dtype, points(x.shape) + C + M)

            target = x.clone()
            assert torch.ops.se_ext.rescale_(target, scale, residual, post) is None
            plain = reference.rescale(x.double(), scale.double(), to_float64(residual), post)
            assert_close(target, plain, dtype)


def test_in_place_with_input_as_residual():
    """The residual may be the input itself: each element is read before it is written."""
    with torch.no_grad():
        x, w1, b1, w2, b2, _ = tensors_for(torch.float32, torch.float32, (5, 7), False)
        exact = reference.squeeze_excite(*map(to_float64, (x, w1, b1, w2, b2)), residual=x.double())
        se_ext.squeeze_excite(x, w1, b1, w2, b2, residual=x, inplace=True)
        assert_close(x, exact, torch.float32, 35 + C + M)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (1, 2, 3, 4), (0, 5), (1, 5), (0, 4)])
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_partial_gradients(wanted, post):
    """Whoever asks alone gets the same gradient as in company; nobody else gets one."""
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors_for_float32())]
    length = 35 + C + M
    check_against_float64(
        block(se_ext.squeeze_excite, "relu", "sigmoid", post),
        block(reference.squeeze_excite, "relu", "sigmoid", post),
        tensors,
        (length, N * length),
    )
    se_ext.squeeze_excite(*tensors[:5], residual=tensors[5], post_activation=post).sum().backward()
    assert [t.grad is not None for t in tensors] == [i in wanted for i in range(6)]


def tensors_for_float32() -> list[torch.Tensor]:
    return tensors_for(torch.float32, torch.float32, (5, 7), True, with_residual=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("post", ["identity", "relu", "gelu"])
def test_partial_gradients_of_rescale(wanted, post):
    x, *_, residual = tensors_for_float32()
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate([x, torch.randn(N, C), residual])]
    check_against_float64(
        partial(se_ext.rescale, post_activation=post),
        partial(reference.rescale, post_activation=post),
        tensors,
        (1, 35),
    )


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (2, 3)])
def test_partial_gradients_of_excite(wanted):
    _, *weights, _ = tensors_for_float32()
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate([torch.randn(N, C), *weights])]
    check_against_float64(se_ext.excite, reference.excite, tensors, (C + M, N * (C + M)))


@pytest.mark.parametrize("dtype", sorted(HALF, key=str))
@pytest.mark.parametrize("channels_last", [False, True])
def test_master_weights_get_float32_gradients(dtype, channels_last):
    """Beside a half-typed map, float32 weights are never rounded: their gradients are right to float32."""
    tensors = tensors_for(dtype, torch.float32, (5, 7), channels_last)
    exact_tensors = [to_float64(t) for t in tensors]
    y = se_ext.squeeze_excite(*tensors[:5])
    exact = reference.squeeze_excite(*exact_tensors[:5])
    g = torch.randn(y.shape).to(dtype)
    for actual, wanted in zip(
        torch.autograd.grad(y, tensors[1:5], g), torch.autograd.grad(exact, exact_tensors[1:5], g.double()), strict=True
    ):
        assert_close(actual, wanted, torch.float32, N * (35 + C + M))
    assert tolerance(torch.float32, N * (35 + C + M)) < torch.finfo(dtype).eps / 64  # or this would show nothing


def test_gradients_accumulate():
    """A second backward adds to .grad, and the first graph may be kept."""
    tensors = tensors_for_float32()
    y = se_ext.squeeze_excite(*tensors[:5], residual=tensors[5], post_activation="relu")
    y.sum().backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    y.sum().backward()
    for t, g in zip(tensors, once, strict=True):
        assert torch.equal(t.grad, 2 * g)
