"""Nothing of the map's size is allocated but results, and nothing saved for backward but what the slope needs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import make_map, make_weights, saved_maps
from ops import SLOPES, OpCase, Options, cases
from torch.profiler import ProfilerActivity, profile

import se_ext

SHAPE = (8, 64, 28, 28)
HIDDEN = 4
POSTS = ["identity", "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "hardswish"]


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


with_map = cases(lambda case: case.has_map and case.differentiable and not case.writes)
formats = pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
# The ends of a block: what stands before it (for the ops that have that) and after it, and whether a shortcut is added.
ENDS = [
    ("identity", "identity", False),
    ("silu", "identity", True),
    ("identity", "relu", True),
    ("silu", "relu", False),
    ("identity", "silu", False),
    ("silu", "silu", True),
]
EVERY_END = [(pre, post, residual) for pre in ("identity", "silu") for post in POSTS for residual in (False, True)]


def ends(case: OpCase, of: list[tuple[str, str, bool]]) -> list[Options]:
    """Options that differ in what the op takes."""
    found: dict[str, Options] = {}
    for pre, post, residual in of:
        taken = {"pre_activation": pre, "post_activation": post, "residual": residual}
        taken["activation"] = "relu" if "gate" in case.names else post
        key = str([value for name, value in taken.items() if name in case.names])
        found.setdefault(key, Options(SHAPE, HIDDEN, requires_grad=True, **taken))
    return list(found.values())


@pytest.mark.cpu_only
@formats
@with_map
def test_forward_allocates_its_result(case, dtype, channels_last):
    for options in ends(case, ENDS):
        arguments = case.make(replace(options, dtype=dtype, weight_dtype=dtype, channels_last=channels_last))
        x = arguments["input"]
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                full, small = full_and_small(lambda arguments=arguments: case.run(arguments), x)
            assert full == [1] * (case.name != "squeeze"), options
            assert small <= small_bytes(x, channels_last), options


@pytest.mark.cpu_only
@formats
@with_map
def test_a_step_allocates_results_and_gradients(case, dtype, channels_last):
    """y and the input's gradient, which is an expanded view for squeeze; the residual's own, unless it is dL/dy."""
    for options in ends(case, ENDS):
        arguments = case.make(replace(options, dtype=dtype, weight_dtype=dtype, channels_last=channels_last))
        x = arguments["input"]
        with torch.no_grad():
            grad = torch.randn_like(case.run(arguments)[0])
        full, small = full_and_small(lambda arguments=arguments, grad=grad: case.step(arguments, grad), x)
        maps = 2 * (case.name != "squeeze")
        if "residual" in case.leaves(arguments) and options.post_activation != "identity":
            maps += 1
        assert full == [1] * maps, options
        assert small <= 2 * small_bytes(x, channels_last), options


@formats
@with_map
def test_saved_for_backward(case, dtype, channels_last):
    """x itself; with a residual also y where the slope follows from it, the residual where not. No copy of any. Eager
    saves three to five maps behind a batch norm."""
    for options in ends(case, EVERY_END):
        arguments = case.make(replace(options, dtype=dtype, weight_dtype=dtype, channels_last=channels_last))
        x, residual = arguments["input"], arguments.get("residual")
        y, saved = saved_maps(lambda arguments=arguments: case.run(arguments)[0], x.numel())
        expected = set() if case.name == "squeeze" else {x.data_ptr()}
        if residual is not None and options.post_activation in SLOPES:
            expected.add(y.data_ptr())
        elif residual is not None and options.post_activation != "identity":
            expected.add(residual.data_ptr())
        assert sorted(saved) == sorted(expected), options


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
