"""What is of a GPU alone: streams, graphs, no waiting, every path one result, memory, devices.

The values, gradients and errors of tests/ run on a GPU with `pytest --device cuda`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    HALF,
    TESTS,
    assert_close,
    assert_same_bits,
    check_against_float64,
    emulated_cuda,
    make_map,
    make_weights,
    memory_format,
    need_cuda,
    tensors_on,
)
from torch import Tensor, nn

import se_ext
from benchmarks.cases.gpu import extra_bytes
from se_ext import _C, reference

CUDA = torch.device("cuda", 0)
PATHS = ("cluster", "chunked", "whole")
SLEEP = 1_000_000_000  # cycles: about half a second
SHAPE, HIDDEN = (8, 64, 28, 28), 8
# Slabs of a few bytes to some of more than all on-chip memory of a cluster; odd sizes, rows without alignment, one
# point, one channel, more samples than multiprocessors.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 17, 31),
    (3, 70, 3, 4, 5),
    (5, 131, 13, 11),
    (300, 8, 7, 7),
    (2, 1031, 7, 7),
    (2, 2048, 7, 7),
    (2, 512, 28, 28),
    (3, 256, 56, 56),
    (1, 37, 224, 223),
]


@pytest.fixture(autouse=True)
def on_cuda(on_the_device: None, fresh_random_data: None) -> Iterator[None]:
    if emulated_cuda():
        pytest.skip("of a GPU, not of kernels on the host")
    need_cuda()
    with tensors_on(CUDA):
        yield
        torch.cuda.synchronize()


@pytest.fixture
def path() -> Iterator[Callable[[str], None]]:
    """Chooses how the forward kernels walk the map."""
    yield _C.set_cuda_path
    _C.set_cuda_path("auto")


class Problem:
    """A map, a residual, dL/dy and weights; every op's call and its gradients."""

    post = "relu"

    def __init__(
        self,
        shape: tuple[int, ...] = SHAPE,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        hidden: int = HIDDEN,
    ) -> None:
        layout = memory_format(len(shape), channels_last)
        maps = (torch.empty(shape).normal_().to(dtype).contiguous(memory_format=layout) for _ in range(3))
        self.x, self.residual, self.grad = maps
        self.weights = make_weights(shape[1], hidden, dtype)
        vectors = torch.rand(2, shape[1], dtype=torch.float64).to(dtype)
        self.bn_weight, self.bn_bias = vectors[0] + 0.5, vectors[1].clone()

    def draw_again(self) -> None:
        """Other values in the same memory."""
        for t in (self.x, self.residual, self.grad):
            t.normal_()

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            z = se_ext.squeeze(self.x)
            s = se_ext.excite(z, *self.weights, "silu", "hardsigmoid")
            parts = se_ext.rescale(self.x, s, self.residual, "gelu")
            plain = se_ext.squeeze_excite(self.x, *self.weights)
            whole = se_ext.squeeze_excite(self.x, *self.weights, residual=self.residual, post_activation="relu")
            return [z, s, parts, plain, whole]

    def bn(self, tensors: list[Tensor], training: bool) -> list[Tensor]:
        """y, and in training the running statistics."""
        x, weight, bias, *rest = tensors
        mean, var = torch.zeros_like(bias), torch.ones_like(bias)
        y = se_ext.bn_squeeze_excite(
            *(x, weight, bias, mean, var, *rest[:4]),
            training=training,
            pre_activation="silu",
            residual=rest[4],
            post_activation="relu",
        )
        return [y, mean, var]

    def bn_tensors(self) -> list[Tensor]:
        return [self.x, self.bn_weight, self.bn_bias, *self.weights, self.residual]

    def bn_forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [t for training in (False, True) for t in self.bn(self.bn_tensors(), training)]

    def step(self) -> list[Tensor]:
        """Forward and backward of the block with a residual."""
        leaves = [t.detach().requires_grad_() for t in (self.x, *self.weights, self.residual)]
        y = se_ext.squeeze_excite(*leaves[:5], residual=leaves[5], post_activation=self.post)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad)]

    def bn_step(self) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in self.bn_tensors()]
        y, mean, var = self.bn(leaves, training=True)
        return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, self.grad)]

    def bn_activation_step(self) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (self.x, self.bn_weight, self.bn_bias)]
        y, *statistics = torch.ops.se_ext._bn_activation(*leaves, True, 1e-5, "relu")
        return [y.detach(), *statistics, *torch.autograd.grad(y, leaves, self.grad)]


