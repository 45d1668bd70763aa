"""Bitwise the same from run to run and for any number of threads; a sample's result is its own, whatever its batch."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTIVATIONS, DTYPES, GATES, assert_same_bits, make_map, make_weights, thread_counts

import se_ext
from se_ext import _C

THREADS = (1, 2, 3, 4)
# Where threads share samples, share one sample, or split an odd batch; most hold a megabyte and more in float32.
SHAPES = [
    (1, 128, 56, 56),
    (1, 2048, 7, 7),
    (2, 96, 56, 28),
    (3, 64, 56, 57),
    (5, 512, 14, 14),
    (8, 512, 7, 7),
    (13, 1031, 7, 7),
    (3, 17, 20, 20, 20),
]


def block(x, weights, residual, post, grad):
    """[y, and the gradient of every tensor]."""
    tensors = [t.detach().requires_grad_() for t in (x, *weights, *([] if residual is None else [residual]))]
    y = se_ext.squeeze_excite(*tensors[:5], residual=tensors[5] if residual is not None else None, post_activation=post)
    return [y, *torch.autograd.grad(y, tensors, grad)]


def parts(x, weights, residual, post, grad):
    """The same of squeeze, excite and rescale one by one."""
    tensors = [t.detach().requires_grad_() for t in (x, *weights)]
    z = se_ext.squeeze(tensors[0])
    s = se_ext.excite(z, *tensors[1:])
    y = se_ext.rescale(tensors[0], s, residual, post)
    return [z, s, y, *torch.autograd.grad(y, [s, z, *tensors], grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype, channels_last, shape, restore_threads):
    x, residual, grad = (make_map(shape, dtype, channels_last) for _ in range(3))
    weights = make_weights(shape[1], shape[1] // 8, dtype)
    for function, r, post in ((block, residual, "relu"), (block, None, "silu"), (parts, residual, "relu")):
        torch.set_num_threads(1)
        expected = function(x, weights, r, post, grad)
        for threads in thread_counts(*THREADS):
            torch.set_num_threads(threads)
            for run in range(2):
                actual = function(x, weights, r, post, grad)
                assert_same_bits(actual, expected, f"{function.__name__}, {threads} threads, run {run}")


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_in_place(channels_last, restore_threads):
    """In place, out of place, under no_grad and while a graph is recorded: one result."""
    for shape in SHAPES:
        x = make_map(shape, channels_last=channels_last)
        weights = make_weights(shape[1], shape[1] // 8)
        torch.set_num_threads(1)
        expected = se_ext.squeeze_excite(x, *weights, post_activation="gelu")
        recorded = se_ext.squeeze_excite(x.clone().requires_grad_(), *weights, post_activation="gelu")
        assert_same_bits([recorded], [expected], "recorded")
        for threads in thread_counts(*THREADS):
            torch.set_num_threads(threads)
            y = se_ext.squeeze_excite(x.clone(), *weights, post_activation="gelu", inplace=True)
            assert_same_bits([y], [expected], f"in place, {threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("spatial", "hidden"), [((5, 7), 13), ((5, 7), 40), ((56, 56), 13)], ids=str)
def test_a_sample_does_not_feel_its_batch(dtype, channels_last, spatial, hidden, restore_threads):
    """y of every sample in batches of 1 to 9, at every position, is y of that sample alone. The excitation has one
    kernel for narrow squeezes and one for others."""
    c = 71
    x, residual = (make_map((9, c, *spatial), dtype, channels_last) for _ in range(2))
    weights = make_weights(c, hidden, dtype)

    def run(first: int, last: int) -> list[torch.Tensor]:
        batch = x[first:last]
        z = se_ext.squeeze(batch)
        s = se_ext.excite(z, *weights, "silu", "hardsigmoid")
        y = se_ext.rescale(batch, s, residual[first:last], "tanh")
        block = se_ext.squeeze_excite(batch, *weights, residual=residual[first:last], post_activation="relu")
        return [z, s, y, block]

    torch.set_num_threads(1)
    alone = [run(n, n + 1) for n in range(9)]
    for threads in thread_counts(1, 2, 4):
        torch.set_num_threads(threads)
        for size in range(1, 10):
            first = 9 - size if size % 2 else 0
            batch = run(first, first + size)
            for n in range(size):
                assert_same_bits(
                    [t[n : n + 1] for t in batch],
                    alone[first + n],
                    f"sample {n} of {size}, {threads} threads",
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 5, 16, 70, 768])
def test_excite_does_not_feel_its_batch(dtype, c, restore_threads):
    """Every activation and gate; widths below, at and above a vector, and enough weights to wake threads."""
    hidden = max(1, c // 3)
    weights = make_weights(c, hidden, dtype)
    z = torch.randn(9, c).to(dtype)
    for i, activation in enumerate(ACTIVATIONS):
        for gate in GATES if c < 768 else [GATES[i % len(GATES)]]:
            torch.set_num_threads(1)
            alone = torch.cat([se_ext.excite(z[n : n + 1], *weights, activation, gate) for n in range(9)])
            for threads in thread_counts(1, 3):
                torch.set_num_threads(threads)
                for size in range(1, 10):
                    s = se_ext.excite(z[9 - size :], *weights, activation, gate)
                    assert_same_bits([s], [alone[9 - size :]], f"{activation}, {gate}, batch of {size}")


# ---- maps larger than the last cache, whose results are written past it ----

LAST_CACHE = _C.cache_bytes(3)


@pytest.mark.cpu_only
@pytest.mark.skipif(LAST_CACHE > 2**27, reason=f"the last cache has {LAST_CACHE >> 20} MB; larger maps take too long")
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_map_gives_what_its_samples_give(dtype, channels_last, offset):
    """Forward and backward, bit for bit; rows of 57 x 55 points end inside a register."""
    c, h, w = 80, 57, 55
    n = LAST_CACHE // (2 * c * h * w * dtype.itemsize) + 2
    shape = (n, h, w, c) if channels_last else (n, c, h, w)
    x, g = (torch.randn(n * c * h * w + offset, dtype=torch.float32).to(dtype)[offset:].view(shape) for _ in range(2))
    if channels_last:
        x, g = x.permute(0, 3, 1, 2), g.permute(0, 3, 1, 2)
    weights = make_weights(c, 8, dtype)
    assert 2 * x.nbytes > LAST_CACHE  # x and y
    x.requires_grad_()
    y = se_ext.squeeze_excite(x, *weights, post_activation="relu")
    (gx,) = torch.autograd.grad(y, x, g)
    for i in (0, 1, n - 1):
        one = x[i : i + 1].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y1 = se_ext.squeeze_excite(one, *weights, post_activation="relu")
        (g1,) = torch.autograd.grad(y1, one, g[i : i + 1])
        assert_same_bits([y[i], gx[i]], [y1[0], g1[0]], f"sample {i}")
