"""Bitwise the same from run to run and for any number of threads; a sample's result is its own, whatever its batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, DTYPES, GATES, assert_same_bits, bits, make_weights, memory_format, thread_counts
from ops import BY_NAME, PAIRS, PARTS, ROWS, OpCase, Options, cases, layouts
from torch import Tensor

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


def ends(case: OpCase, turn: int) -> list[dict[str, Any]]:
    """Options of the two ends of a block, of those that differ in what the op takes: the pairs of activations that
    kernels are compiled for take turns."""
    if "pre_activation" in case.names:
        pairs = [PAIRS[(2 * turn + i) % len(PAIRS)] for i in range(2)]
        return [
            {"pre_activation": pre, "post_activation": post, "batch_statistics": (turn + i) % 4 < 2}
            for i, (pre, post) in enumerate(pairs)
        ]
    if "post_activation" in case.names:
        return [{"post_activation": "relu"}, {"post_activation": "silu", "residual": False}]
    return [{"activation": activation} for activation in ("identity", "relu", "silu")]


@pytest.mark.parametrize("dtype", DTYPES)
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@cases(lambda case: case.differentiable and not case.writes)
def test_same_bits_for_any_number_of_threads(case, shape, channels_last, dtype, restore_threads):
    """Outputs, the batch's statistics and gradients."""
    turn = SHAPES.index(shape) + DTYPES.index(dtype) + channels_last
    for end in ends(case, turn):
        options = Options(shape, shape[1] // 8, dtype, None, channels_last, requires_grad=True, **end)
        arguments = case.make(options)
        torch.set_num_threads(1)
        grad = torch.randn_like(case.run(arguments)[0])
        expected = case.step(arguments, grad)
        for threads in thread_counts(*THREADS, THREADS[-1]):
            torch.set_num_threads(threads)
            assert_same_bits(case.step(arguments, grad), expected, f"{end}, {threads} threads")


@layouts
@cases(lambda case: case.writes == ("input",))
def test_same_bits_in_place(case, channels_last, restore_threads):
    """In place, out of place, under no_grad and while a graph is recorded: one result."""
    name = case.name.removesuffix("_")
    functional = BY_NAME[name if name in BY_NAME else name.removeprefix("_")]  # which may be public
    options = Options(
        channels_last=channels_last,
        residual=False,
        activation="silu",
        pre_activation="silu",
        post_activation="gelu",
        batch_statistics="batch_statistics" in case.names,
    )
    for shape in SHAPES:
        options = replace(options, shape=shape, hidden=shape[1] // 8)
        arguments = case.make(options)
        given = {name: arguments.get(name, PARTS[name](options)) for name in functional.names}
        torch.set_num_threads(1)
        expected = functional.run(given)[:1]
        recorded = functional.run(given | {"input": arguments["input"].clone().requires_grad_()})[:1]
        assert_same_bits(recorded, expected, "recorded")
        for threads in thread_counts(*THREADS):
            torch.set_num_threads(threads)
            found = case.run(arguments | {"input": arguments["input"].clone()})
            assert_same_bits(found, expected, f"in place, {threads} threads")


@layouts
@cases(lambda case: "running_mean" in case.writes)
def test_same_running_statistics_for_any_number_of_threads(case, channels_last, restore_threads):
    results = []
    for threads in thread_counts(1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(case.run(case.make(Options((7, 40, 14, 14), channels_last=channels_last))))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@layouts
@pytest.mark.parametrize(("spatial", "hidden"), [((5, 7), 13), ((5, 7), 40), ((56, 56), 13)], ids=str)
@cases(lambda case: case.differentiable and not case.writes and not case.is_atens)
def test_a_sample_does_not_feel_its_batch(case, spatial, hidden, channels_last, dtype, restore_threads):
    """The result of every sample in batches of 1 to 9, at every position, is that of the sample alone. The excitation
    has one kernel for narrow squeezes and one for others."""
    turn = hidden + DTYPES.index(dtype) + channels_last
    for end in ends(case, turn):
        names = {"activation": "silu", "gate": "hardsigmoid"} | end | {"batch_statistics": False}
        arguments = case.make(Options((9, 71, *spatial), hidden, dtype, None, channels_last, **names))

        def run(first: int, last: int, arguments: dict[str, Any] = arguments) -> Tensor:
            rows = {k: t[first:last] for k, t in arguments.items() if k in ROWS and t is not None}
            return case.run(arguments | rows)[0]

        torch.set_num_threads(1)
        alone = [run(n, n + 1) for n in range(9)]
        for threads in thread_counts(1, 2, 4):
            torch.set_num_threads(threads)
            for size in range(1, 10):
                first = 9 - size if size % 2 else 0
                batch = run(first, first + size)
                assert_same_bits(batch.split(1), alone[first : first + size], f"{end}, of {size}, {threads} threads")


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


@pytest.mark.large
@layouts
@pytest.mark.parametrize("shape", [(8, 256, 56, 56), (8, 128, 55, 57)], ids=str)
def test_gradients_written_past_the_caches(shape, channels_last):
    """Of maps that exceed the last cache together, bit for bit those of one sample, which does not."""
    case = BY_NAME["bn_squeeze_excite"]
    arguments = case.make(Options(shape, 6, channels_last=channels_last, batch_statistics=False, drop_scale=False))
    grad = torch.randn_like(arguments["input"])

    def gradients(samples: slice) -> tuple[Tensor, ...]:
        leaves = {k: arguments[k][samples].detach().requires_grad_() for k in ("input", "residual")}
        return torch.autograd.grad(case.run(arguments | leaves)[0], list(leaves.values()), grad[samples])

    whole = [t[5:6] for t in gradients(slice(None))]
    assert_same_bits(whole, gradients(slice(5, 6)))


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_equal_values_give_equal_bits_wherever_they_lie(
    dtype: torch.dtype, residual: bool, channels_last: bool
) -> None:
    """In a register of a loop's body or of its tail, of a channel or across two."""

    def all_equal(shape: tuple[int, ...], value: float) -> Tensor:
        t = torch.empty(shape, dtype=dtype, memory_format=memory_format(len(shape), channels_last and len(shape) > 2))
        return t.fill_(value)

    for shape in ((2, 131, 5, 29), (2, 67, 7, 7)):
        # Sums whose terms cancel, so that it is seen whether a product was rounded before it was added.
        value, slope = (1 + torch.rand(2)).tolist()
        x, g, s = all_equal(shape, value), all_equal(shape, slope), all_equal(shape[:2], -1.001)
        a, b = all_equal(shape[1:2], slope), all_equal(shape[1:2], -slope * value)
        r = all_equal(shape, value) if residual else None
        for post in ("identity", "relu", "silu"):
            maps = [se_ext.rescale(x, s, r, post)]
            leaves = [t.clone().requires_grad_() for t in (x, r) if t is not None]
            rest = leaves[1] if residual else None
            y = torch.ops.se_ext._bn_activation(leaves[0], a, b, False, 1e-5, post, rest, None)[0]
            maps += [y.detach(), *torch.autograd.grad(y, leaves, g)]
            y = se_ext.rescale(leaves[0], s, rest, post)
            maps += torch.autograd.grad(y, leaves, g)
            for i, t in enumerate(maps):
                assert bits(t).unique().numel() == 1, f"map {i} of {shape}, {post}"
