"""What the tests share: the device they run on, random data, the tolerance table, and comparisons.

SE_EXT_CUDA_HOST=<library> loads a library that puts the CUDA kernels, compiled for the host, in the place of the CPU's.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import se_ext

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

CUDA_HOST = os.environ.get("SE_EXT_CUDA_HOST") or None
if CUDA_HOST:
    torch.ops.load_library(CUDA_HOST)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = {torch.bfloat16, torch.float16}
ACTIVATIONS = list(se_ext.reference.ACTIVATIONS)
GATES = list(se_ext.reference.GATES)
CPU = torch.device("cpu")
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
# The kinds of tensors that bad input is tried with.
MODES = ("real", "fake", "meta")
# What the in-place ops say of a residual that shares a part of its memory with input.
PARTIAL_OVERLAP = (
    "expected residual to be apart from input or the same tensor (the op writes into input), got one that overlaps "
    "it in part"
)
# A device that we have no kernels for: its dispatch key, under which CPU tensors are redispatched.
OTHER_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)
RANDOM = ("rand", "randn", "randint", "rand_like", "randn_like")


# ---- where the tests run ----


_devices = [CPU]  # the last one counts; a program that imports this file without pytest stays on the CPU


def use_device(device: torch.device) -> None:
    """Says where the tests' tensors are from now on."""
    _devices.append(device)


def device() -> torch.device:
    """Where the tests' tensors are: on the device that --device names."""
    return _devices[-1]


def emulated_cuda() -> bool:
    """Whether CPU tensors go to CUDA kernels compiled for the host."""
    return CUDA_HOST is not None


def cpu_kernels() -> bool:
    """Whether the tests' tensors go to the CPU kernels."""
    return device() == CPU and not emulated_cuda()


def thread_counts(*counts: int) -> tuple[int, ...]:
    """The numbers of threads to compute with: one is enough for kernels other than the CPU's."""
    return counts if cpu_kernels() else (1,)


def cuda_is_required() -> bool:
    return os.environ.get("SE_EXT_REQUIRE_CUDA") == "1"


def missing_cuda() -> str | None:
    """Why the GPU tests cannot run, or None. (Without CUDA kernels of ours they would test the plain formula.)"""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("se_ext::squeeze_excite", "CUDA"):
        return "se_ext was built without CUDA kernels"
    return None


def need_cuda() -> None:
    """Skips the test without a GPU; with SE_EXT_REQUIRE_CUDA=1 fails it."""
    if reason := missing_cuda():
        if cuda_is_required():
            pytest.fail(f"SE_EXT_REQUIRE_CUDA=1, but {reason}")
        pytest.skip(reason)


def package(name: str) -> ModuleType:
    """A module that a few tests compare with. A machine with a GPU need not have it."""
    return importlib.import_module(name) if device() == CPU else pytest.importorskip(name)


def drawn_on_the_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same random numbers whatever the device: data that keep clear of a kink on one do so on all."""

    def draw(*args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        target = args[0].device if isinstance(args[0], Tensor) else torch.get_default_device()
        return function(*args, device="cpu", **kwargs).to(device or target).requires_grad_(requires_grad)

    return draw


@contextmanager
def tensors_on(where: torch.device) -> Iterator[None]:
    """Makes new tensors on that device, and keeps torch's own float32 results there from TensorFloat-32 rounding."""
    with pytest.MonkeyPatch.context() as patch:
        for name in RANDOM:
            patch.setattr(torch, name, drawn_on_the_cpu(getattr(torch, name)))
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        torch.set_default_device(where)
        try:
            yield
        finally:
            torch.set_default_device(None)


def tolerance(dtype: torch.dtype, summed: int = 1) -> float:
    """The largest allowed error of a result, relative to the largest magnitude in the float64 result.

    Two parts. Storing the result in `dtype` rounds it by eps/2; a few stored or evaluated factors stand before it
    (z, hidden, scale, the activation), each contributing about eps: 8 eps in all. A sum of `summed` terms in the
    accumulation type errs by at most its eps times the length, and for rounding errors of random sign by the square
    root of it; 4 standard deviations are allowed.
    """
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    return 8 * torch.finfo(dtype).eps + 4 * math.sqrt(summed) * torch.finfo(accumulate).eps