CALLS: dict[str, Callable[[Problem], list[Tensor]]] = {
    "forward": Problem.forward,
    "batch norm": Problem.bn_forward,
    "step": Problem.step,
    "batch norm step": Problem.bn_step,
    "batch norm and activation step": Problem.bn_activation_step,
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---- streams ----


@calls
@layouts
def test_runs_on_the_current_stream_after_what_is_there(call, channels_last):
    """The side stream sleeps, then writes the input: a kernel anywhere else would read the input as it was."""
    problem, other = Problem(channels_last=channels_last), Problem(channels_last=channels_last)
    expected = call(other)
    call(problem)  # what is done once (loading kernels, allocating) is done
    for name in ("weights", "bn_weight", "bn_bias"):
        setattr(problem, name, getattr(other, name))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        for ours, theirs in ((problem.x, other.x), (problem.residual, other.residual), (problem.grad, other.grad)):
            ours.copy_(theirs)
        found = call(problem)
        done = side.record_event()
    free = torch.cuda.current_stream().record_event()
    free.synchronize()
    assert not done.query(), "the current stream did not wait for the sleep, or the default stream did"
    done.synchronize()
    assert_same_bits(found, expected)


@calls
def test_does_not_wait_for_the_default_stream(call):
    problem, side = Problem(), torch.cuda.Stream()
    expected = call(problem)
    with torch.cuda.stream(side):
        call(problem)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    busy = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(side):
        found = call(problem)
        side.synchronize()
    assert not busy.query(), "the work waited for another stream"
    torch.cuda.synchronize()
    assert_same_bits(found, expected)


@calls
@layouts
def test_the_host_does_not_wait(call, channels_last):
    """Neither by torch's means nor by its own: the calls return while the stream still sleeps."""
    problem = Problem(channels_last=channels_last)
    call(problem)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP)
        busy = torch.cuda.current_stream().record_event()
        call(problem)
        assert not busy.query(), "a call came back only after the stream was done"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_training_step_of_the_module_does_not_wait(momentum):
    tail = se_ext.BatchNormSqueezeExcitation(SHAPE[1], HIDDEN, post_activation=nn.ReLU, momentum=momentum)
    x, residual, grad = (make_map(SHAPE) for _ in range(3))
    tail(x, residual).backward(grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP)
        busy = torch.cuda.current_stream().record_event()
        tail(x, residual).backward(grad)
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(tail.bn.num_batches_tracked) == 2


# ---- graphs ----


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


@calls
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_eagers_bits(call, dtype, channels_last):
    problem = Problem(dtype=dtype, channels_last=channels_last)
    graph, found = captured(lambda: call(problem))
    for _ in range(3):
        problem.draw_again()
        expected = call(problem)
        for t in found:
            t.fill_(torch.nan)
        for _ in range(2):
            graph.replay()
            assert_same_bits(found, expected)


@layouts
def test_two_shapes_in_one_graph(channels_last, path):
    """One kernel, with much shared memory and with little: neither launch lowers the limit of the other."""
    path("cluster")
    problems = [Problem((4, 64, side, side), channels_last=channels_last) for side in (48, 28, 56)]

    def call() -> list[Tensor]:
        return [t for problem in problems for t in problem.forward() + problem.step()]

    graph, found = captured(call)
    for problem in problems:
        problem.draw_again()
    expected = call()
    for _ in range(3):
        for t in found:
            t.fill_(torch.nan)
        graph.replay()
        assert_same_bits(found, expected)


CAPTURED_FIRST = """
import torch, se_ext
from se_ext import _C
_C.set_cuda_path({path!r})
draw = lambda *shape: torch.randn(shape, device="cuda")
x, w1, w2 = draw(4, 64, 48, 48), draw(8, 64), draw(64, 8)
graph = torch.cuda.CUDAGraph()
with torch.no_grad(), torch.cuda.graph(graph):
    y = se_ext.squeeze_excite(x, w1, None, w2, None)
assert _C.last_cuda_path() == {path!r}
graph.replay()
torch.cuda.synchronize()
with torch.no_grad():
    assert torch.equal(y, se_ext.squeeze_excite(x, w1, None, w2, None))
"""


@pytest.mark.parametrize("name", PATHS)
def test_a_capture_without_a_call_before_it(name):
    """The first call of a process is captured: loading a kernel, and asking the driver about it, is allowed there."""
    program = CAPTURED_FIRST.format(path=name)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PATHS)
