"""The depthwise convolutions of timm's networks, alone and with the batch norm, SiLU and SE behind them."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

import se_ext
from benchmarks import summary
from benchmarks.cases.depthwise_shapes import Shape, blocks, shapes
from benchmarks.cases.networks import SqueezeExcite, timm
from benchmarks.cases.problem import LAYOUTS, SEED
from benchmarks.cases.tails import randomize
from benchmarks.experiments import CONV_BLOCK, GRAD_INPUT, GRAD_WEIGHT, INFERENCE, TRAIN
from benchmarks.measure.case import Case, Work, WrongResult
from benchmarks.measure.timing import Plan, Step, recorded

QUICK_BATCH = 1
# Where a compiled form and bfloat16 are measured too: one shape per kernel size.
FEW = ("480x14x14-k3", "480x14x14-k5", "384x14x14-k7-bias")
COMPILED_PASSES = (INFERENCE, TRAIN)
ONEDNN, NATIVE, COMPILED = "eager_onednn", "eager_native", "compile"
# Slower than ATen's other form by this factor, a form is not timed: it cannot be the better one.
HOPELESS = 3.0
# The multiplications with a filter in each pass, in those of the forward pass.
PRODUCTS = {INFERENCE: 1, GRAD_INPUT: 1, GRAD_WEIGHT: 1, TRAIN: 3}
ALLOWED_IN_BLOCK = 1e-3

Named = dict[str, Tensor]
Results = Callable[[], Named]


# ---- one convolution ----


@dataclass(frozen=True)
class Problem:
    """x [N, C, H, W], weight [C, 1, k, k] and bias [C] or none by name, and the gradient of the output."""

    shape: Shape
    leaves: Named
    grad_output: Tensor

    def in_form(self, dtype: torch.dtype, layout: str) -> Problem:
        def formed(t: Tensor) -> Tensor:
            return t.to(dtype, memory_format=LAYOUTS[layout]) if t.dim() == 4 else t.to(dtype)

        return Problem(self.shape, {key: formed(t) for key, t in self.leaves.items()}, formed(self.grad_output))

    @property
    def operations(self) -> int:
        """Floating-point operations of a forward pass; those on zeros of the padding count."""
        return 2 * self.grad_output.numel() * self.shape.kernel**2


def draw(shape: Shape, batch: int, dtype: torch.dtype) -> Problem:
    """Random values with a mean per (n, c), which are values of the dtype."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x = normal(batch, shape.channels, shape.height, shape.width) + normal(batch, shape.channels, 1, 1)
    leaves = {"input": x, "weight": normal(shape.channels, 1, shape.kernel, shape.kernel) / shape.kernel}
    if shape.has_bias:
        leaves["bias"] = normal(shape.channels)
    size = aten_s(shape)(*(t.to("meta") for t in leaves.values())).shape
    return Problem(shape, leaves, normal(*size) + normal(*size[:2], 1, 1))


@lru_cache(maxsize=1)
def drawn(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Problem, Named]:
    """The problem, and the float64 formula's results: the same for every layout and pass."""
    problem = draw(shape, batch, dtype)
    return problem, make_step(aten_s(shape), problem.in_form(torch.float64, "nchw"), TRAIN)()


def ours(shape: Shape) -> Callable[..., Tensor]:
    padding = [] if shape.padding is None else [shape.padding]

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.se_ext.depthwise_conv(x, weight, bias, [shape.stride], padding, [1])
        return y

    return convolve


def aten_s(shape: Shape) -> Callable[..., Tensor]:
    """As the network calls it; where the padding is "same", the forward of timm's Conv2dSame."""
    stride, dilation = (shape.stride,) * 2, (1, 1)
    if shape.padding is None:
        return lambda x, weight, bias=None: timm.layers.conv2d_same(
            x, weight, bias, stride, (0, 0), dilation, shape.channels
        )
    padding = (shape.padding,) * 2
    return lambda x, weight, bias=None: functional.conv2d(x, weight, bias, stride, padding, dilation, shape.channels)


def make_step(forward: Callable[..., Tensor], problem: Problem, what: str) -> Results:
    """The call to time, which returns the pass's results by name. The forward pass behind a gradient alone is made
    here, once."""
    if what == INFERENCE:

        def infer() -> Named:
            with torch.no_grad():
                return {"output": forward(*leaves.values())}

        leaves = problem.leaves
        return infer
    wanted = [key for key in problem.leaves if what == TRAIN or (key == "input") == (what == GRAD_INPUT)]
    leaves = {key: t.detach().requires_grad_(key in wanted) for key, t in problem.leaves.items()}
    if what == TRAIN:
        return train_step(lambda: forward(*leaves.values()), leaves, problem.grad_output)
    output = forward(*leaves.values())
    return lambda: gradients(output, {key: leaves[key] for key in wanted}, problem.grad_output, again=True)


