"""The depthwise convolution: filters, strides and padding of every kind, rows that end inside a tile, the groups in
which the gradients of the filters are summed, and who computes it."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_close, assert_same_bits, emulated_cuda, make_map, memory_format, thread_counts
from ops import BY_NAME, Options, in_float64, layouts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import se_ext

CASE = BY_NAME["depthwise_conv"]
C = 19  # one register of channels and a part of one, under every instruction set
OURS = [(kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2)]


def check(options: Options, **arguments: Any) -> None:
    """Values and all gradients against float64; `arguments` in the place of the options'."""
    made = CASE.make(options) | arguments
    for name in CASE.differentiable:
        if made[name] is not None:
            made[name].requires_grad_()
    CASE.check(options, made)


# ---- values ----


def a_convolution(draw: random.Random, dtype: torch.dtype) -> dict[str, Any] | None:
    """Random arguments, or None where the filter is larger than the map with its padding."""
    dims = draw.choice([1, 2, 2, 3])
    samples, channels = draw.choice([1, 2, 3, 18]), draw.choice([1, 3, 8, 16, C, 33])
    spatial = [draw.choice([1, 3, 5, 7, 8, 9, 14]) for _ in range(dims)]
    kernel = [*(draw.choice([1, 2, 3, 5]) for _ in spatial[1:]), draw.choice([3, 3, 5, 5, 7, 7, 1, 2, 4])]
    stride = [*(draw.choice([1, 2, 3]) for _ in spatial[1:]), draw.choice([1, 1, 2, 2, 3])]
    dilation = [*(draw.choice([1, 1, 2]) for _ in spatial[1:]), draw.choice([1, 1, 1, 2])]
    pairs = [(draw.randrange(4), draw.randrange(3)) for _ in spatial]
    padding: Any = [zeros for pair in pairs for zeros in pair]
    if (kind := draw.choice(["same", "one", "a dim", "pairs"])) == "same":
        padding, pairs = [], [(k * d, 0) for k, d in zip(kernel, dilation, strict=True)]
    elif kind == "one":
        padding, pairs = padding[:1], [(padding[0], padding[0])] * dims
    elif kind == "a dim":
        padding, pairs = padding[::2], [(begin, begin) for begin, _ in pairs]
    sizes = zip(spatial, pairs, kernel, dilation, strict=True)
    if any(n + begin + end < (k - 1) * d + 1 for n, (begin, end), k, d in sizes):
        return None
    weights = draw.choice([dtype, torch.float32]) if dtype.itemsize == 2 else dtype
    made = {
        "input": make_map((samples, channels, *spatial), dtype, draw.random() < 0.5),
        "weight": torch.randn(channels, 1, *kernel, dtype=torch.float64).to(weights),
        "bias": torch.randn(channels, dtype=torch.float64).to(weights) if draw.random() < 0.5 else None,
    }
    return made | {"stride": stride, "padding": padding, "dilation": dilation}


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_convolutions(dtype: torch.dtype) -> None:
    """Dims, sizes, filters, strides, dilations and padding at random: ours and ATen's."""
    draw, checked = random.Random(7), 0
    while checked < 40:
        if (arguments := a_convolution(draw, dtype)) is None:
            continue
        checked += 1
        x = arguments["input"]
        described = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        try:
            check(Options(tuple(x.shape), dtype=dtype, weight_dtype=arguments["weight"].dtype), **arguments)
        except AssertionError as error:
            raise AssertionError(f"{described}: {error}") from None


@layouts
@pytest.mark.parametrize(("kernel", "stride"), OURS)
def test_rows_of_every_width(kernel: int, stride: int, channels_last: bool) -> None:
    """Tiles are 4, 7 and 8 columns wide: whole ones, parts of one, and rows narrower than the filter."""
    for width in range(1, 34):
        options = Options((2, C, 2, width), kernel=kernel, stride=stride, channels_last=channels_last)
        try:
            check(options)
            check(options, padding=[1, 1, kernel, 0])
        except AssertionError as error:
            raise AssertionError(f"width {width}: {error}") from None


