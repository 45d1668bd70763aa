"""Fixtures and hooks: where the tests run, which of them, and on what random numbers.

pytest --device cuda (or SE_EXT_TEST_DEVICE=cuda) runs the same tests on a GPU, on the same random numbers. Without a
GPU they skip; SE_EXT_REQUIRE_CUDA=1 turns the skip into a failure.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    CPU,
    cpu_kernels,
    cuda_is_required,
    device,
    emulated_cuda,
    missing_cuda,
    need_cuda,
    tensors_on,
    use_device,
)

from se_ext import _C

UNCAPTURED = pytest.StashKey[int]()  # stderr as it was before pytest captured it


def pytest_addoption(parser: pytest.Parser) -> None:
    default = os.environ.get("SE_EXT_TEST_DEVICE", "cpu")
    parser.addoption("--device", default=default, help="where the tests' tensors are: cpu (default) or cuda")
    parser.addoption(
        "--test-limit-s", type=float, default=0, help="end the process, with a traceback, where a test takes longer"
    )


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
    use_device(torch.device(place))
    config.stash[UNCAPTURED] = os.dup(2)  # nothing is captured yet
    config.addinivalue_line("markers", "slow: needs gigabytes or minutes; runs where SE_EXT_SLOW=1")
    config.addinivalue_line("markers", "cpu_only: tests the CPU kernels, or something beside the ops; not for a GPU")
    config.addinivalue_line("markers", "large: maps of millions of elements, too many for emulated kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run on request; tests of the CPU kernels where the CPU kernels run."""
    skips = {}
    if os.environ.get("SE_EXT_SLOW") != "1":
        skips["slow"] = "slow; set SE_EXT_SLOW=1 to run it"
    if not cpu_kernels():
        skips["cpu_only"] = "tests the CPU kernels, or something beside the ops"
    if emulated_cuda():
        skips["large"] = "too large for emulated kernels"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that waits for a GPU cannot be interrupted: the process ends, which says where."""
    limit = item.config.getoption("--test-limit-s")
    if not limit:
        return (yield)
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[UNCAPTURED])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


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


@pytest.fixture(autouse=True, scope="module")
def no_compiled_code_of_other_files() -> Iterator[None]:
    """torch runs a function uncompiled that was compiled too often, and counts what every file compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