def train_step(forward: Callable[[], Tensor], leaves: Named, grad_output: Tensor) -> Results:
    """Forward + backward, with the gradient of every leaf."""

    def step() -> Named:
        y = forward()
        return {"output": y.detach(), **gradients(y, leaves, grad_output)}

    return step


def gradients(y: Tensor, leaves: Named, grad_output: Tensor, again: bool = False) -> Named:
    """`again`: what backward needs is kept for the next call."""
    found = torch.autograd.grad(y, list(leaves.values()), grad_output, retain_graph=again)
    return {f"grad {key}": g for key, g in zip(leaves, found, strict=True)}


def without_onednn(make: Callable[[], Results]) -> Results:
    """The step that `make` makes, made and run without oneDNN. By an attribute: the context manager that torch has for
    it takes as long as a small convolution."""

    def switched(step: Callable[[], object]) -> object:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        try:
            return step()
        finally:
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]

    step = switched(make)
    return lambda: switched(step)  # type: ignore[arg-type, return-value]


@dataclass(frozen=True)
class ConvolutionCase(Case):
    shape: Shape
    dtype: str
    batch: int
    layout: str
    what: str
    compiled: bool = False

    def __str__(self) -> str:
        form = [COMPILED] if self.compiled else []
        return " ".join([self.shape.name, self.dtype, self.layout, self.what, str(self.batch), *form])

    def fallback(self) -> ConvolutionCase | None:
        """Without the compiler, which may fail where eager works."""
        if not self.compiled:
            return None
        return ConvolutionCase(self.shape, self.dtype, self.batch, self.layout, self.what)

    def measure(self, plan: Plan) -> summary.Row:
        """Checks every variant against the float64 formula, then times all of them interleaved."""
        dtype = getattr(torch, self.dtype)
        plain, expected = drawn(self.shape, self.batch, dtype)
        problem = plain.in_form(dtype, self.layout)
        theirs = aten_s(self.shape)
        steps = {summary.OURS: make_step(ours(self.shape), problem, self.what)}
        steps[ONEDNN] = make_step(theirs, problem, self.what)
        native = without_onednn(lambda: make_step(theirs, problem, self.what))
        if not is_hopeless(native, steps[ONEDNN]):
            steps[NATIVE] = native
        if self.compiled:
            torch._dynamo.reset()
            form = torch.compile(theirs, fullgraph=True, dynamic=False)
            steps[COMPILED] = make_step(form, problem, self.what)
        allowed = tolerance(problem)
        for name, step in steps.items():
            check(f"{self} {name}", step(), expected, allowed)
        check_layout(str(self), steps[summary.OURS](), self.layout)
        row = timed(steps, problem.leaves["input"], plan)
        return finished(row, self, self.shape.name, self.what, PRODUCTS[self.what] * problem.operations)


def is_hopeless(step: Step, other: Step) -> bool:
    """Whether the step is so much slower than the other one that it is not worth its time."""
    return seconds(step) > HOPELESS * seconds(other)


def seconds(step: Step) -> float:
    """Of the faster of two calls, because the first one finds nothing in a cache."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def timed(steps: Mapping[str, Step], x: Tensor, plan: Plan) -> summary.Row:
    variants, other_cpu_share = recorded({summary.YARDSTICK: x.detach().clone, **steps}, plan)
    bytes_x = x.numel() * x.element_size()
    return {"bytes_x": bytes_x, "other_cpu_share": other_cpu_share, "variants": variants}


def finished(
    row: summary.Row, case: ConvolutionCase | BlockCase, name: str, mode: str, operations: int | None
) -> summary.Row:
    where = {"name": name, "device": "cpu", "dtype": case.dtype, "batch": case.batch, "layout": case.layout}
    convolution = asdict(case.shape)
    return summary.add_speeds({**where, "mode": mode, "convolution": convolution, "operations": operations, **row})


# ---- the check ----


def tolerance(problem: Problem) -> float:
    """The largest error allowed, relative to the largest value: 8 roundings of the dtype, and 8 of float32, in which
    the kernels sum, times the random walk of the longest sum, the one of a weight's gradient."""
    dtype = problem.grad_output.dtype
    longest_sum = problem.grad_output.numel() / problem.shape.channels
    return 8 * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(longest_sum))


def check(where: str, found: Named, expected: Named, allowed: float) -> None:
    """Raises WrongResult if a tensor in `found` differs from the one of that name in `expected`."""
    for name, value in found.items():
        truth = expected[name]
        error = ((value.double().reshape(truth.shape) - truth).abs().max() / truth.abs().max()).item()
        if not error <= allowed:
            raise WrongResult(f"{where}: {name} is off by {error:.2e} of its maximum; allowed {allowed:.2e}")