@layouts
@pytest.mark.parametrize("channels", [1, 4, 8, 15, 16, 17, 32, 40, 65])
def test_every_number_of_channels(channels: int, channels_last: bool) -> None:
    for dtype, (kernel, stride) in product(DTYPES, [(3, 1), (5, 2)]):
        check(Options((2, channels, 5, 9), 1, dtype, None, channels_last, kernel=kernel, stride=stride))


@layouts
@pytest.mark.parametrize("samples", [1, 16, 17, 37])
def test_every_group_of_samples(samples: int, channels_last: bool) -> None:
    """The gradients of filters are summed in at most 16 groups of samples, the last of which may be smaller."""
    for wanted in (("input", "weight", "bias"), ("weight",), ("bias",), ("input", "bias")):
        CASE.check(Options((samples, C, 6, 10), kernel=5, channels_last=channels_last, requires_grad=wanted))


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_in_several_bands(dtype: torch.dtype, channels_last: bool) -> None:
    """Of more rows than stay in cache at once, the filter over the edge of two bands."""
    for kernel, stride in ((3, 1), (7, 2)):
        check(Options((1, C, 67, 70), 1, dtype, None, channels_last, kernel=kernel, stride=stride))
    check(Options((1, C, 6, 31, 40), 1, dtype, None, channels_last, kernel=5))


@pytest.mark.cpu_only
@layouts
@pytest.mark.parametrize("shape", [(1, 8, 1024, 1024), (1024, 16, 28, 28)], ids=str)
def test_gradients_that_are_sums_of_many_points(shape: tuple[int, ...], channels_last: bool) -> None:
    """To eight roundings of float32: of one sum of all points, one after the other, more digits would be wrong."""
    x, grad = (make_map(shape, channels_last=channels_last) for _ in range(2))
    leaves = [torch.randn(shape[1], 1, 3, 3, requires_grad=True), torch.randn(shape[1], requires_grad=True)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, grad = x.relu_(), grad.add_(0.3)
    found = torch.autograd.grad(se_ext.depthwise_conv(x, *leaves, padding=1), leaves, grad)
    y = F.conv2d(x.double(), *wide, padding=1, groups=shape[1])
    for ours, exact in zip(found, torch.autograd.grad(y, wide, grad.double()), strict=True):
        assert (ours.double() - exact).abs().max() < 1e-6 * exact.abs().max()


@layouts
def test_arguments_of_any_strides(channels_last: bool) -> None:
    options = Options((3, C, 6, 8), kernel=5, stride=2, channels_last=channels_last)
    y = CASE.run(CASE.make(options))[0]
    weight, bias = torch.randn(3, 5, 1, C).permute(3, 2, 0, 1), torch.randn(C, 3)[:, 1]
    check(options, weight=weight.contiguous(memory_format=torch.channels_last), bias=bias)
    check(options, weight=torch.randn(1, 1, 1, 5).expand(C, 1, 3, 5).clone().transpose(0, 1).transpose(0, 1))
    memory = torch.randn(3 * C * 48 + 1)
    check(options, input=memory[1:].view(3, C, 6, 8))  # off the registers' alignment
    check(options, input=memory[1:].view(3, 6, 8, C).permute(0, 3, 1, 2))
    check(options, input=torch.randn(3, C, 8, 12).transpose(2, 3)[:, :, ::2])
    for grad in (torch.ones(()).expand(y.shape), torch.randn(y.shape[::-1]).permute(3, 2, 1, 0)):
        made = CASE.make(Options((3, C, 6, 8), kernel=5, stride=2, channels_last=channels_last, requires_grad=True))
        CASE.check(options, made, grad)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (4, 1, 1), (3, 3, 1), (3, 1, 2)])
def test_gradients_that_are_not_asked_for_are_absent(kernel: int, stride: int, dilation: int) -> None:
    """ATen gives some of them."""
    case, options = BY_NAME["_depthwise_conv_backward"], {"kernel": kernel, "stride": stride, "dilation": dilation}
    arguments = case.make(Options(**options))
    everything = case.run(arguments)
    for mask in product((False, True), repeat=3):
        found = case.run(arguments | {"mask": list(mask)})
        assert [t is not None for t in found] == list(mask)
        for ours, expected in zip(found, everything, strict=True):
            if ours is not None:
                assert_close(ours, expected.double(), torch.float32, 200)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [3, 4], ids=["ours", "ATen's"])
