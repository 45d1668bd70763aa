"""Tensors of more than 2³¹ elements: 4.3 GB of bfloat16 each, and up to 18 GB a test.

A small pattern is repeated along the samples, the channels or the rows. A float64 reference of the whole would take
17 GB a tensor. That of two and of three repetitions is small and tells the rest: each repetition has the same values,
and what is summed over the repetitions grows by as much with each. The pattern's size is odd, so an offset that wraps
at 2³¹ or 2³² lands on other values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close, make_map, memory_format
from ops import BY_NAME, OpCase, Options, compare, in_float64
from torch import Tensor

import se_ext

pytestmark = [pytest.mark.cpu_only, pytest.mark.slow, pytest.mark.large]

TIMES = 435
# Patterns of about 5 million elements, by what they are repeated along.
SHAPES = {
    "samples": (3, 33, 223, 227),
    "channels": (1, 523, 97, 99),
    "rows": (1, 3, 409, 4049),
    "rows of one channel": (1, 1, 1237, 4049),
}
LETTERS = {"samples": "N", "channels": "C", "rows": "H", "rows of one channel": "H"}
# The dims of arguments and results, by name; H is the first spatial one.
DIMS = {
    **dict.fromkeys(("input", "residual", "output"), "NCH"),
    **dict.fromkeys(("scale", "z"), "NC"),
    **dict.fromkeys(("bn_weight", "bn_bias", "weight", "bias", "mean", "var", "inverse"), "C"),
    **dict.fromkeys(("running_mean", "running_var", "b2", "w2"), "C"),
    "w1": "MC",
    "drop_scale": "N",
}
# An op on maps that no other op of the table runs inside of it.
OPS = [c for c in BY_NAME.values() if c.has_map and c.forward is None and not c.name.endswith("_forward")]


def repeated(name: str, value: Any, along: str, times: int) -> Any:
    """An argument with its pattern so many times along a dim, in the same layout."""
    if not isinstance(value, Tensor):
        return value
    if LETTERS[along] not in DIMS.get(name, ""):
        return value.detach().clone()  # the op may write it
    if name == "w1":
        value = value / times  # a hidden value is the same sum as before
    dim = DIMS[name].index(LETTERS[along])
    shape = [size * times if d == dim else size for d, size in enumerate(value.shape)]
    channels_last = value.dim() == 4 and not value.is_contiguous()
    made = torch.empty(shape, dtype=value.dtype, memory_format=memory_format(len(shape), channels_last))
    made.unflatten(dim, (times, -1)).copy_(value.detach().unsqueeze(dim))
    return made


def repetitions(name: str, value: Tensor, along: str, times: int) -> list[Tensor]:
    """The parts of a result, one for each repetition; the whole if it has no such dim."""
    if LETTERS[along] not in DIMS.get(name, ""):
        return [value]
    dim = DIMS[name].index(LETTERS[along])
    return list(value.unflatten(dim, (times, -1)).unbind(dim))


def names_of(case: OpCase, wanted: list[str]) -> list[str]:
    """Of the op's results, of what it writes, and of the gradients that are wanted."""
    returned = [r.name or ("z" if case.name == "squeeze" else "output") for r in case.op._schema.returns]
    return [*returned, *case.writes, *wanted]


def gradient(name: str, grad: Tensor, along: str, times: int) -> Tensor:
    """dL/dy. That of a mean over the points is shared by all of them."""
    made = repeated(name, grad, along, times)
    return made * times if name == "z" and LETTERS[along] == "H" else made


def in_float64_of(
    case: OpCase, given: dict[str, Any], grad: Tensor, wanted: list[str], along: str, times: int
) -> list[list[Tensor] | None]:
    """The formula of so many repetitions: the parts of each result."""
    arguments = {name: repeated(name, value, along, times) for name, value in in_float64(given).items()}
    for name in wanted:
        arguments[name] = arguments[name].detach().requires_grad_()
    results, names = list(case.exact(arguments)), names_of(case, wanted)
    if wanted:
        of_y = gradient(names[0], grad.double(), along, times)
        results += torch.autograd.grad(results[0], [arguments[name] for name in wanted], of_y)
    return [
        None if t is None or t.numel() == 0 else repetitions(name, t.detach(), along, times)
        for name, t in zip(names, results, strict=True)
    ]


def exact_parts(
    case: OpCase, given: dict[str, Any], grad: Tensor, wanted: list[str], along: str
) -> list[list[Tensor] | None]:
    """Of each result: the first, a middle and the last repetition of many, or the whole."""
    of_two, of_three = (in_float64_of(case, given, grad, wanted, along, times) for times in (2, 3))
    found: list[list[Tensor] | None] = []
    for name, two, three in zip(names_of(case, wanted), of_two, of_three, strict=True):
        if two is None or three is None:
            found.append(None)
            continue
        # What a repetition adds to a sum over them. A variance without bias nears its limit, and is there already.
        grows = 0 * three[0] if name == "running_var" else three[0] - two[0]
        found.append([part + (TIMES - 3) * grows for part in three])
    return found