def test_a_thousand_replays_beside_copies(name, path):
    """The same bits each time, while another stream keeps memory and caches busy."""
    path(name)
    problem = Problem((24, 256, 28, 28), torch.bfloat16)
    graph, found = captured(lambda: [problem.forward()[4]])
    graph.replay()
    expected = found[0].clone()
    differ = torch.zeros((), dtype=torch.int64)
    side, busy = torch.cuda.Stream(), torch.empty(2**27, dtype=torch.uint8)
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(1000):
        with torch.cuda.stream(side):
            busy[: 2**26].copy_(busy[2**26 :])
        found[0].fill_(torch.nan)
        graph.replay()
        differ += (found[0].view(torch.int16) != expected.view(torch.int16)).any()
    torch.cuda.current_stream().wait_stream(side)
    assert int(differ) == 0


def test_a_graph_of_the_op_in_place():
    problem = Problem()
    target = problem.x.clone()

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [se_ext.squeeze_excite(target, *problem.weights, post_activation="relu", inplace=True)]

    graph, _ = captured(call)
    problem.draw_again()
    target.copy_(problem.x)
    graph.replay()
    with torch.no_grad():
        assert_same_bits([target], [se_ext.squeeze_excite(problem.x, *problem.weights, post_activation="relu")])


@layouts
def test_a_graph_of_a_whole_training_step(channels_last):
    """Forward, backward, running statistics and optimiser of a module: the weights after five replays are eager's."""
    modules = [se_ext.BatchNormSqueezeExcitation(SHAPE[1], HIDDEN, post_activation=nn.ReLU) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    start = {key: value.clone() for key, value in modules[0].state_dict().items()}
    problem = Problem(channels_last=channels_last)

    def stepper(module: nn.Module) -> Callable[[], list[Tensor]]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

        def step() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            y = module(problem.x, problem.residual)
            y.backward(problem.grad)
            optimizer.step()
            return [y.detach()]

        return step

    eager = stepper(modules[0])
    graph, found = captured(stepper(modules[1]))
    for module in modules:
        module.load_state_dict(start)
    for _ in range(5):
        problem.draw_again()
        expected = eager()
        graph.replay()
        assert_same_bits(found, expected)
    for (name, ours), theirs in zip(modules[1].state_dict().items(), modules[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


# ---- one result, whatever the path, the batch, the run ----


@dtypes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_same_bits(shape, channels_last, dtype, path):
    problem = Problem(shape, dtype, channels_last, hidden=max(1, shape[1] // 16))
    many = shape[0] * torch.Size(shape[2:]).numel() > 1  # a batch norm of one value per channel is refused
    expected = problem.forward() + problem.step() + (problem.bn_forward() if many else [])
    for name in PATHS:
        path(name)
        with torch.no_grad():
            se_ext.squeeze_excite(problem.x, *problem.weights)
        assert _C.last_cuda_path() == name
        found = problem.forward() + problem.step()
        assert _C.last_cuda_path() == name
        assert_same_bits(found + (problem.bn_forward() if many else []), expected, name)
        target = problem.x.clone()
        with torch.no_grad():
            se_ext.squeeze_excite(
                target, *problem.weights, residual=problem.residual, post_activation="relu", inplace=True
            )
        assert_same_bits([target], [expected[4]], f"{name}, in place")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@layouts
@pytest.mark.parametrize("name", PATHS)
def test_every_path_gives_the_formula(name, channels_last, dtype, path):
    """Values and gradients against float64."""
    path(name)
    for shape in ((2, 3, 5, 7), (5, 131, 13, 11), (2, 256, 56, 56)):
        n, c, *spatial = shape
        x, residual = (make_map(shape, dtype, channels_last, requires_grad=True) for _ in range(2))
        check_against_float64(
            lambda *t: se_ext.squeeze_excite(*t[:5], "silu", "sigmoid", t[5], "silu"),
            lambda *t: reference.squeeze_excite(*t[:5], "silu", "sigmoid", t[5], "silu"),
            [x, *make_weights(c, 11, dtype, requires_grad=True), residual],
            (torch.Size(spatial).numel() + c, n * torch.Size(spatial).numel() * c),
        )


def test_an_unknown_path_is_refused(path):
    with pytest.raises(ValueError, match="no such path"):
        path("no such path")


@dtypes
@layouts
@pytest.mark.parametrize("shape", [(64, 17, 5, 7), (64, 256, 14, 14), (64, 96, 56, 56)], ids=str)
def test_a_sample_does_not_feel_its_batch(shape, channels_last, dtype):
    """Alone, in a batch of 64 and in one of 7: the same bits in y and in its gradient."""
    problem = Problem(shape, dtype, channels_last)

    def run(first: int, last: int) -> list[Tensor]:
        part = Problem.__new__(Problem)
        part.x, part.residual, part.grad = (t[first:last] for t in (problem.x, problem.residual, problem.grad))
        part.weights, part.bn_weight, part.bn_bias = problem.weights, problem.bn_weight, problem.bn_bias
        y, gx, *_, gr = part.step()
        with torch.no_grad():
            evaluated, *_ = part.bn(part.bn_tensors(), training=False)
        return [*part.forward(), evaluated, y, gx, gr]

    whole, few = run(0, 64), run(20, 27)
    for n in (0, 1, 20, 23, 26, 63):
        alone = run(n, n + 1)
        assert_same_bits([t[n : n + 1] for t in whole], alone, f"sample {n} of 64")
        if 20 <= n < 27:
            assert_same_bits([t[n - 20 : n - 19] for t in few], alone, f"sample {n - 20} of 7")


@calls
@dtypes
@layouts
def test_run_to_run(channels_last, dtype, call):
    for shape in ((3, 70, 9, 7), (32, 256, 14, 14), (4, 256, 56, 56)):
        problem = Problem(shape, dtype, channels_last)
        expected = call(problem)
        for run in range(4):
            assert_same_bits(call(problem), expected, f"{shape}, run {run}")


@calls
@dtypes
@layouts
def test_misaligned_maps_give_the_aligned_ones_bits(channels_last, dtype, call):
    """At odd offsets in memory, where no vector access is allowed."""
    for shape in ((2, 19, 5, 7), (3, 64, 8, 8), (2, 128, 56, 56)):
        problem = Problem(shape, dtype, channels_last)
        expected = call(problem)
        for offset in (1, 2, 3):
            for name in ("x", "residual", "grad"):
                t = getattr(problem, name)
                buffer = torch.full((t.numel() + offset + 8,), torch.nan, dtype=dtype)
                moved = buffer[offset:].as_strided(t.shape, t.stride(), offset)
                setattr(problem, name, moved.copy_(t))
            assert problem.x.storage_offset() == offset
            assert_same_bits(call(problem), expected, f"{shape}, offset {offset}")


@dtypes
@layouts
@pytest.mark.parametrize("shape", [(3, 19, 5, 7), (4, 256, 14, 14), (2, 64, 56, 56)], ids=str)
def test_the_cpu_and_the_gpu_agree(shape, channels_last, dtype):
    problem = Problem(shape, dtype, channels_last)
    cpu = Problem.__new__(Problem)
    problem.post = cpu.post = "silu"  # no kink, at which they could rightly differ
    ours = problem.forward() + problem.step()
    for name in ("x", "residual", "grad"):
        setattr(cpu, name, getattr(problem, name).cpu())
    cpu.weights = [w.cpu() for w in problem.weights]
    with tensors_on(torch.device("cpu")):
        theirs = cpu.forward() + cpu.step()
    torch.set_default_device(CUDA)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.stride() == b.stride(), i
        accumulate = torch.float32 if dtype in HALF else dtype
        error = (a.cpu().double() - b.double()).norm() / b.double().norm()
        assert error <= 8 * torch.finfo(dtype).eps + 100 * torch.finfo(accumulate).eps, (i, error)


# ---- threads ----


@layouts
@pytest.mark.parametrize("name", PATHS)
def test_two_threads_with_different_shapes(name, channels_last, path):
    """On streams of their own, through one kernel with different amounts of shared memory."""
    path(name)
    problems = [Problem((4, 64, side, side), channels_last=channels_last) for side in (48, 28)]
    expected = [problem.forward() for problem in problems]
    torch.cuda.synchronize()

    def run(problem: Problem) -> list[list[Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream(CUDA)):
            found = [problem.forward() for _ in range(200)]
            torch.cuda.current_stream().synchronize()
            return found

    with ThreadPoolExecutor(2) as pool:
        for found, one in zip(pool.map(run, problems), expected, strict=True):
            for tensors in found:
                assert_same_bits(tensors, one)


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@layouts
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (64, 1024, 14, 14), (256, 2048, 7, 7)], ids=str)
def test_inference_takes_its_output_and_small_vectors(shape, channels_last, dtype):
    """Besides a thousandth of x: z and the scale of every sample, and the sums of its tiles in channels_last. (The
    kernel of the whole block needs none of them.)"""
    x, residual = (torch.ones(shape, dtype=dtype, memory_format=memory_format(4, channels_last)) for _ in range(2))
    weights = make_weights(shape[1], shape[1] // 16, dtype)
    samples, channels, *spatial = shape
    tiles = min(32, torch.Size(spatial).numel() // 8) if channels_last else 0
    spare = x.nbytes // 1000 + 2**16 + 4 * samples * channels * (4 + tiles)
    assert spare < x.nbytes // 2
    with torch.no_grad():
        for r, post in ((None, "identity"), (residual, "relu")):
            out = extra_bytes(lambda r=r, p=post: se_ext.squeeze_excite(x, *weights, residual=r, post_activation=p))
            assert x.nbytes <= out <= x.nbytes + spare
            inside = extra_bytes(
                lambda r=r, p=post: se_ext.squeeze_excite(x, *weights, residual=r, post_activation=p, inplace=True)
            )
            assert inside <= spare
        assert extra_bytes(lambda: se_ext.squeeze(x)) <= spare
        scale = torch.ones(shape[:2], dtype=dtype)
        assert extra_bytes(lambda: se_ext.rescale(x, scale)) <= x.nbytes + spare


@layouts
def test_a_training_step_takes_results_and_gradients(channels_last):
    """y, the gradients of x and of the residual; and of the batch norm's step the same."""
    problem = Problem((32, 256, 56, 56), channels_last=channels_last, hidden=16)
    for call in (problem.step, problem.bn_step):
        assert extra_bytes(call) <= 3 * problem.x.nbytes + problem.x.nbytes // 25 + 2**18


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("name", PATHS)
def test_more_than_2_to_the_31_elements(name, channels_last, path):
    """4.3 GB of bfloat16: each of the samples at both ends gives what it gives alone, forward and backward."""
    path(name)
    shape = (2**31 // (256 * 56 * 56) + 3, 256, 56, 56)
    x, grad = (torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format(4, channels_last)) for _ in "xg")
    assert x.numel() > 2**31
    for t in (x, grad):
        for part in t.split(128):
            part.normal_()
    weights = make_weights(256, 16, torch.bfloat16)

    def run(first: int, last: int) -> list[Tensor]:
        leaf = x[first:last].detach().requires_grad_()
        y = se_ext.squeeze_excite(leaf, *weights, post_activation="relu")
        assert _C.last_cuda_path() == name
        gradients = torch.autograd.grad(y, leaf, grad[first:last])
        assert _C.last_cuda_path() == name
        return [y.detach(), *gradients]

    whole = run(0, len(x))
    for n in (0, 1, len(x) // 2, len(x) - 2, len(x) - 1):
        assert_same_bits([t[n : n + 1] for t in whole], run(n, n + 1), f"sample {n}")


# ---- devices ----


def arguments(op: str) -> dict[str, Any]:
    x, scale, (w1, b1, w2, b2) = make_map(SHAPE), torch.rand(SHAPE[:2]), make_weights(SHAPE[1], HIDDEN)
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return {
        "excite": {"z": scale, **weights},
        "rescale": {"input": x, "scale": scale, "residual": x},
        "rescale_": {"input": x, "scale": scale, "residual": x},
        "squeeze_excite": {"input": x, **weights, "residual": x},
        "squeeze_excite_": {"input": x, **weights, "residual": x},
        "bn_squeeze_excite": {
            **{"input": x, "bn_weight": b2, "bn_bias": b2, **weights, "batch_statistics": True},
            **{"residual": x, "drop_scale": torch.ones(SHAPE[0])},
        },
        "_bn_activation": {
            **{"input": x, "weight": b2, "bias": b2},
            **{"batch_statistics": True, "eps": 1e-5, "activation": "relu"},
            **{"residual": x, "drop_scale": torch.ones(SHAPE[0])},
        },
    }[op]


OPS = ("excite", "rescale", "rescale_", "squeeze_excite", "squeeze_excite_", "bn_squeeze_excite", "_bn_activation")


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_devices_are_refused(op, recorded):
    """Every argument in turn on the CPU beside the others on the GPU, and the other way round."""
    if recorded and op.endswith("_"):
        return
    given = arguments(op)
    first, *others = [key for key, value in given.items() if isinstance(value, Tensor)]
    for here, there in (("cuda:0", "cpu"), ("cpu", "cuda:0")):
        for name in others:
            placed = {k: v.to(here) if isinstance(v, Tensor) else v for k, v in given.items()}
            placed[name] = given[name].to(there)
            placed[first].requires_grad_(recorded)
            with pytest.raises(RuntimeError) as caught:
                getattr(torch.ops.se_ext, op)(**placed)
            assert str(caught.value) == f"{op.removeprefix('_')}: expected {name} on device {here}, got {there}"


@calls
def test_another_device_than_the_current_one(call):
    """The inputs' device is the one that works, whichever is current; afterwards it is the same as before."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    problem = Problem()
    expected = call(problem)
    other = torch.device("cuda", 1)
    for name in ("x", "residual", "grad", "bn_weight", "bn_bias"):
        setattr(problem, name, getattr(problem, name).to(other))
    problem.weights = [w.to(other) for w in problem.weights]
    assert torch.cuda.current_device() == 0
    found = call(problem)
    assert torch.cuda.current_device() == 0
    assert all(t.device == other for t in found)
    assert_same_bits([t.to(CUDA) for t in found], expected)


IMPORT_AND_FORK = """
import os, torch, se_ext
x, w1, w2 = torch.randn(2, 16, 8, 8), torch.randn(4, 16), torch.randn(16, 4)
expected = se_ext.squeeze_excite(x, w1, None, w2, None)
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    found = se_ext.squeeze_excite(*(t.cuda() if t is not None else None for t in (x, w1, None, w2, None)))
    os._exit(0 if torch.allclose(found.cpu(), expected, atol=1e-5) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_importing_takes_no_gpu():
    """Import and CPU calls make no CUDA context: a forked child can still make its own."""
    done = subprocess.run([sys.executable, "-c", IMPORT_AND_FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- beside torch's other machinery ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@layouts
def test_autocast(channels_last, dtype):
    """Among convolutions under torch.autocast("cuda"): the block takes and gives the half type, its weights stay."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), se_ext.SqueezeExcitation(16, 4, post_activation=nn.ReLU), nn.Conv2d(16, 4, 1)
    )
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda _, args, y: seen.extend((args[0].dtype, y.dtype)))
    x = make_map((2, 3, 8, 8), channels_last=channels_last)
    with torch.autocast("cuda", dtype=dtype):
        y = model(x)
        block_input = model[0](x)
        block = model[1](block_input)
    y.float().square().sum().backward()
    assert seen[:2] == [dtype, dtype]
    assert all(p.grad.dtype is torch.float32 and p.grad.abs().max() > 0 for p in model.parameters())
    se = model[1]
    weights = [t.detach().double() for t in (se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias)]
    exact = reference.squeeze_excite(block_input.detach().double(), *weights, post_activation="relu")
    assert_close(block.detach(), exact, dtype, 36 + 16)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_as_one_graph(training, mode):
    """reduce-overhead puts it into CUDA graphs of inductor's making."""
    pytest.importorskip("triton", reason="inductor needs triton on a GPU")
    torch._dynamo.reset()
    module = se_ext.BatchNormSqueezeExcitation(SHAPE[1], HIDDEN, post_activation=nn.ReLU).train(training)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):
        x, residual, grad = (make_map(SHAPE, channels_last=True) for _ in range(3))
        results = []
        for form in (module, compiled):
            module.load_state_dict(state)
            leaves = [x.detach().requires_grad_(training), residual.detach().requires_grad_(training)]
            with torch.set_grad_enabled(training):
                torch.compiler.cudagraph_mark_step_begin()
                y = form(*leaves)
                grads = torch.autograd.grad(y, [*leaves, *module.parameters()], grad) if training else ()
            results.append([t.detach().clone() for t in (y, *grads, *module.buffers())])
        count = len(results[0]) - len(list(module.buffers()))
        assert_same_bits(*(r[:count] for r in results))
        for ours, theirs in zip(*(r[count:] for r in results), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6)  # inductor rounds the running statistics its own way
    torch._dynamo.reset()


def test_the_sanitizer_s_script_passes_without_it():
    """What `make gpu-check` runs under compute-sanitizer."""
    script = TESTS / "cuda_sanitizer_case.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout


def test_paths_and_layouts_of_the_sanitizer_are_all():
    import cuda_sanitizer_case

    paths = {case[0] for case in cuda_sanitizer_case.cases()}
    assert paths == {"auto", *PATHS}
    combinations = {(case[2], case[3]) for case in cuda_sanitizer_case.cases()}
    assert combinations == set(itertools.product(cuda_sanitizer_case.DTYPES, [False, True]))