def test_float32_filters_get_float32_gradients(kernel: int, dtype: torch.dtype) -> None:
    """Sums that pass the largest float16 number, of values near 1, right to float32's rounding."""
    arguments = CASE.make(Options((2, 3, 230, 240), 1, dtype, torch.float32, kernel=kernel, requires_grad=True))
    arguments["input"] = (torch.rand(2, 3, 230, 240) + 0.5).to(dtype)
    y, exact_arguments = CASE.run(arguments)[0], in_float64(arguments)
    grad = (torch.rand(y.shape) + 0.5).to(dtype)
    names = ("weight", "bias")
    found = torch.autograd.grad(y, [arguments[k] for k in names], grad)
    exact = torch.autograd.grad(CASE.exact(exact_arguments)[0], [exact_arguments[k] for k in names], grad.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert theirs.abs().max() > torch.finfo(torch.float16).max
        assert_close(ours, theirs, torch.float32, grad.numel())


# ---- bits ----


@layouts
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2), (7, 1)])
@pytest.mark.parametrize(
    "shape", [(1, 520, 14, 14), (5, 70, 28, 28), (17, 40, 28, 15), (2, 40, 70, 130), (330, 5, 9, 9)], ids=str
)
def test_bits_do_not_depend_on_the_threads(shape, kernel, stride, channels_last, restore_threads) -> None:
    """Output and all gradients. One sample is shared out by channels, many in groups; more threads than groups too."""
    options = Options(shape, kernel=kernel, stride=stride, channels_last=channels_last, requires_grad=True)
    arguments = CASE.make(options)
    torch.set_num_threads(1)
    grad = torch.randn_like(CASE.run(arguments)[0])
    expected = CASE.step(arguments, grad)
    for threads in thread_counts(2, 3, 4, 7, 20, 20):
        torch.set_num_threads(threads)
        assert_same_bits(CASE.step(arguments, grad), expected, f"{threads} threads")


@pytest.mark.cpu_only
@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_sample_do_not_depend_on_its_batch(dtype, channels_last) -> None:
    """Of the output and of the input's gradient, in a batch of several groups."""
    for kernel, stride in OURS:
        shape = (18, C, 9, 17)
        options = Options(shape, 1, dtype, None, channels_last, kernel=kernel, stride=stride, requires_grad=("input",))
        arguments = CASE.make(options)
        y = CASE.run(arguments)[0]
        grad = torch.randn_like(y)
        (gx,) = torch.autograd.grad(y, arguments["input"], grad)
        for n in (0, 1, 11, 17):
            one = arguments["input"][n : n + 1].detach().requires_grad_()
            alone = CASE.run(arguments | {"input": one})[0]
            assert_same_bits([alone], [y[n : n + 1]], f"output of sample {n}")
            (g,) = torch.autograd.grad(alone, one, grad[n : n + 1])
            assert_same_bits([g], [gx[n : n + 1]], f"gradient of sample {n}")


@layouts
@pytest.mark.parametrize(("kernel", "stride"), OURS)
def test_what_is_not_finite_stays_with_the_filters_that_meet_it(kernel: int, stride: int, channels_last: bool) -> None:
    """NaN, inf and -inf of one channel and column: the outputs beside them and the other channels are finite."""
    options = Options(
        (2, C, 4, 23), kernel=kernel, stride=stride, channels_last=channels_last, requires_grad=("input",)
    )
    arguments = CASE.make(options)
    with torch.no_grad():
        for c, column, value in ((0, 0, torch.nan), (3, 22, torch.inf), (C - 1, 11, -torch.inf), (8, 7, torch.nan)):
            arguments["input"][1, c, 2, column] = value
    exact = CASE.exact(in_float64(arguments))[0]
    y = CASE.run(arguments)[0]
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert not y.isfinite().all()
    grad = torch.randn_like(y)
    grad[0, 5, 1, 3] = torch.nan
    (found,) = torch.autograd.grad(y, arguments["input"], grad)
    reach = torch.ones(C, 1, *arguments["weight"].shape[2:])
    begin = (kernel - 1) // 2 if stride == 1 else None
    met = found.isnan().nonzero()
    assert set(met[:, 0].tolist()) == {0}
    assert set(met[:, 1].tolist()) == {5}
    if begin is not None:
        hit = F.conv2d((grad.isnan()).float(), reach, None, 1, (1, begin), 1, C) > 0
        assert torch.equal(found.isnan(), hit)


