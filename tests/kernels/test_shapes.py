"""Every shape, stride and offset gives the right values, in the input's memory format, and touches nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_close, assert_same_bits, check_against_float64, make_map, make_weights, memory_format
from ops import BY_NAME, PAIRS, OpCase, Options, cases, differentiable, layouts
from torch import Tensor

import se_ext
from se_ext import reference

M = 3


def check_block(x, residual=None, post="relu", hidden=M, grad=None, weights=None):
    """The whole block on x, forward and backward, against float64.

    Written out, a gradient is a sum over points, channels and either samples (the weights') or hidden units (x's).
    """
    n, c, *spatial = x.shape
    points = torch.Size(spatial).numel()
    weights = weights or make_weights(c, hidden, x.dtype, requires_grad=True)
    check_against_float64(
        lambda x, w1, b1, w2, b2, r: se_ext.squeeze_excite(x, w1, b1, w2, b2, residual=r, post_activation=post),
        lambda x, w1, b1, w2, b2, r: reference.squeeze_excite(x, w1, b1, w2, b2, residual=r, post_activation=post),
        [x, *weights, residual],
        (points + c + hidden, points * c * max(n, hidden)),
        grad,
    )


def in_nans(t: torch.Tensor, offset: int, margin: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(t at an offset inside a buffer of NaNs, the buffer): whatever reads beyond t gets a NaN."""
    buffer = torch.full((t.numel() + 2 * margin,), float("nan"), dtype=t.dtype)
    view = buffer[margin + offset :][: t.numel()].as_strided(t.shape, t.stride(), margin + offset)
    view.copy_(t)
    return view, buffer


