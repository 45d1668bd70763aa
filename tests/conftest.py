"""Shared by all tests: data and where they are, the tolerance table, and what a missing capability means.

pytest --device cuda (or SE_EXT_TEST_DEVICE=cuda) runs the same tests on a GPU, on the same random numbers. Without a
GPU they skip; SE_EXT_REQUIRE_CUDA=1 makes that a failure. SE_EXT_CUDA_HOST=<library> loads a library that puts the CUDA
kernels, compiled for the host, in the place of the CPU's.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import se_ext
from se_ext import _C

CUDA_HOST = os.environ.get("SE_EXT_CUDA_HOST") or None
if CUDA_HOST:
    torch.ops.load_library(CUDA_HOST)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = {torch.bfloat16, torch.float16}
ACTIVATIONS = list(se_ext.reference.ACTIVATIONS)
GATES = list(se_ext.reference.GATES)
CPU = torch.device("cpu")
# Files of tests that do not depend on the instruction set of the CPU kernels: `make test-isa` does not repeat them.
ONCE = (
    *("test_benchmark", "test_build", "test_compiled_networks", "test_demo", "test_flops", "test_fx", "test_loader"),
    *("test_names", "test_report", "test_setup_cuda"),
)
RANDOM = ("rand", "randn", "randint", "rand_like", "randn_like")


# ---- where the tests run ----


def pytest_addoption(parser: pytest.Parser) -> None:
    default = os.environ.get("SE_EXT_TEST_DEVICE", "cpu")
    parser.addoption("--device", default=default, help="where the tests' tensors are: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    """SE_EXT_REQUIRE_ISA=avx512 turns a run on lesser kernels into a failure instead of a quiet pass, and
    SE_EXT_REQUIRE_CUDA=1 one without a GPU."""
    required = os.environ.get("SE_EXT_REQUIRE_ISA")
    if required and _C.cpu_capability() != required:
        raise pytest.UsageError(f"SE_EXT_REQUIRE_ISA={required}, but {_C.cpu_capability()} kernels are in use")
    place = config.getoption("--device")
    if place not in ("cpu", "cuda"):
        raise pytest.UsageError(f"expected --device (or SE_EXT_TEST_DEVICE) to be cpu or cuda, got {place!r}")
    if place == "cuda" and cuda_is_required() and (reason := missing_cuda()):
        raise pytest.UsageError(f"--device cuda with SE_EXT_REQUIRE_CUDA=1, but {reason}")
    _place.append(torch.device(place))
    config.addinivalue_line("markers", "slow: needs gigabytes or minutes; runs where SE_EXT_SLOW=1")
    config.addinivalue_line("markers", "cpu_only: of the CPU kernels or of what is beside the ops; not for a GPU")
    config.addinivalue_line("markers", "large: of maps of millions of elements, too many for emulated kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run on request, and those of the CPU's kernels where these run."""
    skips = {}
    if os.environ.get("SE_EXT_SLOW") != "1":
        skips["slow"] = "slow; set SE_EXT_SLOW=1 to run it"
    if not cpu_kernels():
        skips["cpu_only"] = "of the CPU kernels, or of what is beside the ops"
    if emulated_cuda():
        skips["large"] = "too large for emulated kernels"
    for item in items:
        if os.environ.get("SE_EXT_CPU_ISA") and item.path.stem.startswith(ONCE):
            item.add_marker(pytest.mark.skip(reason="does not depend on the instruction set"))
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


_place = [CPU]  # the last one counts; what imports this file without pytest stays on the CPU


def device() -> torch.device:
    """Where the tests' tensors are: what --device says."""
    return _place[-1]


def emulated_cuda() -> bool:
    """Whether CPU tensors go to CUDA kernels compiled for the host."""
    return CUDA_HOST is not None


def cpu_kernels() -> bool:
    """Whether it is the CPU kernels that the tests' tensors go to."""
    return device() == CPU and not emulated_cuda()


def thread_counts(*counts: int) -> tuple[int, ...]:
    """The numbers of threads to compute with; one is enough where they are not the CPU kernels' own."""
    return counts if cpu_kernels() else (1,)


def cuda_is_required() -> bool:
    return os.environ.get("SE_EXT_REQUIRE_CUDA") == "1"


def missing_cuda() -> str | None:
    """What there is no GPU test without, or None. (Without kernels of ours the plain formula would be tested.)"""
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


def drawn_on_the_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same random numbers whatever the device: data that keep clear of a kink on one do so on all."""

    def draw(*args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        target = args[0].device if isinstance(args[0], torch.Tensor) else torch.get_default_device()
        return function(*args, device="cpu", **kwargs).to(device or target).requires_grad_(requires_grad)

    return draw


@contextmanager
def tensors_on(where: torch.device) -> Iterator[None]:
    """New tensors are made there, and what torch computes in float32 there is not rounded to TensorFloat-32."""
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


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    if device() == CPU:
        yield
        return
    need_cuda()
    with tensors_on(device()):
        yield


@pytest.fixture(autouse=True)
def fresh_random_data(on_the_device: None) -> None:
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


def assert_moved_alike(before: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of running statistics that moved once, before + part · off, by two routes: one may round the product (half an ulp
    of what was moved) where the other fuses it into the sum, and the last roundings differ by an ulp. With part above a
    half it is taken from the other end, by less than was moved."""
    eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
    allowed = eps * theirs.abs() + eps / 2 * (theirs - before).abs()
    assert ((ours - theirs).abs() <= allowed).all(), ((ours - theirs).abs() - allowed).max()


def assert_close(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, summed: int = 1) -> None:
    """Compares with a float64 result; see `tolerance`."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    assert exact.dtype is torch.float64
    error = (actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)
    assert error <= tolerance(dtype, summed), f"relative error {error:.3g}, allowed {tolerance(dtype, summed):.3g}"


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