# ---- what the arguments mean ----


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("spatial", "kernel"), [((7,), (4,)), ((6, 9), (3, 5)), ((4, 5, 8), (3, 2, 7))], ids=str)
def test_same_is_torchs_at_stride_1(spatial: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x, weight = make_map((2, C, *spatial), torch.float64), torch.randn(C, 1, *kernel, dtype=torch.float64)
    torchs = (F.conv1d, F.conv2d, F.conv3d)[len(spatial) - 1]
    for dilation in (1, 2):
        expected = torchs(x, weight, None, 1, "same", dilation, C)
        assert_close(se_ext.depthwise_conv(x, weight, None, 1, "same", dilation), expected, torch.float64, 42)


# (size, filter, stride, dilation): zeros in front and behind, by TensorFlow's rule.
SAME = {
    (5, 3, 2, 1): (1, 1),
    (6, 3, 2, 1): (0, 1),
    (6, 5, 2, 1): (1, 2),
    (7, 7, 2, 1): (3, 3),
    (8, 7, 2, 1): (2, 3),
    (8, 3, 3, 1): (0, 1),
    (9, 3, 3, 1): (0, 0),
    (7, 2, 4, 1): (0, 0),
    (8, 3, 2, 2): (1, 2),
    (1, 5, 2, 1): (2, 2),
}


def test_same_has_the_odd_zero_at_the_end() -> None:
    for (size, taps, stride, dilation), (begin, end) in SAME.items():
        x, weight = make_map((2, C, size), torch.float64), torch.randn(C, 1, taps, dtype=torch.float64)
        expected = F.conv1d(F.pad(x, (begin, end)), weight, None, stride, 0, dilation, C)
        found = se_ext.depthwise_conv(x, weight, None, stride, "same", dilation)
        assert found.shape[2] == -(-size // stride)
        assert_close(found, expected, torch.float64, taps)


def test_a_list_has_one_value_a_dim_or_two() -> None:
    x, weight = make_map((2, C, 9, 12)), torch.randn(C, 1, 5, 3)

    def convolve(**named: Any) -> Tensor:
        return se_ext.depthwise_conv(x, weight, **named)

    def same_bits(*calls: dict[str, Any]) -> None:
        for call in calls[1:]:
            assert_same_bits([convolve(**call)], [convolve(**calls[0])], str(call))

    same_bits({"padding": 2}, {"padding": [2]}, {"padding": (2, 2)}, {"padding": (2, 2, 2, 2)})
    same_bits({"padding": (1, 2)}, {"padding": [1, 1, 2, 2]})
    same_bits({"padding": "valid"}, {"padding": 0}, {"padding": (0, 0)}, {})
    same_bits({"stride": 2, "dilation": 1}, {"stride": (2, 2), "dilation": [1, 1]}, {"stride": [2], "dilation": (1,)})
    same_bits({"padding": "same"}, {"padding": (2, 1)})
    padded = F.pad(x, (3, 4, 1, 2))  # the last dim comes first
    assert_same_bits([convolve(padding=(1, 2, 3, 4))], [se_ext.depthwise_conv(padded, weight)])


@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (2, 0, 5, 4), (0, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_maps_of_no_samples_or_channels(shape: tuple[int, ...], channels_last: bool) -> None:
    arguments = CASE.make(Options(shape, kernel=3, stride=2, channels_last=channels_last, requires_grad=True))
    y = CASE.run(arguments)[0]
    assert y.shape == (*shape[:2], -(-shape[2] // 2), -(-shape[3] // 2))
    y.sum().backward()
    for leaf in CASE.leaves(arguments).values():
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.count_nonzero() == 0


# ---- who computes it ----


def is_atens(options: Options, recorded: bool, **arguments: Any) -> bool:
    made = CASE.make(options) | arguments
    made["input"].requires_grad_(recorded)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        y = CASE.run(made)[0]
        if recorded:
            y.sum().backward()
    names = {event.key for event in prof.key_averages()}
    assert ("aten::convolution_backward" in names) is (recorded and "aten::convolution" in names)
    return "aten::convolution" in names


@pytest.mark.cpu_only
@pytest.mark.parametrize("spatial", [(16,), (16, 16), (4, 4, 16)], ids=str)
def test_the_rule_of_what_the_kernels_compute(spatial: tuple[int, ...]) -> None:
    """It reads the last dim alone."""
    last = len(spatial) - 1
    for kernel, stride, dilation in product((1, 2, 3, 4, 5, 6, 7, 9), (1, 2, 3), (1, 2)):
        options = Options((2, C, *spatial), kernel=kernel)
        ours = kernel in (3, 5, 7) and stride <= 2 and dilation == 1
        lists = {"stride": [3] * last + [stride], "dilation": [2] * last + [dilation]}
        assert is_atens(options, stride == 2, **lists) is not ours, (kernel, stride, dilation)


@pytest.mark.parametrize("step", [1, 2], ids=["native", "sliced"])
@layouts
def test_padding_makes_one_point_a_map(channels_last: bool, step: int) -> None:
    """A map of one point is in both layouts; the larger output is in the one that its strides suggest."""
    whole = torch.randn(3, step * C, 1, 1).to(memory_format=memory_format(4, channels_last))
    options = Options((3, C, 1, 1), padding=3, requires_grad=True, maps=lambda: whole[:, :C].detach())
    arguments = CASE.make(options)
    CASE.check(options, arguments)


# ---- memory ----

GUARDED = """
import ctypes, mmap, sys
import torch, se_ext

PAGE = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect
kept = []

def guarded(t, at_the_end):
    # A copy of t between two pages that may not be read, at one of them.
    size = -(-t.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + size):
        assert protect(ctypes.c_void_p(page), PAGE, 0) == 0
    kept.append(memory)
    offset = PAGE + (size - t.nbytes if at_the_end else 0)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    copy = flat.as_strided(t.shape, t.stride())
    return copy.copy_(t)

if sys.argv[1] == "break":
    t = guarded(torch.randn(100), True)
    print("reads beyond", flush=True)
    ctypes.string_at(t.data_ptr(), t.nbytes + 1)
checked = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for format in (torch.contiguous_format, torch.channels_last):
        for width, kernel, stride in [(1, 3, 1), (8, 3, 2), (9, 5, 1), (15, 7, 2), (22, 7, 1), (23, 5, 2)]:
            for end in (False, True):
                x = guarded(torch.randn(2, 19, 5, width).to(dtype).to(memory_format=format), end).requires_grad_()
                weight = guarded(torch.randn(19, 1, 3, kernel).to(dtype), end).requires_grad_()
                bias = guarded(torch.randn(19).to(dtype), end).requires_grad_()
                y = se_ext.depthwise_conv(x, weight, bias, stride, "same")
                grad = guarded(torch.randn_like(y), end)
                found = [y, *torch.autograd.grad(y, [x, weight, bias], grad)]
                assert all(t.isfinite().all() for t in found)
                checked += 1
print("checked", checked)
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("what", ["convolve", "break"])
def test_nothing_is_read_beyond_a_tensor(what: str) -> None:
    """Maps, filters, biases and gradients beside pages that may not be read. "break" shows that such a read ends the
    process."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, what], capture_output=True, text=True, timeout=120, check=False
    )
    if what == "break":
        assert done.returncode < 0
        assert done.stdout == "reads beyond\n"
    else:
        assert (done.returncode, done.stdout) == (0, "checked 96\n"), done.stderr


@pytest.mark.skipif(emulated_cuda(), reason="ATen computes it there")
@layouts
def test_saved_for_backward_are_the_arguments(channels_last: bool) -> None:
    """No padded input, no copy in another layout."""
    arguments = CASE.make(Options((2, C, 8, 9), channels_last=channels_last, padding=(2, 1), requires_grad=True))
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        CASE.run(arguments)
    assert set(saved) == {t.data_ptr() for t in CASE.leaves(arguments).values()}
