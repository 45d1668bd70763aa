"""Every shape, stride and offset gives the right values, in the input's memory format, and touches nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import DTYPES, assert_close, check_against_float64, make_map, make_weights, memory_format

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


@pytest.mark.parametrize("hidden", [1, 5])
def test_no_samples(hidden):
    """N = 0: an empty result, weight gradients of zero."""
    x = torch.empty(0, 6, 4, 4, requires_grad=True)
    weights = make_weights(6, hidden, requires_grad=True)
    y = se_ext.squeeze_excite(x, *weights, residual=torch.empty(0, 6, 4, 4), post_activation="relu")
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    for w in weights:
        assert torch.equal(w.grad, torch.zeros_like(w))
    assert se_ext.squeeze(x).shape == (0, 6)
    z = torch.empty(0, 6, requires_grad=True)
    excited = se_ext.excite(z, *weights)
    assert excited.shape == (0, 6)
    for g, w in zip(torch.autograd.grad(excited.sum(), weights), weights, strict=True):
        assert torch.equal(g, torch.zeros_like(w))
    scale = torch.empty(0, 6, requires_grad=True)
    assert se_ext.rescale(x, scale).shape == x.shape


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
@pytest.mark.parametrize("channels_last", [False, True])
def test_misaligned(dtype, channels_last):
    """Maps, residual and weights at odd offsets in NaN-filled buffers: nothing beyond them is read."""
    for offset in (1, 2, 3):
        for shape in ((2, 19, 5, 7), (3, 33, 1, 31), (2, 8, 7, 7)):
            c, hidden = shape[1], 5
            x, residual = (
                in_nans(make_map(shape, dtype, channels_last), k)[0].requires_grad_() for k in (offset, offset + 1)
            )
            weights = [in_nans(w, offset)[0].requires_grad_() for w in make_weights(c, hidden, dtype)]
            assert x.storage_offset() % 2 == offset % 2
            grad = in_nans(make_map(shape, dtype, channels_last), offset + 2)[0]
            check_block(x, residual, "silu", hidden, grad, weights)
            check_block(x, residual, "relu", hidden, grad, weights)
            check_against_float64(se_ext.squeeze, reference.squeeze, [x], (x[0, 0].numel(), 1))


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


@pytest.mark.parametrize("name", STRIDED)
def test_strides_of_each_op(name):
    x = STRIDED[name]().detach().requires_grad_()
    for grad in (torch.ones(()).expand(3, 6), torch.randn(6, 3).t(), torch.randn(3, 12)[:, ::2]):
        check_against_float64(se_ext.squeeze, reference.squeeze, [x], (20, 1), grad)
    scales = [torch.randn(6, 3).t(), torch.randn(3, 1).expand(3, 6), torch.randn(3, 12)[:, ::2], torch.randn(3, 6)]
    for scale in scales:
        check_against_float64(
            partial(se_ext.rescale, post_activation="silu"),
            partial(reference.rescale, post_activation="silu"),
            [x, scale.detach().requires_grad_(), STRIDED[name]().detach().requires_grad_()],
            (1, 20),
            torch.ones(()).expand(x.shape),
        )
    for grad in (torch.ones(()).expand(3, 6), torch.randn(6, 3).t()):
        z = torch.randn(6, 3).t().requires_grad_()
        tensors = [z, *make_weights(6, 16, requires_grad=True)]
        check_against_float64(se_ext.excite, reference.excite, tensors, (6 + 16, 3 * (6 + 16)), grad)


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
    for r in (None, residual):
        assert se_ext.squeeze_excite(x, *weights, residual=r).stride() == x.stride()
        assert se_ext.rescale(x, scale, r).stride() == x.stride()
        with torch.no_grad():
            assert se_ext.squeeze_excite(x, *weights, residual=r).stride() == x.stride()
        check_block(x, r, "relu", weights=weights)
    y = se_ext.squeeze_excite(x, *weights)
    assert torch.autograd.grad(y, x, torch.randn_like(y))[0].stride() == x.stride()


def test_sliced_input_gives_the_format_it_came_from():
    """Other strides become the format that torch suggests for them."""
    x = STRIDED["inner channels, channels_last"]()
    assert se_ext.rescale(x, torch.randn(3, 6)).is_contiguous(memory_format=torch.channels_last)
    assert se_ext.rescale(STRIDED["inner columns"](), torch.randn(3, 6)).is_contiguous()


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_elements_than_32_bits_count(channels_last):
    """2³¹ + 66 elements, 4.3 GB: the last ones lie beyond what a 32-bit offset reaches."""
    points = 2**30 + 33
    x = torch.empty((1, 2, points, 1), dtype=torch.bfloat16, memory_format=memory_format(4, channels_last))
    x[:, 0], x[:, 1] = 1, 2
    tail = 2**20
    x[:, 1, -tail:] = 4
    z = se_ext.squeeze(x)
    exact = torch.tensor([[1.0, 2 + 2 * tail / points]], dtype=torch.float64)
    assert_close(z, exact, torch.bfloat16, points)
    weights = make_weights(2, 1, torch.float32)
    scale = reference.excite(exact, *(w.double() for w in weights))
    se_ext.squeeze_excite(x, *weights, inplace=True)
    for c, p, before in [(0, 0, 1), (0, points - 1, 1), (1, 0, 2), (1, points - tail - 1, 2), (1, points - 1, 4)]:
        assert_close(x[:, c, p, 0], before * scale[:, c], torch.bfloat16, points)
    for c, before in [(0, 1), (1, 4)]:
        assert_close(x[:, c, -tail:, 0], (before * scale[:, c, None]).expand(1, tail), torch.bfloat16, points)
