"""Shared by all tests: data, the tolerance table, and what a missing capability means."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import se_ext
from se_ext import _C

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = {torch.bfloat16, torch.float16}
ACTIVATIONS = list(se_ext.reference.ACTIVATIONS)
GATES = list(se_ext.reference.GATES)


def pytest_configure(config: pytest.Config) -> None:
    """SE_EXT_REQUIRE_ISA=avx512 turns a run on lesser kernels into a failure instead of a quiet pass."""
    required = os.environ.get("SE_EXT_REQUIRE_ISA")
    if required and _C.cpu_capability() != required:
        raise pytest.UsageError(f"SE_EXT_REQUIRE_ISA={required}, but {_C.cpu_capability()} kernels are in use")
    config.addinivalue_line("markers", "slow: needs gigabytes or minutes; runs where SE_EXT_SLOW=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run on request."""
    if os.environ.get("SE_EXT_SLOW") == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; set SE_EXT_SLOW=1 to run it"))


@pytest.fixture(autouse=True)
def fresh_random_data() -> None:
    torch.manual_seed(20260101)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tolerance(dtype: torch.dtype, summed: int = 1) -> float:
    """The largest allowed error of a result, relative to the largest magnitude in the float64 result.

    Two parts. Storing the result in `dtype` rounds it by eps/2; a few stored or evaluated factors stand before it
    (z, hidden, scale, the activation), each contributing about eps: 8 eps in all. A sum of `summed` terms in the
    accumulation type errs by at most its eps times the length, and for rounding errors of random sign by the square
    root of it; 4 standard deviations are allowed.
    """
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    return 8 * torch.finfo(dtype).eps + 4 * math.sqrt(summed) * torch.finfo(accumulate).eps


def assert_close(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, summed: int = 1) -> None:
    """Compares with a float64 result; see `tolerance`."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    assert exact.dtype is torch.float64
    error = (actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)
    assert error <= tolerance(dtype, summed), f"relative error {error:.3g}, allowed {tolerance(dtype, summed):.3g}"


def memory_format(dim: int, channels_last: bool) -> torch.memory_format:
    """channels_last for maps of 4 and 5 dims, contiguous elsewhere."""
    if not channels_last or dim == 3:
        return torch.contiguous_format
    return torch.channels_last if dim == 4 else torch.channels_last_3d


def make_map(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False, requires_grad: bool = False
) -> torch.Tensor:
    """A random map whose channels have means of their own, or squeeze would have nothing to find."""
    x = torch.randn(shape, dtype=torch.float64) + torch.randn(shape[:2] + (1,) * (len(shape) - 2), dtype=torch.float64)
    x = x.to(dtype).contiguous(memory_format=memory_format(len(shape), channels_last))
    return x.requires_grad_(requires_grad)


def make_weights(
    channels: int, hidden: int, dtype: torch.dtype = torch.float32, bias: bool = True, requires_grad: bool = False
) -> list[torch.Tensor | None]:
    """Random w1, b1, w2, b2, scaled so that the gates are neither open nor shut."""

    def weight(*shape: int) -> torch.Tensor:
        w = torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1] if len(shape) > 1 else 4)
        return w.to(dtype).requires_grad_(requires_grad)

    return [
        weight(hidden, channels),
        weight(hidden) if bias else None,
        weight(channels, hidden),
        weight(channels) if bias else None,
    ]


def to_float64(t: torch.Tensor | None) -> torch.Tensor | None:
    """A float64 leaf with the same value: an input of the oracle."""
    return None if t is None else t.detach().double().requires_grad_(t.requires_grad)


@contextmanager
def one_thread() -> Iterator[None]:
    """For the oracle: its tiny matrix products, spread over threads, would take most of the tests' time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_against_float64(
    fused: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor | None],
    summed: tuple[int, int],
    grad: torch.Tensor | None = None,
) -> None:
    """fused(*tensors) against plain(*tensors) in float64: the value, and the gradient of every tensor that wants one.

    The first tensor's dtype is the result's. `summed`: the longest sums in forward and in backward, for `tolerance`.
    `grad`: dL/dy, random unless given.
    """
    dtype = tensors[0].dtype
    exact_tensors = [to_float64(t) for t in tensors]
    y = fused(*tensors)
    with one_thread():
        exact = plain(*exact_tensors)
    assert y.dtype is dtype
    assert_close(y, exact, dtype, summed[0])
    wanted = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]
    if not wanted:
        assert not y.requires_grad
        return
    if grad is None:
        grad = torch.randn_like(y, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, [tensors[i] for i in wanted], grad)
    with one_thread():
        exact_grads = torch.autograd.grad(exact, [exact_tensors[i] for i in wanted], grad.double())
    for i, actual, exact_grad in zip(wanted, grads, exact_grads, strict=True):
        assert actual.dtype is tensors[i].dtype, f"gradient {i}"
        try:
            assert_close(actual, exact_grad, dtype, summed[1])
        except AssertionError as error:
            raise AssertionError(f"gradient of tensor {i}: {error}") from None