def check_layout(where: str, found: Named, layout: str) -> None:
    """Raises WrongResult if a map that se_ext returns is in another layout than the one it got."""
    for name in ("output", "grad input"):
        if name in found and not found[name].is_contiguous(memory_format=LAYOUTS[layout]):
            raise WrongResult(f"{where}: {name} has strides {found[name].stride()}, which is not {layout}")


# ---- with what follows it ----


class Eager(nn.Sequential):
    """As timm's block calls them."""

    def __init__(self, shape: Shape) -> None:
        assert shape.hidden is not None, "no SE block follows"
        super().__init__(
            convolution(shape),
            nn.BatchNorm2d(shape.channels),
            nn.SiLU(inplace=True),
            SqueezeExcite(shape.channels, rd_channels=shape.hidden, act_layer=nn.SiLU),
        )


class Ours(nn.Module):
    """The op, and the module of all that follows; parameters in the order of Eager's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.hidden is not None, "no SE block follows"
        self.conv = convolution(shape)
        self.convolve = ours(shape)
        self.bn_se = se_ext.BatchNormSqueezeExcitation(
            shape.channels, shape.hidden, nn.SiLU, nn.Sigmoid, pre_activation="silu"
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn_se(self.convolve(x, self.conv.weight, self.conv.bias))
        return y


def convolution(shape: Shape) -> nn.Conv2d:
    assert shape.padding is not None, "the plain layer has no padding that depends on the input"
    return nn.Conv2d(
        *(shape.channels,) * 2, shape.kernel, shape.stride, shape.padding, groups=shape.channels, bias=shape.has_bias
    )


PARAMETERS = ("conv weight", "bn weight", "bn bias", "w1", "b1", "w2", "b2")


def modules_of(shape: Shape, layout: str) -> dict[str, nn.Module]:
    """Both forms in training mode, with the same random weights."""
    torch.manual_seed(SEED)
    theirs, own = Eager(shape), Ours(shape)
    randomize(theirs)
    with torch.no_grad():
        for mine, other in zip(own.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other.reshape(mine.shape))
    found: dict[str, nn.Module] = {summary.OURS: own, summary.EAGER: theirs}
    return {key: m.to(memory_format=LAYOUTS[layout]) for key, m in found.items()}  # type: ignore[call-overload]


def block_step(module: nn.Module, problem: Problem) -> Results:
    """Forward + backward, with the gradients of x and of every weight."""
    x = problem.leaves["input"].detach().requires_grad_()
    leaves = {"input": x, **dict(zip(PARAMETERS, module.parameters(), strict=True))}
    return train_step(lambda: module(x), leaves, problem.grad_output)


@dataclass(frozen=True)
class BlockCase(Case):
    shape: Shape
    batch: int
    layout: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{CONV_BLOCK} {self.shape.name} {self.layout} {self.batch}"

    def measure(self, plan: Plan) -> summary.Row:
        """Checks both forms against the float64 formula, then times them interleaved."""
        problem = draw(self.shape, self.batch, torch.float32).in_form(torch.float32, self.layout)
        modules = modules_of(self.shape, self.layout)
        exact = block_step(
            copy.deepcopy(modules[summary.EAGER]).double(), problem.in_form(torch.float64, self.layout)
        )()
        steps = {name: block_step(module, problem) for name, module in modules.items()}
        for name, step in steps.items():
            check(f"{self} {name}", step(), exact, ALLOWED_IN_BLOCK)
        check_layout(str(self), steps[summary.OURS](), self.layout)
        row = timed(steps, problem.leaves["input"], plan)
        return finished(row, self, f"{CONV_BLOCK} {self.shape.name}", TRAIN, None)


# ---- what there is to measure ----


def work(
    text: str,
    *,
    dtype: Sequence[str],
    batch: Sequence[int],
    layout: Sequence[str],
    passes: Sequence[str],
    quick: bool,
) -> Work:
    """A quick run has few samples. Half types are measured on the shapes of FEW, the block in float32 alone."""
    batch = (QUICK_BATCH,) if quick else batch
    alone = [
        ConvolutionCase(shape, one, size, where, what, is_compiled(shape, one, what, quick))
        for shape, one, size, where, what in itertools.product(shapes(), dtype, batch, layout, passes)
        if shape.matches(text) and what != CONV_BLOCK and (one == "float32" or shape.name in FEW)
    ]
    with_block = [
        BlockCase(shape, size, where)
        for shape, size, where in itertools.product(blocks(), batch, layout)
        if shape.matches(text) and CONV_BLOCK in passes and "float32" in dtype
    ]
    # Each row begins with a garbage collection. It takes longer than a small row, unless it leaves out what is here to
    # stay: timm and torch.
    gc.freeze()
    return Work([*alone, *with_block])


def is_compiled(shape: Shape, dtype: str, what: str, quick: bool) -> bool:
    """A quick run compiles one shape only."""
    return shape.name in FEW[: 1 if quick else None] and dtype == "float32" and what in COMPILED_PASSES