def relocated(arguments: dict[str, Any], place: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same values in other memory."""
    return {
        k: place(t.detach()).requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
        for k, t in arguments.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("swept", ["points", "channels", "hidden"])
def test_every_size_around_the_vector_widths(dtype, channels_last, swept):
    for size in range(1, 71):
        shape, hidden = {
            "points": ((2, 5, size, 1), 11),
            "channels": ((2, size, 3, 2), 11),
            "hidden": ((2, 5, 2, 2), size),
        }[swept]
        x, residual = (make_map(shape, dtype, channels_last, requires_grad=True) for _ in range(2))
        try:
            check_block(x, residual, "relu", hidden)
            with torch.no_grad():
                length = torch.Size(shape[2:]).numel()
                assert_close(se_ext.squeeze(x), reference.squeeze(x.double()), dtype, length)
        except AssertionError as error:
            raise AssertionError(f"{swept} = {size}: {error}") from None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (1, 1, 1, 7), (3, 1, 5, 5), (2, 127, 1, 1), (5, 13, 11, 7), (2, 131, 3, 1), (7, 3, 1, 97)],
    ids=str,
)
def test_odd_shapes(shape, channels_last):
    """C = 1, P = 1, N = 1, primes; M = 1 and M > C."""
    for hidden in (1, 17):
        x, residual = (make_map(shape, channels_last=channels_last, requires_grad=True) for _ in range(2))
        check_block(x, residual, "silu", hidden)
        check_block(x, None, "identity", hidden)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((2, 3, 20011), False), ((2, 3, 20011, 1), True), ((1, 20011, 3, 1), True), ((1, 20011, 3), False)],
    ids=str,
)
def test_slabs_of_many_tiles(shape, channels_last):
    """Longer than a tile in P or in C, and not a multiple of it."""
    x, residual = (make_map(shape, channels_last=channels_last, requires_grad=True) for _ in range(2))
    check_block(x, residual)


@layouts
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 9), (4, 24, 7, 7), (2, 19, 5, 6), (3, 72, 14, 14), (2, 9, 3, 4, 5), (6, 40, 1, 1), (1, 8, 4, 4)],
    ids=str,
)
@cases(lambda case: case.has_map and case.differentiable and not case.writes)
def test_every_op_of_every_shape(case: OpCase, shape: tuple[int, ...], channels_last: bool) -> None:
    """With each pair of activations, before and after the block, that kernels are compiled for."""
    for pre, post in PAIRS if "pre_activation" in case.names else [("", "identity"), ("", "relu"), ("", "silu")]:
        for batch_statistics in (False, True) if "batch_statistics" in case.names else (False,):
            options = Options(
                shape,
                6,
                channels_last=channels_last,
                activation=post,
                pre_activation=pre,
                post_activation=post,
                batch_statistics=batch_statistics,
                requires_grad=True,
            )
            case.check(options)


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)], ids=["no samples", "no points"])
@pytest.mark.parametrize("hidden", [1, 5])
@cases(differentiable)
def test_empty_maps(case: OpCase, hidden: int, shape: tuple[int, ...], batch_statistics: bool) -> None:
    """Empty results and gradients; running statistics stay. A gradient that is a sum over nothing is zero (but behind
    a batch norm of nothing, whose statistics are NaN, and of the weights behind a mean of no points)."""
    options = Options(shape, hidden, gate="hardsigmoid", batch_statistics=batch_statistics, requires_grad=True)
    arguments = case.make(options)
    if case.needs_points and 0 in shape[2:]:
        with pytest.raises(RuntimeError, match="expected input of at least one point along each spatial dim"):
            case.run(arguments)
        return
    before = {name: arguments[name].clone() for name in case.writes}
    y = case.run(arguments)[0]
    assert y.shape == (shape if case.has_map and case.name != "squeeze" else shape[:2])
    y.sum().backward()
    for name, leaf in case.leaves(arguments).items():
        assert leaf.grad.shape == leaf.shape, name
        is_sum_over_nothing = shape[0] == 0 or name not in ("z", "w1", "b1", "w2", "b2")
        if is_sum_over_nothing and not (batch_statistics and case.name.startswith(("bn", "_bn"))):
            assert case.name == "excite" or leaf.grad.count_nonzero() == 0, name
    for name, value in before.items():
        assert name == "num_batches_tracked" or torch.equal(arguments[name], value), name


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 3, 4, 0), (2, 3, 0, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_points(shape, dtype):
    """P = 0: what mean gives, NaN, reaches the gate and the weights' gradients; the result is empty."""
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    z = se_ext.squeeze(x)
    assert z.shape == (2, 3)
    assert z.dtype is dtype
    assert z.isnan().all()
    assert torch.autograd.grad(z.sum(), x)[0].shape == shape

    weights = make_weights(3, M, dtype, requires_grad=True)
    y = se_ext.squeeze_excite(x, *weights)
    assert y.shape == shape
    exact_weights = [w.detach().double().requires_grad_() for w in weights]
    exact = reference.squeeze_excite(x.detach().double(), *exact_weights)
    grads = torch.autograd.grad(y.sum(), [x, *weights])
    assert grads[0].shape == shape
    for actual, expected in zip(grads[1:], torch.autograd.grad(exact.sum(), exact_weights), strict=True):
        torch.testing.assert_close(actual.double(), expected, equal_nan=True, rtol=0, atol=0)

    scale = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    y = se_ext.rescale(x, scale, torch.empty_like(x), "relu")
    assert y.shape == shape
    assert torch.equal(torch.autograd.grad(y.sum(), scale)[0], torch.zeros_like(scale))


@pytest.mark.parametrize("dtype", DTYPES)
@layouts
@cases(lambda case: not case.is_atens)
def test_misaligned(case: OpCase, channels_last: bool, dtype: torch.dtype) -> None:
    """Every tensor at an odd offset in a buffer of NaNs: the same bits, so nothing beyond it is read."""
    for shape in ((2, 19, 5, 7), (3, 33, 1, 31), (2, 8, 7, 7)):
        for post in ("silu", "relu"):
            options = Options(shape, 5, dtype, None, channels_last, activation=post, post_activation=post)
            arguments = case.make(replace(options, requires_grad=True))
            grad = torch.randn_like(case.run(case.make(options))[0]) if case.differentiable else None
            expected = case.step(relocated(arguments, torch.clone), grad)
            for offset in (1, 2, 3):
                offsets = cycle((offset, offset + 1))
                moved = relocated(arguments, lambda t, offsets=offsets: in_nans(t, next(offsets))[0])
                found = case.step(moved, None if grad is None else in_nans(grad, offset + 2)[0])
                assert_same_bits(found, expected, f"{shape}, {post}, offset {offset}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place_writes_input_alone(dtype, channels_last):
    """Every tail length: the bits on both sides of the map stay as they were."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    with torch.no_grad():
        for size in range(1, 71):
            for shape in ((2, 3, size, 1), (2, size, 3, 1)):
                original = make_map(shape, dtype, channels_last)
                x, buffer = in_nans(original, size % 4)
                weights = make_weights(shape[1], M, dtype)
                before = buffer.view(integer).clone()
                se_ext.squeeze_excite(x, *weights, post_activation="tanh", inplace=True)
                exact = reference.squeeze_excite(
                    original.double(), *(w.double() for w in weights), post_activation="tanh"
                )
                assert_close(x, exact, dtype, sum(shape[1:]))
                x.copy_(original)
                assert torch.equal(buffer.view(integer), before), shape


EXPANDED = {
    "samples": lambda: make_map((1, 6, 5, 4)).expand(3, 6, 5, 4),
    "channels": lambda: make_map((3, 1, 5, 4)).expand(3, 6, 5, 4),
    "rows": lambda: make_map((3, 6, 1, 4)).expand(3, 6, 5, 4),
    "points": lambda: make_map((3, 6, 1, 1)).expand(3, 6, 5, 4),
    "all": lambda: torch.tensor(0.7).expand(3, 6, 5, 4),
}
STRIDED = {
    **EXPANDED,
    "H and W swapped": lambda: make_map((3, 6, 4, 5)).transpose(2, 3),
    "N and C swapped": lambda: make_map((6, 3, 5, 4)).transpose(0, 1),
    "C last, W before H": lambda: make_map((3, 4, 5, 6)).permute(0, 3, 2, 1),
    "every second column": lambda: make_map((3, 6, 5, 8))[..., ::2],
    "every second channel": lambda: make_map((3, 12, 5, 4))[:, ::2],
    "every second sample": lambda: make_map((6, 6, 5, 4))[::2],
    "inner columns": lambda: make_map((3, 6, 5, 9))[..., 2:6],
    "inner channels, channels_last": lambda: make_map((3, 9, 5, 4), channels_last=True)[:, 1:7],
    "inner rows, channels_last": lambda: make_map((3, 6, 8, 4), channels_last=True)[:, :, 2:7],
    "channels_last": lambda: make_map((3, 6, 5, 4), channels_last=True),
    "contiguous": lambda: make_map((3, 6, 5, 4)),
}


@pytest.mark.parametrize("grad", STRIDED)
@pytest.mark.parametrize("x", STRIDED)
def test_strides(x, grad):
    """Any strides of x and of dL/dy, and the residual's another kind than x's."""
    names = list(STRIDED)
    residual = STRIDED[names[(names.index(x) + 3 * names.index(grad) + 1) % len(names)]]()
    for post in ("identity", "relu", "gelu"):
        check_block(
            STRIDED[x]().detach().requires_grad_(), residual.detach().requires_grad_(), post, grad=STRIDED[grad]()
        )


# The same of a matrix [3, 6]: one per sample and channel.
STRIDED_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
    "contiguous": lambda t: t,
}


@pytest.mark.parametrize("name", STRIDED)
@cases()
def test_strides_of_each_op(case: OpCase, name: str) -> None:
    """Maps of these strides, each of another kind than the one before; strided matrices, vectors and weights."""
    if case.writes == ("input",) and name in EXPANDED:
        return  # refused: test_errors.py
    for rows in STRIDED_ROWS.values():
        kinds = cycle(list(STRIDED)[list(STRIDED).index(name) :] + list(STRIDED)[: list(STRIDED).index(name)])
        options = Options((3, 6, 5, 4), 16, activation="silu", post_activation="silu", requires_grad=True)
        if name == "all":  # a channel of one value has no variance
            options = replace(options, batch_statistics=False)
        arguments = case.make(replace(options, maps=lambda kinds=kinds: STRIDED[next(kinds)]()))
        for key, t in arguments.items():
            if isinstance(t, Tensor) and t.dim() == 2 and key not in case.writes:
                arguments[key] = rows(t.detach()).requires_grad_(t.requires_grad)
            elif isinstance(t, Tensor) and t.dim() == 1 and key not in case.writes:
                arguments[key] = torch.stack([t.detach(), t.detach()], 1)[:, 0].requires_grad_(t.requires_grad)
        y = case.run(case.make(options))[0]
        grads: list[Any] = [None]
        if case.differentiable:
            grads = [torch.ones(()).expand(y.shape), STRIDED_ROWS["transposed"](y.detach()) if y.dim() == 2 else None]
        for grad in grads:
            case.check(options, arguments, grad)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_expanded_scales(size: int) -> None:
    """One scale for all channels, or for all samples."""
    for scale in (torch.randn(3, 1).expand(3, 6), torch.randn(1, 6).expand(3, 6)):
        case, options = BY_NAME["rescale"], Options((3, 6, 5, size), requires_grad=True)
        case.check(options, case.make(options) | {"scale": scale.detach().requires_grad_()})


@pytest.mark.parametrize(
    "weights",
    [
        lambda: [torch.randn(6, M).t(), torch.randn(2 * M)[::2], torch.randn(M, 6).t(), torch.randn(1).expand(6)],
        lambda: [torch.randn(M, 1).expand(M, 6), torch.randn(()).expand(M), torch.randn(6, 2 * M)[:, 1::2], None],
        lambda: [torch.randn(M, 6, 1, 1).to(memory_format=torch.channels_last), None, torch.randn(1, M, 1, 1), None],
    ],
    ids=["transposed", "expanded and sliced", "channels_last"],
)
def test_strided_weights(weights):
    weights = weights()
    if weights[2].shape[0] == 1:
        weights[2] = weights[2].expand(6, M, 1, 1)
    weights = [w if w is None else w.detach().requires_grad_() for w in weights]
    check_block(make_map((3, 6, 5, 4), requires_grad=True), weights=weights)


def test_sum_backward():
    """y.sum().backward(): dL/dy is one number, expanded."""
    for channels_last in (False, True):
        x = make_map((3, 6, 5, 4), channels_last=channels_last, requires_grad=True)
        weights = make_weights(6, M, requires_grad=True)
        exact_x = x.detach().double().requires_grad_()
        se_ext.squeeze_excite(x, *weights).sum().backward()
        reference.squeeze_excite(exact_x, *(w.detach().double() for w in weights)).sum().backward()
        assert_close(x.grad, exact_x.grad, torch.float32, 20 + 6 + M)


@pytest.mark.parametrize("name", ["H and W swapped", "every second column", "inner channels, channels_last"])
def test_in_place_on_strides(name):
    """Input that needs a copy is still written in place, and nothing of its base beside it."""
    with torch.no_grad():
        x = STRIDED[name]()
        base = x._base
        before, original = base.clone(), x.clone()
        weights = make_weights(6, M)
        assert se_ext.squeeze_excite(x, *weights, residual=original, inplace=True) is x
        exact = reference.squeeze_excite(original.double(), *(w.double() for w in weights), residual=original.double())
        assert_close(x, exact, torch.float32, 20 + 6 + M)
        x.copy_(original)
        assert torch.equal(base, before)


@pytest.mark.parametrize("name", ["H and W swapped", "every second column", "inner channels, channels_last"])
@pytest.mark.parametrize("pre_activation", ["identity", "relu", "silu"])
def test_in_place_on_strides_behind_a_batch_norm(pre_activation, name):
    case = BY_NAME["_bn_squeeze_excite_"]
    original = STRIDED[name]().detach()
    options = Options(tuple(original.shape), M, pre_activation=pre_activation, maps=lambda: STRIDED[name]().detach())
    case.check(options)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((2, 5, 7), False),
        ((2, 5, 3, 4), False),
        ((2, 5, 3, 4), True),
        ((2, 5, 3, 4, 2), False),
        ((2, 5, 3, 4, 2), True),
        ((2, 5, 1, 1), True),
        ((2, 5, 1, 1), False),
        ((2, 1, 3, 4), True),
        ((2, 1, 3, 4), False),
        ((1, 5, 3, 4), True),
        ((2, 1, 3, 4, 2), True),
        ((2, 5, 1, 1, 1), True),
    ],
    ids=str,
)
def test_output_keeps_the_memory_format(shape, channels_last):
    """Strides equal, also where the sizes leave the format open; values with a residual in the other format."""
    x = torch.empty(shape, memory_format=memory_format(len(shape), channels_last)).copy_(make_map(shape))
    x.requires_grad_()
    residual = make_map(shape, channels_last=not channels_last)
    weights = make_weights(shape[1], M)
    scale = torch.randn(shape[:2])
    options = Options(shape, M)
    for r in (None, residual):
        assert se_ext.squeeze_excite(x, *weights, residual=r).stride() == x.stride()
        assert se_ext.rescale(x, scale, r).stride() == x.stride()
        with torch.no_grad():
            assert se_ext.squeeze_excite(x, *weights, residual=r).stride() == x.stride()
        check_block(x, r, "relu", weights=weights)
    y = se_ext.squeeze_excite(x, *weights)
    assert torch.autograd.grad(y, x, torch.randn_like(y))[0].stride() == x.stride()
    for case in BY_NAME.values():
        if case.has_map and x[:, 0].numel() > 1:
            arguments = case.make(replace(options, maps=lambda: torch.empty_like(x).copy_(make_map(shape)).detach()))
            maps = [t for t in case.run(arguments) if t is not None and t.shape == x.shape]
            assert all(t.stride() == x.stride() for t in maps), case


def test_sliced_input_gives_the_format_it_came_from():
    """Other strides become the format that torch suggests for them."""
    x = STRIDED["inner channels, channels_last"]()
    assert se_ext.rescale(x, torch.randn(3, 6)).is_contiguous(memory_format=torch.channels_last)
    assert se_ext.rescale(STRIDED["inner columns"](), torch.randn(3, 6)).is_contiguous()