def assert_moved_alike(before: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Compares running statistics that moved once, before + part · off, by two routes.

    One route may round the product (an error of half an ulp of the move) where the other fuses it into the sum, and the
    last roundings differ by an ulp. A part above a half is counted from the other end, by less than the move.
    """
    eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
    allowed = eps * theirs.abs() + eps / 2 * (theirs - before).abs()
    assert ((ours - theirs).abs() <= allowed).all(), ((ours - theirs).abs() - allowed).max()


def assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype, summed: int = 1) -> None:
    """Compares with a float64 result; see `tolerance`."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    assert exact.dtype is torch.float64
    error = (actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)
    assert error <= tolerance(dtype, summed), f"relative error {error:.3g}, allowed {tolerance(dtype, summed):.3g}"


def assert_near(actual: Tensor, expected: Tensor, what: str = "output", allowed: float = 2e-5) -> None:
    """Compares what a network gives, relative to the largest magnitude.

    By default a few layers in float32 with the same in float64: some hundred roundings. What goes wrong between layers
    (a stale buffer, a wrong layout) is off by more than 0.1.
    """
    assert actual.shape == expected.shape, what
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"


def bits(t: Tensor) -> Tensor:
    """As integers: -0 and 0 differ, and a NaN equals itself."""
    t = t.detach().contiguous()
    return t.view(INTEGER[t.element_size()]) if t.is_floating_point() else t


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    """Compares tensors one by one: shape, dtype and every bit."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"tensor {i}: {what}"
        assert torch.equal(bits(a), bits(b)), f"tensor {i} differs: {what}"


class Watch(TorchDispatchMode):
    """Lists the operators that run, and changes none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def memory_format(dim: int, channels_last: bool) -> torch.memory_format:
    """channels_last for maps of 4 and 5 dims, contiguous elsewhere."""
    if not channels_last or dim == 3:
        return torch.contiguous_format
    return torch.channels_last if dim == 4 else torch.channels_last_3d


def make_map(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False, requires_grad: bool = False
) -> Tensor:
    """A random map whose channels have means of their own, or squeeze would have nothing to find."""
    x = torch.randn(shape, dtype=torch.float64) + torch.randn(shape[:2] + (1,) * (len(shape) - 2), dtype=torch.float64)
    x = x.to(dtype).contiguous(memory_format=memory_format(len(shape), channels_last))
    return x.requires_grad_(requires_grad)


def make_weights(
    channels: int, hidden: int, dtype: torch.dtype = torch.float32, bias: bool = True, requires_grad: bool = False
) -> list[Tensor | None]:
    """Random w1, b1, w2, b2, scaled so that the gates are neither open nor shut."""

    def weight(*shape: int) -> Tensor:
        w = torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1] if len(shape) > 1 else 4)
        return w.to(dtype).requires_grad_(requires_grad)

    return [
        weight(hidden, channels),
        weight(hidden) if bias else None,
        weight(channels, hidden),
        weight(channels) if bias else None,
    ]


def to_float64(t: Tensor | None) -> Tensor | None:
    """A float64 leaf with the same value: an input of the oracle."""
    return None if t is None else t.detach().double().requires_grad_(t.requires_grad)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the oracle on one thread: its tiny matrix products, spread over threads, would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_against_float64(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: list[Tensor | None],
    summed: tuple[int, int],
    grad: Tensor | None = None,
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


@contextmanager
def tensors_of(mode: str) -> Iterator[str]:
    """Makes new tensors real, fake, or meta; yields the device of another kind than theirs."""
    if mode == "fake":
        with FakeTensorMode():
            yield "meta"
    elif mode == "meta":
        with torch.device("meta"):
            yield "cpu"
    else:
        yield "meta"


def redispatch(name: str, *args: object) -> Any:
    """Calls the op's kernel for devices that we have no kernels for: the plain formula."""
    return getattr(torch.ops.se_ext, name).default.redispatch(OTHER_DEVICE, *args)


def saved_maps(function: Callable[[], Tensor], size: int) -> tuple[Tensor, list[int]]:
    """(the result, the addresses of the tensors of `size` elements that autograd saved)."""
    saved = []

    def pack(t: Tensor) -> Tensor:
        if t.numel() == size:
            saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return y, saved