def check(case: OpCase, along: str, trains: bool, options: Options) -> None:
    given = case.make(options)
    shape = case.run(case.make(options))[0].shape
    shares = given.get("residual") is not None and case.writes != ("input",)
    if shares:
        given["residual"] = given["input"]  # read alone: needs no memory of its own
    is_as_input = shape == options.shape
    last = options.channels_last and len(shape) > 2
    grad = given["input"].clone() if is_as_input else make_map(shape, options.dtype, last)
    wanted = [name for name in case.differentiable if trains and given[name] is not None]
    names = names_of(case, wanted)
    exact = exact_parts(case, given, grad, wanted, along)

    big = {name: repeated(name, value, along, TIMES) for name, value in given.items() if name != "residual"}
    if "residual" in given:
        residual = given["residual"]
        big["residual"] = big["input"].detach() if shares else repeated("residual", residual, along, TIMES)
    assert big["input"].numel() > 2**31
    leaves = [big[name].requires_grad_() for name in wanted]
    found = case.run({name: big[name] for name in given})
    if wanted:
        of_y = big["input"].detach() if is_as_input else gradient(names[0], grad, along, TIMES)
        found += torch.autograd.grad(found[0], leaves, of_y)
    # The repetitions' roundings are the same, so that a sum over them errs by the same part as a sum over one.
    summed = options.points * options.shape[0] * options.shape[1]
    for name, ours, expected in zip(names, found, exact, strict=True):
        if expected is None:
            assert ours is None or ours.numel() == 0
            continue
        parts = repetitions(name, ours.detach(), along, TIMES)
        for at in (0, 0.5, 1):  # a convolution's first and last rows have other neighbours
            part, exact_part = (of[round(at * (len(of) - 1))] for of in (parts, expected))
            compare(part, exact_part, ours.dtype, summed)
        for i, part in enumerate(parts[1:-1]):
            assert torch.equal(part, parts[1]), f"{name}: repetition {i + 1}"


@pytest.mark.parametrize("along", list(SHAPES))
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", OPS, ids=str)
def test_more_elements_than_32_bits_count(case: OpCase, trains: bool, channels_last: bool, along: str) -> None:
    if trains and not case.differentiable:
        pytest.skip("has no derivative")
    if along == "rows of one channel" and channels_last:
        pytest.skip("one channel has one layout")
    options = Options(SHAPES[along], 5, torch.bfloat16, torch.float32, channels_last, pre_activation="silu")
    # The gradient of a residual is one map more.
    check(case, along, trains, replace(options, residual=not trains or along == "samples"))


def test_a_strided_convolution() -> None:
    options = Options((3, 33, 223, 227), 5, torch.bfloat16, torch.float32, kernel=5, stride=2)
    check(BY_NAME["depthwise_conv"], "samples", True, options)


def test_maps_of_one_point() -> None:
    """As many means and scales as values."""
    n, c = 12_990_013, 167
    x, scale = torch.empty(n, c, 1, 1, dtype=torch.bfloat16), torch.empty(n, c, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    a, b = torch.randn(31 * 37, c).bfloat16(), torch.rand(31 * 37, c).bfloat16()
    parts = range(0, n, len(a))
    for i in parts:
        x[i : i + len(a), :, 0, 0], scale[i : i + len(a)] = a[: n - i], b[: n - i]
    for found, expected in ((se_ext.squeeze, a), (lambda x: se_ext.rescale(x, scale).flatten(1), a * b)):
        y = found(x)
        assert all(torch.equal(y[i : i + len(a)], expected[: n - i]) for i in parts)
        del y


def test_weights_of_an_excitation() -> None:
    """Two matrices of 2³¹ elements and more, and their gradients; the rows of either are compared in float64."""
    c = m = 46_411
    z = torch.randn(2, c).bfloat16()
    pattern = torch.randn(1009, 1013).bfloat16() / math.sqrt(c)
    w1 = pattern.repeat(m // 1009 + 1, c // 1013 + 1)[:m, :c].contiguous().requires_grad_()
    w2 = w1.detach()
    assert w1.numel() > 2**31
    b1, b2 = torch.randn(m).bfloat16(), torch.randn(c).bfloat16()
    scale = se_ext.excite(z, w1, b1, w2, b2)
    hidden = torch.cat([z.double() @ rows.double().t() for rows in w1.detach().split(2048)], 1) + b1.double()
    h = hidden.relu()
    last = torch.cat([h @ rows.double().t() for rows in w2.split(2048)], 1) + b2.double()
    assert_close(scale.detach(), last.sigmoid(), torch.bfloat16, c + m)
    grad = torch.randn(2, c).bfloat16()
    [grad_w1] = torch.autograd.grad(scale, w1, grad)
    s = last.sigmoid()
    d_last = grad.double() * s * (1 - s)
    d_hidden = sum(d_last[:, i : i + 2048] @ w2[i : i + 2048].double() for i in range(0, c, 2048)) * (hidden > 0)
    for i in (*range(0, m - 2048, 15_013), m - 2048):
        expected = d_hidden[:, i : i + 2048].t() @ z.double()
        assert_close(grad_w1[i : i + 2048], expected, torch.bfloat16, 2 * (c + m))
