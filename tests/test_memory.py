"""Nothing of the map's size is allocated but results, and nothing saved for backward but what the slope needs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import make_map, make_weights, saved_maps
from torch.profiler import ProfilerActivity, profile

import se_ext

SHAPE = (8, 64, 28, 28)
HIDDEN = 4
SLOPE_FROM_OUTPUT = ["relu", "relu6", "leaky_relu", "tanh", "sigmoid"]
SLOPE_FROM_INPUT = ["silu", "gelu", "hardswish"]


def allocations(function: Callable[[], object], warm_up: bool = True) -> list[int]:
    """The bytes of every allocation that torch's CPU allocator makes, from Python or C++, while function runs."""
    if warm_up:
        function()  # what is made once is not the function's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = function()
    del kept
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [s for s in sizes if s > 0]


def full_and_small(function: Callable[[], object], x: torch.Tensor) -> tuple[list[int], int]:
    """(allocations of half the map's size and more, in bytes of the map; the sum of all others, in bytes)."""
    sizes = allocations(function)
    full = [s for s in sizes if 2 * s >= x.nbytes]
    assert all(s % x.nbytes == 0 for s in full)
    return [s // x.nbytes for s in full], sum(s for s in sizes if 2 * s < x.nbytes)


def small_bytes(x: torch.Tensor, channels_last: bool) -> int:
    """What z, hidden, h, scale and their gradients, the weights' gradients, and one row of partial sums per tile take.

    Backward holds at most four [N, C] and four [N, M] tensors of its own, forward two and two, and autograd keeps one
    of each more; a tile of 32 KB of the map has one row of C sums.
    """
    n, c = x.shape[:2]
    item = 8 if x.dtype is torch.float64 else 4
    tiles = n * (x[0].nbytes // 2**15 + 1) if channels_last else 0
    return item * (8 * n * (c + HIDDEN) + 2 * c * HIDDEN + c + HIDDEN + 2 * tiles * c)


@pytest.fixture(params=[(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str)
def case(request):
    """(x, its weights, a residual, channels_last), all recorded by autograd."""
    dtype, channels_last = request.param
    x, residual = (make_map(SHAPE, dtype, channels_last, requires_grad=True) for _ in range(2))
    return x, make_weights(SHAPE[1], HIDDEN, dtype, requires_grad=True), residual, channels_last


@pytest.mark.cpu_only
def test_the_count_is_right():
    """Known: a clone is one map, two eager steps are two; what C++ allocates is counted as well."""
    x = make_map(SHAPE)
    assert allocations(x.clone) == [x.nbytes]
    assert full_and_small(lambda: x.sigmoid().relu(), x) == ([1, 1], 0)
    # Recorded, the op keeps z, hidden and scale; not recorded, they are scratch that the thread has already.
    weights = make_weights(SHAPE[1], HIDDEN, requires_grad=True)
    kept = 4 * SHAPE[0] * (2 * SHAPE[1] + HIDDEN)
    full, small = full_and_small(lambda: se_ext.squeeze_excite(x, *weights), x)
    assert full == [1]
    assert small >= kept
    with torch.no_grad():
        se_ext.squeeze_excite(x, *weights)
        assert full_and_small(lambda: se_ext.squeeze_excite(x, *weights), x) == ([1], 0)


@pytest.mark.cpu_only
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_forward_allocates_its_result(case, post, with_residual):
    x, weights, residual, channels_last = case
    residual = residual if with_residual else None

    def recorded():
        return se_ext.squeeze_excite(x, *weights, residual=residual, post_activation=post)

    def unrecorded():
        with torch.no_grad():
            return recorded()

    for function in (recorded, unrecorded):
        full, small = full_and_small(function, x)
        assert full == [1]
        assert small <= small_bytes(x, channels_last)


@pytest.mark.cpu_only
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_a_step_allocates_results_and_gradients(case, post, with_residual):
    """y and the input's gradient; the residual's own, unless it is dL/dy itself."""
    x, weights, residual, channels_last = case
    residual = residual if with_residual else None
    grad = make_map(SHAPE, x.dtype, channels_last)
    wanted = [x, *weights, *([residual] if with_residual else [])]

    def step():
        y = se_ext.squeeze_excite(x, *weights, residual=residual, post_activation=post)
        return y, torch.autograd.grad(y, wanted, grad)

    full, small = full_and_small(step, x)
    assert full == [1] * (3 if with_residual and post != "identity" else 2)
    assert small <= 2 * small_bytes(x, channels_last)


@pytest.mark.cpu_only
def test_only_the_gradients_asked_for_are_allocated(case):
    """Frozen input: backward writes nothing of its size. Frozen residual: one map less."""
    x, weights, residual, channels_last = case
    grad = make_map(SHAPE, x.dtype, channels_last)
    for wanted, maps in ((weights, 1), ([x], 2), ([residual], 2), ([x, residual], 3)):
        others = {id(t) for t in (x, residual, *weights)} - {id(t) for t in wanted}
        for t in (x, residual, *weights):
            t.requires_grad_(id(t) not in others)

        def step(wanted=wanted):
            y = se_ext.squeeze_excite(x, *weights, residual=residual, post_activation="relu")
            return y, torch.autograd.grad(y, wanted, grad)

        full, _ = full_and_small(step, x)
        assert full == [1] * maps


@pytest.mark.cpu_only
def test_in_place_allocates_nothing_of_the_maps_size(case):
    x, weights, residual, channels_last = case
    scale = torch.rand(SHAPE[:2])
    target = x.detach().clone()
    with torch.no_grad():
        for r in (None, residual):
            for function in (
                lambda r=r: se_ext.squeeze_excite(target, *weights, residual=r, post_activation="relu", inplace=True),
                lambda r=r: torch.ops.se_ext.rescale_(target, scale, r, "relu"),
            ):
                full, small = full_and_small(function, x)
                assert full == []
                assert small <= small_bytes(x, channels_last)


@pytest.mark.cpu_only
def test_the_parts_allocate_their_results(case):
    x, _, residual, channels_last = case
    scale = torch.rand(SHAPE[:2], requires_grad=True)
    full, small = full_and_small(lambda: se_ext.squeeze(x), x)
    assert full == []
    assert small <= small_bytes(x, channels_last)
    full, small = full_and_small(lambda: torch.autograd.grad(se_ext.squeeze(x).sum(), x), x)
    assert full == []  # its gradient is an expanded view
    grad = make_map(SHAPE, x.dtype, channels_last)

    def step():
        y = se_ext.rescale(x, scale, residual, "relu")
        return y, torch.autograd.grad(y, [x, scale, residual], grad)

    full, small = full_and_small(step, x)
    assert full == [1, 1, 1]
    assert small <= small_bytes(x, channels_last)


@pytest.mark.cpu_only
@pytest.mark.parametrize("mode", ["inference", "in place", "step"])
def test_scratch_that_a_thread_keeps_is_small(case, mode):
    """On its first call a thread's buffer (csrc/cpu/scratch.h) grows, which warmed-up counts don't see."""
    x, weights, residual, channels_last = case
    target, grad = x.detach().clone(), make_map(SHAPE, x.dtype, channels_last)

    def call():
        if mode == "step":
            y = se_ext.squeeze_excite(x, *weights, residual=residual, post_activation="silu")
            return y, torch.autograd.grad(y, [x, *weights, residual], grad)
        with torch.no_grad():
            inplace = mode == "in place"
            return se_ext.squeeze_excite(target, *weights, residual=residual, post_activation="silu", inplace=inplace)

    expected = {"inference": 1, "in place": 0, "step": 3}[mode]
    with ThreadPoolExecutor(1) as new_thread:
        sizes = new_thread.submit(allocations, call, warm_up=False).result()
    small = [s for s in sizes if 2 * s < x.nbytes]
    assert [s for s in sizes if 2 * s >= x.nbytes] == [x.nbytes] * expected
    assert max(small) >= 2**16  # the buffer was seen; it starts at 64 KB
    assert sum(small) <= 2 * 2**16 + 2 * small_bytes(x, channels_last)


@pytest.mark.cpu_only
def test_wide_channels_last_needs_no_map_of_partial_sums():
    """A tile of 8192 channels is one pixel: its row of sums is as long as the tile itself."""
    x = make_map((1, 8192, 16, 16), channels_last=True)
    full, _ = full_and_small(lambda: se_ext.squeeze(x), x)
    assert full == []


@pytest.mark.parametrize("op", ["squeeze_excite", "rescale"])
@pytest.mark.parametrize("post", ["identity", *SLOPE_FROM_OUTPUT, *SLOPE_FROM_INPUT])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_saved_for_backward(case, op, post, with_residual):
    """x itself; with a residual also y where the slope follows from it, the residual where not. No copy of any."""
    x, weights, residual, _ = case
    residual = residual if with_residual else None
    scale = torch.rand(SHAPE[:2], requires_grad=True)

    def forward():
        if op == "rescale":
            return se_ext.rescale(x, scale, residual, post)
        return se_ext.squeeze_excite(x, *weights, residual=residual, post_activation=post)

    y, saved = saved_maps(forward, x.numel())
    expected = {x.data_ptr()}
    if with_residual and post in SLOPE_FROM_OUTPUT:
        expected.add(y.data_ptr())
    if with_residual and post in SLOPE_FROM_INPUT:
        expected.add(residual.data_ptr())
    assert sorted(saved) == sorted(expected)


def test_squeeze_saves_nothing(case):
    x = case[0]
    _, saved = saved_maps(lambda: se_ext.squeeze(x), x.numel())
    assert saved == []
