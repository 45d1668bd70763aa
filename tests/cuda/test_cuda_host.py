"""The CUDA backend without a GPU: its adapters and kernels, compiled for the host (tests/cuda_host), on CPU tensors.

`make cuda-host` builds them with AddressSanitizer and runs this file; the order of threads between two barriers is
another one in every launch. What is proved are indices, tails, reductions and barriers, and nothing about speed or the
memory model. The rest of the suite runs there too: make cuda-host SANITIZE=none ARGS=tests.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CUDA_HOST,
    DTYPES,
    HALF,
    TESTS,
    assert_same_bits,
    check_against_float64,
    emulated_cuda,
    make_map,
    make_weights,
)
from torch import Tensor

import se_ext
from se_ext import reference

pytestmark = pytest.mark.skipif(not emulated_cuda(), reason="of the kernels on the host: make cuda-host")

PATHS = ("whole", "chunked", "cluster", "auto")
# By how a slab is cut: rows of whole accesses of 16 bytes, of 8 in half types, without alignment in samples that have
# it, and in samples that don't; one tile and several; shares of a cluster that are not equal; one point, one channel;
# groups of several pieces in the products of a backward.
SHAPES = {
    "aligned rows": (3, 72, 15, 16),
    "half-aligned rows": (4, 72, 2, 6),
    "rows across accesses": (3, 72, 7, 33),
    "odd": (3, 19, 5, 7),
    "one point": (5, 24, 1, 1),
    "one channel": (2, 1, 9, 5),
    "three channels": (2, 3, 4, 4),
    "many channels": (2, 264, 3, 5),
    "volume": (2, 40, 3, 5, 7),
    "sequence": (3, 20, 50),
}
LARGE = {"rows in tiles": (1, 2, 147, 149), "many tiles of points": (1, 8, 260, 270)}
LAYOUTS = {"first": False, "last": True}


def host() -> ctypes.CDLL:
    library = ctypes.CDLL(CUDA_HOST)
    library.cuda_host_last_path.restype = ctypes.c_char_p
    for function in (library.cuda_host_plan, library.cuda_host_cluster, library.cuda_host_estimate):
        function.argtypes = [ctypes.c_bool] * 3 + [ctypes.c_long] * 4
    library.cuda_host_threads_that_sum.argtypes = [ctypes.c_bool] + [ctypes.c_long] * 3
    return library


def cluster_of(backward: bool, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[int]:
    """The blocks of the cluster that an inference or a backward takes, the lines that each keeps, and the lines of a
    share."""
    found = (ctypes.c_long * 3)()
    host().cuda_host_cluster(backward, dtype.itemsize == 2, last, shape[1], math.prod(shape[2:]), shape[0], 12, found)
    return list(found)


def set_path(name: str) -> None:
    host().cuda_host_set_path(name.encode())


def last_path() -> str:
    return host().cuda_host_last_path().decode()


@pytest.fixture(autouse=True)
def automatic_path() -> Iterator[None]:
    yield
    set_path("auto")


def longest(shape: tuple[int, ...], hidden: int) -> int:
    return math.prod(shape) + shape[1] + hidden


class Problem:
    """A map with all that stands around it, in one dtype and layout."""

    took = took_behind_prologue = took_backward = ""  # the paths of the last inference, and of the last step

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool, hidden: int = 12, wide: bool = False):
        self.shape, self.dtype, self.hidden = shape, dtype, hidden
        self.x, self.residual, self.grad = (make_map(shape, dtype, last) for _ in range(3))
        weight_dtype = torch.float32 if wide else dtype
        self.weights = make_weights(shape[1], hidden, weight_dtype)
        self.bn = [(torch.rand(shape[1]) + 0.5).to(dtype), torch.randn(shape[1]).to(dtype)]
        self.drop = (torch.rand(shape[0]) + 0.5).to(dtype)

    def inference(self) -> list[Tensor]:
        """Plain; with a residual and an activation; behind an affine map and an activation."""
        with torch.no_grad():
            plain = se_ext.squeeze_excite(self.x, *self.weights)
            self.took = last_path()
            tail = se_ext.squeeze_excite(self.x, *self.weights, "silu", "hardsigmoid", self.residual, "gelu")
            op = torch.ops.se_ext.bn_squeeze_excite
            y, _, _ = op(
                self.x, *self.bn, *self.weights, False, 1e-5, "silu", "relu", "sigmoid", None, "identity", None
            )
            z, _, _ = op(
                *(self.x, *self.bn, *self.weights, False, 1e-5),
                *("hardswish", "tanh", "sigmoid", self.residual, "relu", self.drop),
            )
            self.took_behind_prologue = last_path()
            return [plain, tail, y, z]

    def step(self) -> list[Tensor]:
        """Outputs and gradients of the block, and of the block behind a batch norm."""
        leaves = [t.detach().requires_grad_() for t in (self.x, *self.weights, self.residual, *self.bn)]
        x, w1, b1, w2, b2, r, weight, bias = leaves
        y = se_ext.squeeze_excite(x, w1, b1, w2, b2, residual=r, post_activation="silu")
        found = [y, *torch.autograd.grad(y, leaves[:6], self.grad)]
        self.took_backward = last_path()
        # Two maps to read; and the output, in place of the residual, which alone has a gradient.
        y = se_ext.squeeze_excite(x, w1, b1, w2, b2, "hardswish", "hardsigmoid")
        found += torch.autograd.grad(y, leaves[:5], self.grad)
        y = se_ext.squeeze_excite(x.detach(), w1, b1, w2, b2, residual=r, post_activation="relu")
        found += torch.autograd.grad(y, (w1, b2, r), self.grad)
        for pre in ("identity", "silu"):
            y = se_ext.bn_squeeze_excite(
                *(x, weight, bias, None, None, w1, b1, w2, b2),
                training=True,
                pre_activation=pre,
                residual=r,
                post_activation="relu",
                drop_scale=self.drop,
            )
            found += [y, *torch.autograd.grad(y, leaves, self.grad)]
        for training, residual, drop in ((True, r, self.drop), (True, None, None), (False, r, None)):
            y, *statistics = torch.ops.se_ext._bn_activation(x, weight, bias, training, 1e-5, "relu", residual, drop)
            wanted = (x, weight, bias) if residual is None else (x, weight, bias, r)
            found += [y, *statistics, *torch.autograd.grad(y, wanted, self.grad)]
        return found


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_path_gives_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    check_every_path(shape, dtype, last)


def check_every_path(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    """The same bits, and right ones; a forced path is taken. The order of the threads is another one each time."""
    problem = Problem(shape, dtype, last, wide=dtype is torch.float16)
    expected = None
    for path in PATHS:
        set_path(path)
        found = problem.inference() + problem.step()
        if path != "auto":
            assert (problem.took, problem.took_behind_prologue, problem.took_backward) == (path, path, path)
        if expected is None:
            expected = found
        assert_same_bits(found, expected, f"{path} and {PATHS[0]}")
    set_path("whole")
    length = longest(shape, problem.hidden)
    check_against_float64(
        lambda x, *w: se_ext.squeeze_excite(x, *w[:4], "silu", "hardsigmoid", w[4], "gelu"),
        lambda x, *w: reference.squeeze_excite(x, *w[:4], "silu", "hardsigmoid", w[4], "gelu"),
        [problem.x, *problem.weights, problem.residual],
        (length, length),
    )


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("backward", "half", "channels", "points", "samples", "hidden", "path"),
    [
        (False, False, 256, 56 * 56, 1, 16, "whole"),  # a cluster holds half of its slab, and one sample is one chunk
        (False, False, 256, 56 * 56, 15, 16, "whole"),  # clusters for all multiprocessors but a few
        (False, False, 256, 56 * 56, 16, 16, "cluster"),  # what is not kept is read again from the L2 cache
        (False, False, 256, 56 * 56, 128, 16, "cluster"),
        (False, False, 512, 56 * 56, 128, 32, "whole"),  # where a quarter of it has no room
        (False, True, 256, 56 * 56, 128, 16, "cluster"),
        (False, False, 512, 28 * 28, 1, 32, "cluster"),
        (False, False, 512, 28 * 28, 256, 32, "cluster"),
        (False, False, 2048, 7 * 7, 1, 128, "cluster"),
        (False, False, 2048, 7 * 7, 512, 128, "whole"),  # the weights outweigh the slab
        # two maps
        (True, False, 256, 56 * 56, 128, 16, "whole"),
        (True, True, 256, 56 * 56, 128, 16, "cluster"),  # half of them has room
        (True, False, 1024, 14 * 14, 1, 64, "cluster"),
        (True, False, 1024, 14 * 14, 256, 64, "cluster"),
        (True, True, 1024, 14 * 14, 256, 64, "cluster"),
        (True, False, 2048, 7 * 7, 512, 128, "whole"),
    ],
)
def test_the_path_on_an_h200(
    backward: bool, half: bool, channels: int, points: int, samples: int, hidden: int, path: str, last: bool
) -> None:
    found = host().cuda_host_plan(backward, half, last, channels, points, samples, hidden)
    assert ("cluster", "chunked", "whole")[found] == path


def test_what_is_written_down_is_what_the_plan_expects() -> None:
    """The table in docs/tuning.md, which a measurement on a GPU is to be held against."""
    row = r"^\| (inference|backward) \| (\d+)×(\d+)×(\d+)×(\d+) \| (\d+) \| (float32|bfloat16) \| "
    row += r"(.*) \| (.*) \| (.*) \| (\w+) \|$"
    rows = re.findall(row, (TESTS.parent / "docs" / "tuning.md").read_text(), re.MULTILINE)
    assert len(rows) == 12
    for work, samples, channels, height, width, hidden, dtype, *times, chosen in rows:
        points = int(height) * int(width)
        arguments = (work == "backward", dtype == "bfloat16", False, int(channels), points, int(samples), int(hidden))
        expected = (ctypes.c_double * 3)()
        host().cuda_host_estimate(*arguments, expected)
        assert times == [f"{us:.1f}" if math.isfinite(us) else "–" for us in expected]
        assert ("cluster", "chunked", "whole")[host().cuda_host_plan(*arguments)] == chosen


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("samples", [1, 20, 140])
def test_clusters_are_as_large_as_the_batch_is_small(samples: int, last: bool) -> None:
    """On 132 multiprocessors; and no other path has any."""
    problem = Problem((samples, 72, 15, 16), torch.float32, last)
    results = []
    for path in PATHS[:3]:
        set_path(path)
        host().cuda_host_largest_cluster()
        results.append(problem.inference())
        assert host().cuda_host_largest_cluster() == (1 if path != "cluster" else {1: 8, 20: 4, 140: 1}[samples])
        assert_same_bits(results[-1], results[0], path)


def test_all_threads_sum_a_share_of_few_channels() -> None:
    """Of a thread block in a cluster of eight, in channels_last: not only those that stand over its columns."""
    threads = host().cuda_host_threads_that_sum
    assert threads(True, 256, 56 * 56, 4) == 256
    assert threads(False, 512, 28 * 28, 16) == 256
    assert threads(True, 256, 14 * 14, 4) == 256
    assert threads(True, 2048, 7 * 7, 32) == 256
    assert threads(True, 256, 7 * 7, 4) == 64  # two tiles are all that the sum has


def run_with(set_up: str, program: str) -> list[str]:
    """What the program prints. A kernel and a device are asked once what they are: another answer needs another
    process."""
    folders = [str(TESTS), str(Path(__file__).parent)]
    start = f"import sys, torch\nsys.path[:0] = {folders}\nimport helpers, test_cuda_host as t\nhost = t.host()\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{start}{set_up}\n{program}"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()


# Its slab needs eight thread blocks.
NEEDS_A_CLUSTER = (2, 72, 48, 64)
EVERY_PATH = """
torch.manual_seed(1)
for last in (False, True):
    for shape in (t.NEEDS_A_CLUSTER, (2, 72, 7, 33)):
        problem, results = t.Problem(shape, torch.float32, last), []
        for path in ("whole", "cluster"):
            t.set_path(path)
            results.append(problem.inference())
            print(problem.took, problem.took_behind_prologue)
        helpers.assert_same_bits(*results, "cluster and whole")
print(host.cuda_host_largest_cluster())
"""


def test_room_for_clusters() -> None:
    """A whole GPU, and a part of one whose clusters are of two thread blocks at most: no path fails."""
    both = ["whole", "whole", "cluster", "cluster"]
    assert run_with("", EVERY_PATH) == [*both * 4, "8"]
    assert run_with("host.cuda_host_set_room(2)", EVERY_PATH) == [*both * 4, "2"]


def test_ptx_of_a_gpu_without_clusters_on_one_that_has_them() -> None:
    """As a build for 8.0+PTX runs on sm_90: one thread block works on a sample, and keeps what it can of it."""
    both = ["whole", "whole", "cluster", "cluster"]
    assert run_with("host.cuda_host_set_ptx(80)", EVERY_PATH) == [*both * 4, "1"]


LITTLE_MEMORY = """
torch.manual_seed(1)
for attribute in (81, 97):
    host.cuda_host_set_attribute(attribute, room + 1024 * (attribute == 81))
host.cuda_host_set_room(blocks)
for shape in (*t.SHAPES.values(), *t.LARGE.values(), (2, 72, 20, 24)):
    for dtype in (torch.float32, torch.bfloat16):
        for last in (False, True):
            if t.Problem(shape, dtype, last).x[0].nbytes <= blocks * room:
                continue
            t.check_every_path(shape, dtype, last)
            t.set_path("cluster")
            for backward in (False, True):
                of_blocks, kept, lines = t.cluster_of(backward, shape, dtype, last)
                assert of_blocks == min(blocks, -(-shape[1] * dtype.itemsize // 16)) and 0 <= kept < lines
                if kept > 0:
                    print(f"{'backward' if backward else 'forward'}-{str(dtype)[6:]}-{'last' if last else 'first'}")
"""


@pytest.mark.parametrize(("blocks", "room"), [(1, 24_000), (2, 23_000)])
def test_a_part_of_a_slab_is_kept(blocks: int, room: int) -> None:
    """Of slabs that are larger than the shared memory of a whole cluster: channels, and tiles of points. Of some slabs
    no line has room, and all of them are read again."""
    passes, dtypes, layouts = ("forward", "backward"), ("float32", "bfloat16"), ("first", "last")
    kept = {"-".join(names) for names in itertools.product(passes, dtypes, layouts)}
    assert set(run_with(f"blocks, room = {blocks}, {room}", LITTLE_MEMORY)) == kept


def test_vectors_beyond_shared_memory() -> None:
    """The scales of 70,000 channels alone: no cluster's kernel."""
    problem = Problem((2, 70_000, 1, 1), torch.float32, False)
    set_path("cluster")
    problem.inference()
    problem.step()
    assert (problem.took, problem.took_behind_prologue, problem.took_backward) == ("whole", "whole", "whole")


MANY_ROWS = """
torch.manual_seed(1)
for name in ("rows across accesses", "half-aligned rows", "odd", "sequence"):
    for dtype in (torch.float32, torch.bfloat16):
        t.check_every_path(t.SHAPES[name], dtype, False)
print("done")
"""


def test_rows_in_turn() -> None:
    """On one multiprocessor the thread blocks that sum rows are so few that each takes several rows one after the
    other, and the last of them are beyond the end."""
    assert run_with("host.cuda_host_set_attribute(16, 1)", MANY_ROWS) == ["done"]


def test_shapes_side_by_side_in_two_threads() -> None:
    """One kernel, with much shared memory in one thread and with little in the other: the limit is set once, and never
    lowered."""
    large, small = (Problem((1, 72, *size), torch.float32, False) for size in ((32, 48), (24, 48)))
    expected = [problem.inference() for problem in (large, small)]
    set_path("cluster")
    limits = ctypes.c_int(), ctypes.c_int()
    host().cuda_host_limits(*map(ctypes.byref, limits))

    def run(problem: Problem) -> list[list[Tensor]]:
        return [problem.inference() for _ in range(8)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (large, small)))
    assert last_path() == "cluster"
    for runs, one in zip(found, expected, strict=True):
        for tensors in runs:
            assert_same_bits(tensors, one)
    host().cuda_host_limits(*map(ctypes.byref, limits))
    times_set, times_lowered = (limit.value for limit in limits)
    assert times_lowered == 0
    assert times_set <= 2  # of the kernels with and without a prologue, unless an earlier test has


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_tiles(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    """Rows and bands that are cut into many tiles: values and gradients."""
    tensors = [t.requires_grad_() for t in (make_map(shape, dtype, last), *make_weights(shape[1], 4, dtype))]
    outputs = []
    for path in ("whole", "cluster"):
        set_path(path)
        with torch.no_grad():
            outputs.append(se_ext.squeeze_excite(*tensors))
    assert_same_bits(outputs[1:], outputs[:1], "cluster and whole")
    length = longest(shape, 4)
    check_against_float64(se_ext.squeeze_excite, reference.squeeze_excite, tensors, (length, length))


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_norm_in_training(dtype: torch.dtype, last: bool) -> None:
    shape, hidden = (3, 24, 7, 9), 8
    problem = Problem(shape, dtype, last, hidden)
    tensors = [problem.x, *problem.bn, *problem.weights, problem.residual, problem.drop]
    leaves = [t.detach().requires_grad_(t is not problem.drop) for t in tensors]
    length = longest(shape, hidden)
    for pre in ("identity", "silu", "gelu"):

        def run(library, x, weight, bias, w1, b1, w2, b2, r, drop, pre=pre):
            return library.bn_squeeze_excite(
                *(x, weight, bias, None, None, w1, b1, w2, b2),
                training=True,
                pre_activation=pre,
                residual=r,
                post_activation="silu",
                drop_scale=drop,
            )

        check_against_float64(lambda *t: run(se_ext, *t), lambda *t: run(reference, *t), leaves, (length, length))


@pytest.mark.parametrize("wide", [False, True], ids=["weights as vectors", "weights in float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "channels", "hidden"), [(21, 140, 36), (10, 75, 33), (1, 64, 32)])
def test_backward_of_the_excitation(samples: int, channels: int, hidden: int, dtype: torch.dtype, wide: bool) -> None:
    """Its tiles: several along each side, the last of them not full; sides that are multiples of four and others; more
    samples than are loaded ahead, and fewer. What is asked for beside a gradient does not change it."""
    weights = make_weights(channels, hidden, torch.float32 if wide and dtype in HALF else dtype)
    leaves = [t.requires_grad_() for t in (torch.randn(samples, channels, dtype=torch.float64).to(dtype), *weights)]
    length = channels + hidden + samples
    grad = torch.randn(samples, channels, dtype=torch.float64).to(dtype)
    check_against_float64(se_ext.excite, reference.excite, leaves, (length, length), grad)
    z, w1, b1, w2, b2 = leaves
    together = torch.autograd.grad(se_ext.excite(*leaves), leaves, grad)
    of_biases = torch.autograd.grad(se_ext.excite(z, w1.detach(), b1, w2.detach(), b2), (b1, b2), grad)
    assert_same_bits(of_biases, [together[2], together[4]], "biases alone")
    of_weights = torch.autograd.grad(se_ext.excite(z, w1, b1.detach(), w2, b2.detach()), (w1, w2), grad)
    assert_same_bits(of_weights, [together[1], together[3]], "weights alone")


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_feel_its_batch(dtype: torch.dtype, last: bool) -> None:
    problem = Problem((9, 72, 5, 16), dtype, last)
    for path in PATHS:
        set_path(path)
        together = problem.inference()
        for n in (0, 8):
            alone = Problem.__new__(Problem)
            alone.__dict__.update(problem.__dict__)
            alone.x, alone.residual, alone.drop = (t[n : n + 1] for t in (problem.x, problem.residual, problem.drop))
            assert_same_bits(alone.inference(), [t[n : n + 1] for t in together], f"sample {n}, {path}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment(dtype: torch.dtype) -> None:
    """Maps, weights and vectors one element into their storage."""

    def shifted(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        return storage[1:].view(t.shape).copy_(t)

    problem = Problem((2, 24, 3, 8), dtype, False)
    expected = [*problem.inference(), *problem.step()]
    for name in ("x", "residual", "grad", "drop"):
        setattr(problem, name, shifted(getattr(problem, name)))
    problem.weights = [shifted(w) for w in problem.weights]
    problem.bn = [shifted(v) for v in problem.bn]
    assert problem.x.data_ptr() % 16 != 0
    assert_same_bits([*problem.inference(), *problem.step()], expected, "shifted")
    in_place = problem.x.clone()
    target = shifted(in_place)
    torch.ops.se_ext.squeeze_excite_(target, *problem.weights)
    torch.ops.se_ext.squeeze_excite_(in_place, *problem.weights)
    assert_same_bits([target], [in_place], "in place")


@pytest.mark.parametrize("last", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "another", "the input"])
@pytest.mark.parametrize("path", PATHS)
def test_in_place_behind_a_batch_norm(path: str, residual: str, last: bool) -> None:
    problem = Problem((3, 24, 7, 9), torch.float32, last)
    ops = torch.ops.se_ext

    def both(functional: Any, in_place: Any, *arguments: Any) -> None:
        target = problem.x.clone()
        r = {"none": None, "another": problem.residual, "the input": target}[residual]
        expected = functional(problem.x, *arguments, problem.x if r is target else r, *tail)
        in_place(target, *arguments, r, *tail)
        assert_same_bits([target], expected[:1], path)

    set_path(path)
    for pre in ("identity", "relu", "silu"):
        tail: tuple[Any, ...] = ("relu", problem.drop)
        names = (False, 1e-5, pre, "relu", "sigmoid")
        both(ops.bn_squeeze_excite, ops._bn_squeeze_excite_, *problem.bn, *problem.weights, *names)
    tail = (problem.drop,)
    both(ops._bn_activation, ops._bn_activation_, *problem.bn, False, 1e-5, "silu")


@pytest.mark.parametrize("dtype", sorted(HALF, key=str))
def test_every_half_value_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    """Of the twins in tests/cuda_host; on a GPU these are instructions."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1024, 64)
    for scale in (1.0, 1 / 3, 3e4, 2.0**-20):
        y = se_ext.rescale(x, torch.full((1, 1024), scale))
        expected = (x.float() * scale).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert_same_bits([y.masked_fill(y.isnan(), 0)], [expected.masked_fill(y.isnan(), 0)], f"times {scale}")


# An RTX 4090: as much L2 as an H200, a fifth of its bandwidth.
CHUNKED = f"""
import sys, torch
sys.path[:0] = [{str(TESTS)!r}, {str(Path(__file__).parent)!r}]
import helpers, test_cuda_host
host = test_cuda_host.host()
attributes = {{75: 8, 76: 9, 97: 101376, 81: 102400, 16: 128, 38: 72 << 20, 36: 10501000, 37: 384}}
for attribute, value in attributes.items():
    host.cuda_host_set_attribute(attribute, value)
print(*(host.cuda_host_plan(False, False, last, 256, 56 * 56, n, 16) for last in (False, True) for n in (1, 4, 128)))
"""


def test_chunks_where_memory_is_slow_and_the_cache_large() -> None:
    done = subprocess.run([sys.executable, "-c", CHUNKED], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.split() == ["2", "2", "1"] * 2, done.stderr[-4000:]


# Before sm_90 there are no clusters, and before sm_80 a block has 64 KB. A device is asked for what it is once, so
# that another one needs another process.
ON_A_T4 = f"""
import sys, torch
sys.path[:0] = [{str(TESTS)!r}, {str(Path(__file__).parent)!r}]
import helpers, test_cuda_host
host = test_cuda_host.host()
for attribute, value in ((75, 7), (76, 5), (97, 65536), (81, 65536), (111, 0), (16, 40), (38, 4 << 20)):
    host.cuda_host_set_attribute(attribute, value)
torch.manual_seed(1)
for shape in test_cuda_host.SHAPES.values():
    for dtype in helpers.DTYPES:
        for last in (False, True):
            test_cuda_host.check_every_path(shape, dtype, last)
print("done", host.cuda_host_largest_cluster())
"""


def test_a_device_without_clusters() -> None:
    done = subprocess.run([sys.executable, "-c", ON_A_T4], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.split() == ["done", "1"], done.stderr[-4000:]
