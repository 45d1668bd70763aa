"""Bad input: a clear error, of the right type and with the exact text, before anything is read or written; the same
for real, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import MODES, PARTIAL_OVERLAP, device, tensors_of
from torch import nn

import se_ext
from se_ext import _loader
from se_ext._names import ACTIVATIONS, GATES, name_of

N, C, M = 3, 8, 4
KNOWN_ACTIVATIONS = "identity, relu, relu6, silu, gelu, hardswish, leaky_relu, tanh, sigmoid"
KNOWN_GATES = "sigmoid, hardsigmoid, tanh, relu, identity, double_sigmoid"
RANK = "expected input of shape [N, C, *spatial] with 1 to 3 spatial dims, got "
FLOATING = "of dtype float32, float64, bfloat16 or float16, got "
SHARED = "expected input whose elements do not share memory (the op writes into it), got shape "


def recorded(name: str) -> str:
    return (
        "expected no argument that requires grad while grad mode is on (the op writes into input), "
        f"got {name}; use the op without the underscore, or torch.no_grad()"
    )


def x(*shape: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    return torch.ones(shape or (N, C, 5, 5), dtype=dtype, **kwargs)


def weights(**other: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Good w1, b1, w2, b2, but for the ones given."""
    return {"w1": x(M, C), "b1": x(M), "w2": x(C, M), "b2": x(C)} | other


@dataclass
class Case:
    """`make(other_device)` returns the arguments of `op`; {here} and {there} in the message are the two devices."""

    op: str
    name: str
    error: type[Exception]
    message: str
    make: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(torch.ops.se_ext, self.op)(*args, **kwargs)


def case(
    op: str,
    name: str,
    error: type[Exception],
    message: str,
    make: Callable[[str], tuple[Any, dict[str, Any]]],
    modes: tuple[str, ...] = MODES,
) -> Case:
    def arguments(there: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first, kwargs = make(there)
        return (first,), kwargs

    return Case(op, name, error, f"{op}: {message}", arguments, modes)


def map_cases(op: str, others: Callable[[], dict[str, Any]]) -> list[Case]:
    """What every op says of a bad map."""
    return [
        case(op, "2d", RuntimeError, f"{RANK}[3, 8]", lambda _: (x(N, C), others())),
        case(op, "6d", RuntimeError, f"{RANK}[3, 8, 1, 1, 1, 1]", lambda _: (x(N, C, 1, 1, 1, 1), others())),
        case(op, "integer", TypeError, f"expected input {FLOATING}int64", lambda _: (x(dtype=torch.int64), others())),
        case(op, "bool", TypeError, f"expected input {FLOATING}bool", lambda _: (x(dtype=torch.bool), others())),
        case(
            op,
            "complex",
            TypeError,
            f"expected input {FLOATING}complex64",
            lambda _: (x(dtype=torch.complex64), others()),
        ),
        case(
            op,
            "sparse",
            RuntimeError,
            "expected input to be a strided tensor, got layout Sparse",
            lambda _: (x().to_sparse(), others()),
            modes=("real", "fake"),  # there is no sparse meta tensor of these
        ),
    ]


def excitation_cases(op: str, first: Callable[..., torch.Tensor]) -> list[Case]:
    """What the ops with an excitation say of its weights and names; `first(dtype=…)` is their first argument."""

    def bad(name: str, error: type[Exception], message: str, **other: Any) -> Case:
        """`other` overrides a keyword by a tensor made in the case's mode, or by a name."""

        def make(there: str) -> tuple[torch.Tensor, dict[str, Any]]:
            made = {k: v(there) if callable(v) else v for k, v in other.items()}
            return first(), weights(**made)

        return case(op, name, error, message, make)

    w1, w2 = "[M, 8] or [M, 8, 1, 1]", "[8, 4] or [8, 4, 1, 1]"
    rows = [
        bad("w1-columns", RuntimeError, f"expected w1 of shape {w1}, got [4, 7]", w1=lambda _: x(M, 7)),
        bad("w1-1d", RuntimeError, f"expected w1 of shape {w1}, got [8]", w1=lambda _: x(C)),
        bad("w1-3d", RuntimeError, f"expected w1 of shape {w1}, got [4, 8, 1]", w1=lambda _: x(M, C, 1)),
        bad("w1-3x3", RuntimeError, f"expected w1 of shape {w1}, got [4, 8, 3, 3]", w1=lambda _: x(M, C, 3, 3)),
        bad("w2-transposed", RuntimeError, f"expected w2 of shape {w2}, got [4, 8]", w2=lambda _: x(M, C)),
        bad("w2-3d", RuntimeError, f"expected w2 of shape {w2}, got [8, 4, 1]", w2=lambda _: x(C, M, 1)),
        bad("w2-3x3", RuntimeError, f"expected w2 of shape {w2}, got [8, 4, 3, 3]", w2=lambda _: x(C, M, 3, 3)),
        bad("b1-length", RuntimeError, "expected b1 of shape [4], got [8]", b1=lambda _: x(C)),
        bad("b1-2d", RuntimeError, "expected b1 of shape [4], got [4, 1]", b1=lambda _: x(M, 1)),
        bad("b2-length", RuntimeError, "expected b2 of shape [8], got [4]", b2=lambda _: x(M)),
        bad("w1-dtype", TypeError, "expected w1 of dtype float32, got float64", w1=lambda _: x(M, C).double()),
        bad("w1-half", TypeError, "expected w1 of dtype float32, got bfloat16", w1=lambda _: x(M, C).bfloat16()),
        bad("w2-dtype", TypeError, "expected w2 of dtype float32, got float64", w2=lambda _: x(C, M).double()),
        bad("b1-dtype", TypeError, "expected b1 of dtype float32, got float16", b1=lambda _: x(M).half()),
        bad("b2-dtype", TypeError, "expected b2 of dtype float32, got int32", b2=lambda _: x(C).int()),
        bad(
            "activation",
            ValueError,
            f'expected activation to be one of {KNOWN_ACTIVATIONS}, got "mish"',
            activation="mish",
        ),
        bad(
            "activation-empty",
            ValueError,
            f'expected activation to be one of {KNOWN_ACTIVATIONS}, got ""',
            activation="",
        ),
        bad("gate", ValueError, f'expected gate to be one of {KNOWN_GATES}, got "silu"', gate="silu"),
    ]
    for name, shape in (("w1", (M, C)), ("b1", (M,)), ("w2", (C, M)), ("b2", (C,))):
        rows.append(
            bad(
                f"{name}-device",
                RuntimeError,
                f"expected {name} on device {{here}}, got {{there}}",
                **{name: partial(lambda shape, there: x(*shape, device=there), shape)},
            )
        )
    rows.append(
        case(
            op,
            "w1-other-half",
            TypeError,
            "expected w1 of dtype bfloat16 or float32, got float16",
            lambda _: (first(dtype=torch.bfloat16), weights(w1=x(M, C).half())),
        )
    )
    rows.append(
        case(
            op,
            "b1-beside-half",
            TypeError,
            "expected b1 of dtype float32, got bfloat16",  # a bias goes with its weight, not with the map
            lambda _: (first(dtype=torch.bfloat16), weights(b1=x(M).bfloat16())),
        )
    )
    return rows


def tail_cases(op: str, others: Callable[[], dict[str, Any]]) -> list[Case]:
    """What the ops with a residual and a post-activation say of them."""
    return [
        case(
            op,
            "residual-shape",
            RuntimeError,
            "expected residual of shape [3, 8, 5, 5], got [3, 8, 5, 4]",
            lambda _: (x(), others() | {"residual": x(N, C, 5, 4)}),
        ),
        case(
            op,
            "residual-broadcast",
            RuntimeError,
            "expected residual of shape [3, 8, 5, 5], got [1, 8, 5, 5]",
            lambda _: (x(), others() | {"residual": x(1, C, 5, 5)}),
        ),
        case(
            op,
            "residual-dtype",
            TypeError,
            "expected residual of dtype float32, got bfloat16",
            lambda _: (x(), others() | {"residual": x().bfloat16()}),
        ),
        case(
            op,
            "residual-float32-beside-half",
            TypeError,
            "expected residual of dtype float16, got float32",
            lambda _: (x(dtype=torch.float16), others() | {"residual": x()}),
        ),
        case(
            op,
            "residual-device",
            RuntimeError,
            "expected residual on device {here}, got {there}",
            lambda there: (x(), others() | {"residual": x(device=there)}),
        ),
        case(
            op,
            "post_activation",
            ValueError,
            f'expected post_activation to be one of {KNOWN_ACTIVATIONS}, got "hardsigmoid"',
            lambda _: (x(), others() | {"post_activation": "hardsigmoid"}),
        ),
    ]


def scale_cases(op: str) -> list[Case]:
    def bad(name: str, error: type[Exception], message: str, make: Callable[[str], Any], dtype: Any = torch.float32):
        return case(op, name, error, message, lambda there: (x(dtype=dtype), {"scale": make(there)}))

    return [
        bad("scale-channels", RuntimeError, "expected scale of shape [3, 8], got [3, 7]", lambda _: x(N, 7)),
        bad("scale-1d", RuntimeError, "expected scale of shape [3, 8], got [8]", lambda _: x(C)),
        bad("scale-4d", RuntimeError, "expected scale of shape [3, 8], got [3, 8, 1, 1]", lambda _: x(N, C, 1, 1)),
        bad("scale-dtype", TypeError, "expected scale of dtype float32, got float64", lambda _: x(N, C).double()),
        bad(
            "scale-other-half",
            TypeError,
            "expected scale of dtype float16 or float32, got bfloat16",
            lambda _: x(N, C).bfloat16(),
            torch.float16,
        ),
        bad(
            "scale-device",
            RuntimeError,
            "expected scale on device {here}, got {there}",
            lambda there: x(N, C, device=there),
        ),
    ]


def filters(**other: Any) -> dict[str, Any]:
    """A good filter of a depthwise convolution, but for what is given."""
    return {"weight": x(C, 1, 3, 3)} | other


def convolution_cases() -> list[Case]:
    """What the depthwise convolution says of its filters, and of where they are put."""

    def bad(name: str, error: type[Exception], message: str, **other: Any) -> Case:
        """`other` overrides a keyword by a tensor made in the case's mode, or by a value."""

        def make(there: str) -> tuple[torch.Tensor, dict[str, Any]]:
            made = {k: v(there) if callable(v) else v for k, v in other.items()}
            return made.pop("input", x()), filters(**made)

        return case("depthwise_conv", name, error, message, make)

    shape = "expected weight of shape [8, 1, *kernel] with 2 dims of kernel (input is [3, 8, 5, 5]), got "
    most = "of at most 2147483647"
    one, two = "of 1 value or 2 (one for each spatial dim), got ", "or two, begin and end"
    return [
        bad("weight-full", RuntimeError, f"{shape}[8, 8, 3, 3]", weight=lambda _: x(C, C, 3, 3)),
        bad("weight-channels", RuntimeError, f"{shape}[4, 1, 3, 3]", weight=lambda _: x(4, 1, 3, 3)),
        bad("weight-multiplier", RuntimeError, f"{shape}[16, 1, 3, 3]", weight=lambda _: x(2 * C, 1, 3, 3)),
        bad("weight-1d", RuntimeError, f"{shape}[8, 1, 3]", weight=lambda _: x(C, 1, 3)),
        bad("weight-no-dims", RuntimeError, f"{shape}[]", weight=lambda _: x(C).sum()),
        bad(
            "weight-empty",
            RuntimeError,
            "expected weight whose kernel has no dim of size 0, got [8, 1, 3, 0]",
            weight=lambda _: x(C, 1, 3, 0),
        ),
        bad(
            "weight-dtype",
            TypeError,
            "expected weight of dtype float32, got float64",
            weight=lambda _: x(C, 1, 3, 3).double(),
        ),
        bad(
            "weight-other-half",
            TypeError,
            "expected weight of dtype bfloat16 or float32, got float16",
            input=lambda _: x(dtype=torch.bfloat16),
            weight=lambda _: x(C, 1, 3, 3).half(),
        ),
        bad(
            "weight-device",
            RuntimeError,
            "expected weight on device {here}, got {there}",
            weight=lambda there: x(C, 1, 3, 3, device=there),
        ),
        bad("bias-length", RuntimeError, "expected bias of shape [8], got [3]", bias=lambda _: x(3)),
        bad("bias-2d", RuntimeError, "expected bias of shape [8], got [8, 1]", bias=lambda _: x(C, 1)),
        bad("bias-dtype", TypeError, "expected bias of dtype float32, got bfloat16", bias=lambda _: x(C).bfloat16()),
        bad(
            "bias-device",
            RuntimeError,
            "expected bias on device {here}, got {there}",
            bias=lambda there: x(C, device=there),
        ),
        bad("stride-length", RuntimeError, f"expected stride {one}[1, 1, 1]", stride=[1, 1, 1]),
        bad("stride-none", RuntimeError, f"expected stride {one}[]", stride=[]),
        bad("stride-zero", RuntimeError, "expected stride of at least 1, got [1, 0]", stride=[1, 0]),
        bad("dilation-length", RuntimeError, f"expected dilation {one}[1, 1, 1, 1]", dilation=[1, 1, 1, 1]),
        bad("stride-huge", RuntimeError, f"expected stride {most}, got [{2**63 - 1}]", stride=2**63 - 1, padding=[]),
        bad("dilation-huge", RuntimeError, f"expected dilation {most}, got [{2**62}]", dilation=2**62),
        bad("padding-huge", RuntimeError, f"expected padding {most}, got [0, {2**31}]", padding=[0, 2**31]),
        bad(
            "weight-huge",
            RuntimeError,
            f"expected weight whose kernel has no dim {most.replace('at most', 'more than')}, got [8, 1, 3, {2**31}]",
            weight=lambda _: x(C, 1, 1, 1).expand(C, 1, 3, 2**31),
        ),
        bad("dilation-zero", RuntimeError, "expected dilation of at least 1, got [0]", dilation=0),
        bad(
            "padding-length",
            RuntimeError,
            f'expected padding of 1 value or 2 (one for each spatial dim; {two}; none: "same"), got [1, 1, 1]',
            padding=[1, 1, 1],
        ),
        bad("padding-negative", RuntimeError, "expected padding of at least 0, got [0, -1]", padding=[0, -1]),
        bad(
            "small-input",
            RuntimeError,
            "expected input that is, with its padding, at least as large as the filter, 7, got a dim of 5 + 1",
            weight=lambda _: x(C, 1, 3, 7),
            padding=[1, 1, 0, 1],
        ),
        bad(
            "dilated",
            RuntimeError,
            "expected input that is, with its padding, at least as large as the filter, 9, got a dim of 5 + 2",
            padding=1,
            dilation=[4, 1],
        ),
        bad(
            "empty-input",
            RuntimeError,
            "expected input of at least one point along each spatial dim, got [3, 8, 0, 5]",
            input=lambda _: x(N, C, 0, 5),
        ),
        bad(
            "empty-input-padded",
            RuntimeError,
            "expected input of at least one point along each spatial dim, got [3, 8, 0, 5]",
            input=lambda _: x(N, C, 0, 5),
            padding=3,
        ),
        bad(
            "empty-input-same",
            RuntimeError,
            "expected input of at least one point along each spatial dim, got [3, 8, 5, 0]",
            input=lambda _: x(N, C, 5, 0),
            padding=[],
        ),
    ]


def in_place_cases(op: str, others: Callable[[], dict[str, Any]], small: tuple[str, tuple[int, ...]]) -> list[Case]:
    """What the ops that write into their input say of one that they must not write into."""
    name, shape = small

    def halves_that_overlap() -> tuple[torch.Tensor, torch.Tensor]:
        memory = x(2 * N * C * 25)
        size = N * C * 25
        return memory[:size].view(N, C, 5, 5), memory[100 : size + 100].view(N, C, 5, 5)

    def overlapping_residual(_: str) -> tuple[torch.Tensor, dict[str, Any]]:
        input, residual = halves_that_overlap()
        return input, others() | {"residual": residual}

    def transposed_residual(_: str) -> tuple[torch.Tensor, dict[str, Any]]:
        input = x()
        return input, others() | {"residual": input.transpose(2, 3)}

    return [
        case(op, "requires-grad", RuntimeError, recorded("input"), lambda _: (x(requires_grad=True), others())),
        case(
            op,
            f"{name}-requires-grad",
            RuntimeError,
            recorded(name),
            lambda _: (x(), others() | {name: x(*shape, requires_grad=True)}),
        ),
        case(
            op,
            "residual-requires-grad",
            RuntimeError,
            recorded("residual"),
            lambda _: (x(), others() | {"residual": x(requires_grad=True)}),
        ),
        case(
            op,
            "expanded-points",
            RuntimeError,
            f"{SHARED}[3, 8, 5, 5] with strides [8, 1, 0, 0]",
            lambda _: (x(N, C, 1, 1).expand(N, C, 5, 5), others()),
        ),
        case(
            op,
            "expanded-batch",
            RuntimeError,
            f"{SHARED}[3, 8, 5, 5] with strides [0, 25, 5, 1]",
            lambda _: (x(1, C, 5, 5).expand(N, C, 5, 5), others()),
        ),
        case(
            op,
            "windows",
            RuntimeError,
            f"{SHARED}[3, 8, 5, 5] with strides [100, 12, 1, 1]",
            lambda _: (x(400).as_strided((N, C, 5, 5), (100, 12, 1, 1)), others()),
        ),
        case(
            op,
            "windows-two-apart",
            RuntimeError,
            f"{SHARED}[3, 8, 5, 5] with strides [100, 12, 3, 2]",
            lambda _: (x(400).as_strided((N, C, 5, 5), (100, 12, 3, 2)), others()),
        ),
        case(op, "residual-overlaps", RuntimeError, PARTIAL_OVERLAP, overlapping_residual),
        case(op, "residual-transposed", RuntimeError, PARTIAL_OVERLAP, transposed_residual),
    ]


def scale() -> dict[str, Any]:
    return {"scale": x(N, C)}


def bn_weights() -> dict[str, Any]:
    names = {"pre_activation": "silu", "activation": "relu", "gate": "sigmoid", "post_activation": "identity"}
    rest = {"batch_statistics": False, "eps": 1e-5, "residual": None, "drop_scale": None}
    return {"bn_weight": x(C), "bn_bias": x(C), **weights(), **names, **rest}


def bn_vectors() -> dict[str, Any]:
    return {"weight": x(C), "bias": x(C), "batch_statistics": False, "eps": 1e-5, "activation": "relu"}


def running(given: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same of the op that takes running statistics."""

    def made() -> dict[str, Any]:
        rest = {k: v for k, v in given().items() if k != "batch_statistics"}
        return rest | {"running_mean": x(C), "running_var": x(C)}

    return made


IN_PLACE = [
    *map_cases("rescale_", scale),
    *scale_cases("rescale_"),
    *tail_cases("rescale_", scale),
    *in_place_cases("rescale_", scale, ("scale", (N, C))),
    *map_cases("squeeze_excite_", weights),
    *excitation_cases("squeeze_excite_", x),
    *tail_cases("squeeze_excite_", weights),
    *in_place_cases("squeeze_excite_", weights, ("w2", (C, M))),
    *map_cases("_bn_squeeze_excite_", bn_weights),
    *in_place_cases("_bn_squeeze_excite_", bn_weights, ("bn_weight", (C,))),
    *map_cases("_bn_activation_", bn_vectors),
    *in_place_cases("_bn_activation_", bn_vectors, ("weight", (C,))),
    *(
        replace(bad, op=f"{name}running_")
        for name, given, weight in (
            ("_bn_squeeze_excite_", bn_weights, "bn_weight"),
            ("_bn_activation_", bn_vectors, "weight"),
        )
        for bad in (
            *in_place_cases(name, running(given), (weight, (C,))),
            case(
                name,
                "running_mean-shape",
                RuntimeError,
                "expected running_mean of shape [8], got [4]",
                lambda _, given=given: (x(), running(given)() | {"running_mean": x(M)}),
            ),
            case(
                name,
                "running_var-dtype",
                TypeError,
                f"expected running_var {FLOATING}int64",
                lambda _, given=given: (x(), running(given)() | {"running_var": x(C, dtype=torch.int64)}),
            ),
        )
    ),
]
CASES = [
    *map_cases("squeeze", dict),
    *map_cases("rescale", scale),
    *scale_cases("rescale"),
    *tail_cases("rescale", scale),
    *map_cases("squeeze_excite", weights),
    *excitation_cases("squeeze_excite", x),
    *tail_cases("squeeze_excite", weights),
    *excitation_cases("excite", lambda dtype=torch.float32: x(N, C, dtype=dtype)),
    case("excite", "1d", RuntimeError, "expected z of shape [N, C], got [8]", lambda _: (x(C), weights())),
    case(
        "excite",
        "4d",
        RuntimeError,
        "expected z of shape [N, C], got [3, 8, 1, 1]",
        lambda _: (x(N, C, 1, 1), weights()),
    ),
    case(
        "excite", "integer", TypeError, f"expected z {FLOATING}int64", lambda _: (x(N, C, dtype=torch.int64), weights())
    ),
    case(
        "excite",
        "complex",
        TypeError,
        f"expected z {FLOATING}complex128",
        lambda _: (x(N, C, dtype=torch.complex128), weights()),
    ),
    *map_cases("depthwise_conv", filters),
    *convolution_cases(),
    *IN_PLACE,
]


def in_modes(cases: list[Case]) -> list[Any]:
    return [pytest.param(c, mode, id=f"{c}-{mode}") for c in cases for mode in c.modes]


@pytest.mark.parametrize(("bad", "mode"), in_modes(CASES))
def test_bad_input_raises_the_documented_error(bad: Case, mode: str) -> None:
    with tensors_of(mode) as there:
        here = str(x(1).device)
        args, kwargs = bad.make(there)
        with pytest.raises(bad.error) as caught:
            bad.call(args, kwargs)
    message = bad.message.replace("{here}", here).replace("{there}", there)
    assert str(caught.value) == message
    assert type(caught.value) is bad.error


@pytest.mark.parametrize("bad", IN_PLACE, ids=str)
def test_a_failing_in_place_call_leaves_its_input_alone(bad: Case) -> None:
    args, kwargs = bad.make("meta")
    input = args[0]
    if input.layout is torch.strided and input.is_floating_point():
        with torch.no_grad():
            memory = torch.empty(0, dtype=input.dtype).set_(input.untyped_storage())
            memory.copy_(torch.randn(memory.shape))
    before, version = input.detach().clone(), input._version
    with pytest.raises(bad.error):
        bad.call(args, kwargs)
    assert input._version == version
    after = input.detach()
    if input.layout is torch.sparse_coo:
        before, after = before.to_dense(), after.to_dense()
    assert torch.equal(after, before)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        ("excite", "z", (N, C)),
        ("excite", "w1", (M, C)),
        ("squeeze_excite", "w1", (M, C)),
        ("squeeze_excite", "b1", (M,)),
        ("squeeze_excite", "w2", (C, M)),
        ("squeeze_excite", "residual", (N, C, 5, 5)),
        ("squeeze_excite_", "residual", (N, C, 5, 5)),
        ("rescale", "scale", (N, C)),
        ("rescale", "residual", (N, C, 5, 5)),
        ("rescale_", "scale", (N, C)),
        ("depthwise_conv", "weight", (C, 1, 3, 3)),
        ("depthwise_conv", "bias", (C,)),
    ],
)
def test_a_sparse_argument_of_any_place_is_refused(op: str, name: str, shape: tuple[int, ...], mode: str) -> None:
    with tensors_of(mode):
        small = {"rescale": scale, "rescale_": scale, "depthwise_conv": filters}
        kwargs: dict[str, Any] = small.get(op, weights)()
        kwargs["z" if op == "excite" else "input"] = x(N, C) if op == "excite" else x()
        kwargs[name] = x(*shape).to_sparse()
        with pytest.raises(RuntimeError) as caught:
            getattr(torch.ops.se_ext, op)(**kwargs)
    assert str(caught.value) == f"{op}: expected {name} to be a strided tensor, got layout Sparse"


@pytest.mark.parametrize("op", ["squeeze", "rescale", "squeeze_excite", "rescale_", "squeeze_excite_"])
@pytest.mark.parametrize("value", [[1.0, 2.0], 3.0, "x"], ids=["list", "float", "str"])
def test_an_input_that_is_no_tensor_gets_torchs_own_error(op: str, value: Any) -> None:
    kwargs = {} if op == "squeeze" else scale() if "rescale" in op else weights()
    expected = f"Expected a value of type 'Tensor' for argument 'input' but instead found type '{type(value).__name__}'"
    with pytest.raises(RuntimeError, match=expected):
        getattr(torch.ops.se_ext, op)(value, **kwargs)


def test_the_functions_raise_what_the_ops_raise() -> None:
    with pytest.raises(RuntimeError, match=r"^squeeze: expected input of shape \[N, C, \*spatial\]"):
        se_ext.squeeze(x(N, C))
    with pytest.raises(RuntimeError, match=r"^excite: expected z of shape \[N, C\], got \[8\]$"):
        se_ext.excite(x(C), **weights())
    with pytest.raises(RuntimeError, match=r"^rescale: expected scale of shape \[3, 8\], got \[8\]$"):
        se_ext.rescale(x(), x(C))
    with pytest.raises(
        RuntimeError, match=r"^squeeze_excite: expected w2 of shape \[8, 4\] or \[8, 4, 1, 1\], got \[4, 8\]$"
    ):
        se_ext.squeeze_excite(x(), **weights(w2=x(M, C)))
    with pytest.raises(RuntimeError, match=r"^squeeze_excite_: expected no argument that requires grad"):
        se_ext.squeeze_excite(x(), **weights(w2=x(C, M, requires_grad=True)), inplace=True)
    with pytest.raises(RuntimeError, match=r"^depthwise_conv: expected bias of shape \[8\], got \[4\]$"):
        se_ext.depthwise_conv(x(), **filters(bias=x(M)))


def test_a_padding_that_is_no_known_word() -> None:
    expected = '^depthwise_conv: expected padding to be numbers, "same" or "valid", got "full"$'
    with pytest.raises(ValueError, match=expected):
        se_ext.depthwise_conv(x(), **filters(), padding="full")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_under_autograd_and_transforms_are_the_same(requires_grad: bool) -> None:
    """The check runs at every entrance: recorded, and under torch.func, where the plain formula runs."""
    bad = {"w1": x(M, C, requires_grad=requires_grad), "b1": None, "w2": x(M, C), "b2": None}
    match = r"^squeeze_excite: expected w2 of shape \[8, 4\] or \[8, 4, 1, 1\], got \[4, 8\]$"
    with pytest.raises(RuntimeError, match=match):
        torch.ops.se_ext.squeeze_excite(x(), **bad)
    with pytest.raises(RuntimeError, match=match):
        torch.func.vmap(lambda t: torch.ops.se_ext.squeeze_excite(t, **bad))(x(2, N, C, 5, 5))
    with pytest.raises(RuntimeError, match=match):
        torch.func.jvp(lambda t: torch.ops.se_ext.squeeze_excite(t, **bad), (x(),), (x(),))


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_the_wrong_shape_is_refused(mode: str) -> None:
    with tensors_of(mode):
        ops, g = torch.ops.se_ext, x(N, C, 5, 4)
        w = [x(M, C), x(M), x(C, M), x(C)]
        with pytest.raises(
            RuntimeError, match=r"^rescale: expected grad_output of shape \[3, 8, 5, 5\], got \[3, 8, 5, 4\]$"
        ):
            ops._rescale_backward(g, x(), x(N, C), None, "identity", [True, True, False])
        with pytest.raises(
            RuntimeError, match=r"^squeeze_excite: expected grad_output of shape \[3, 8, 5, 5\], got \[3, 8, 5, 4\]$"
        ):
            ops._squeeze_excite_backward(
                g, x(), *w, "relu", "sigmoid", None, "identity", x(N, C), x(N, M), x(N, C), [True] * 5 + [False]
            )
        with pytest.raises(RuntimeError, match=r"^excite: expected grad_output of shape \[3, 8\], got \[3, 4\]$"):
            ops._excite_backward(x(N, M), x(N, C), *w, "relu", "sigmoid", x(N, M), x(N, C), [True] * 5)
        with pytest.raises(
            RuntimeError, match=r"^depthwise_conv: expected grad_output of shape \[3, 8, 3, 3\], got \[3, 8, 5, 4\]$"
        ):
            ops._depthwise_conv_backward(g, x(), x(C, 1, 3, 3), None, [2], [1], [1], [True, True, False])


@pytest.mark.parametrize("kind", ["scale", "weight"])
def test_an_in_place_op_whose_small_argument_lies_inside_its_input(kind: str) -> None:
    """It may be refused, or the result must be that of separate memory; never a result half computed from itself."""
    memory = torch.randn(N * C * 25)
    input = memory.view(N, C, 5, 5)
    if kind == "scale":
        inside: list[Any] = [memory[40 : 40 + N * C].view(N, C)]
        op, separate = torch.ops.se_ext.rescale_, torch.ops.se_ext.rescale
    else:
        inside = [memory[40 : 40 + M * C].view(M, C), None, memory[100 : 100 + M * C].view(C, M), None]
        op, separate = torch.ops.se_ext.squeeze_excite_, torch.ops.se_ext.squeeze_excite
    expected = separate(input.clone(), *[t if t is None else t.clone() for t in inside])
    before = memory.clone()
    try:
        op(input, *inside)
    except RuntimeError as error:
        assert "overlap" in str(error)  # noqa: PT017 - either outcome is right
        assert torch.equal(memory, before)
    else:
        assert torch.equal(input, expected)


@pytest.mark.parametrize(
    ("argument", "value", "known", "message"),
    [
        ("activation", "mish", ACTIVATIONS, f"expected activation to be one of {KNOWN_ACTIVATIONS}, got 'mish'"),
        ("scale_activation", "silu", GATES, f"expected scale_activation to be one of {KNOWN_GATES}, got 'silu'"),
        (
            "activation",
            nn.Mish,
            ACTIVATIONS,
            "expected activation to be one of Identity, ReLU, ReLU6, SiLU, GELU, Hardswish, LeakyReLU, Tanh, Sigmoid, "
            "or to compute the same, got torch.nn.modules.activation.Mish",
        ),
        (
            "scale_activation",
            nn.SiLU(),
            GATES,
            "expected scale_activation to be one of Sigmoid, Hardsigmoid, Tanh, ReLU, Identity, DoubleSigmoid, or to "
            "compute the same, got torch.nn.modules.activation.SiLU",
        ),
        (
            "activation",
            partial(nn.LeakyReLU, 0.2),
            ACTIVATIONS,
            "expected activation LeakyReLU with negative_slope=0.01, got 0.2",
        ),
        (
            "activation",
            nn.GELU(approximate="tanh"),
            ACTIVATIONS,
            "expected activation GELU with approximate='none', got 'tanh'",
        ),
    ],
)
def test_an_activation_the_kernels_do_not_compute(
    argument: str, value: Any, known: dict[str, type[nn.Module]], message: str
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        name_of(argument, value, known)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="expected") as caught:
        se_ext.SqueezeExcitation(C, M, **{argument: value})
    assert str(caught.value) == message


def test_a_post_activation_the_kernels_do_not_compute() -> None:
    with pytest.raises(ValueError, match=f"^expected post_activation to be one of {KNOWN_ACTIVATIONS}, got 'elu'$"):
        se_ext.SqueezeExcitation(C, M, post_activation="elu")


def test_a_subclass_of_a_known_module_is_not_taken_for_it() -> None:
    class Shifted(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    with pytest.raises(ValueError, match=r"^expected activation to be one of Identity, .*, got .*Shifted; if that "):
        se_ext.SqueezeExcitation(C, M, activation=Shifted)


def test_the_names_are_those_of_the_ops() -> None:
    assert ", ".join(ACTIVATIONS) == KNOWN_ACTIVATIONS == ", ".join(se_ext.reference.ACTIVATIONS)
    assert ", ".join(GATES) == KNOWN_GATES == ", ".join(se_ext.reference.GATES)


# ---- batch norms ----

# Of se_ext.bn_squeeze_excite: what is changed in a good call, by a map x and a vector v.
BN_BLOCK_ERRORS: dict[str, tuple[type[Exception], str, Callable[..., dict[str, Any]]]] = {
    "bn_weight of shape": (
        RuntimeError,
        r"expected bn_weight of shape \[8\], got \[4\]",
        lambda x, v: {"bn_weight": v[:4]},
    ),
    "bn_bias of shape": (
        RuntimeError,
        r"expected bn_bias of shape \[8\], got \[8, 1\]",
        lambda x, v: {"bn_bias": v[:, None]},
    ),
    "bn_weight of dtype": (
        TypeError,
        "expected bn_weight of dtype float32, got float64",
        lambda x, v: {"bn_weight": v.double()},
    ),
    "drop_scale of shape": (
        RuntimeError,
        r"expected drop_scale of shape \[2\], got \[8\]",
        lambda x, v: {"drop_scale": v},
    ),
    "drop_scale that requires grad": (
        RuntimeError,
        "expected drop_scale that does not require grad",
        lambda x, v: {"drop_scale": torch.rand(2, requires_grad=True)},
    ),
    "pre_activation": (
        ValueError,
        'expected pre_activation to be one of .*, got "elu"',
        lambda x, v: {"pre_activation": "elu"},
    ),
    "residual": (
        RuntimeError,
        r"expected residual of shape \[2, 8, 3, 3\], got \[2, 8\]",
        lambda x, v: {"residual": x[..., 0, 0]},
    ),
    "one value": (
        ValueError,
        r"expected more than one value per channel when training, got input of shape \[1, 8, 1, 1\]",
        lambda x, v: {"input": x[:1, :, :1, :1]},
    ),
    "running_mean": (
        RuntimeError,
        r"expected running_mean of shape \[8\], got \[4\]",
        lambda x, v: {"running_mean": v[:4]},
    ),
    "running_var": (
        RuntimeError,
        r"expected running_var of shape \[8\], got \[\]",
        lambda x, v: {"running_var": v[0]},
    ),
    "running_var of integers": (
        TypeError,
        "expected running_var of dtype float32, float64, bfloat16 or float16, got int64",
        lambda x, v: {"running_var": v.long()},
    ),
    "no statistics": (
        RuntimeError,
        "expected running_mean and running_var when training is False",
        lambda x, v: {"training": False, "running_mean": None, "running_var": None},
    ),
}
# Of _bn_activation_running: what is changed in a good call.
BN_ACTIVATION_ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "weight": (RuntimeError, r"expected weight of shape \[8\], got \[4\]", {"weight": torch.ones(4)}),
    "bias": (TypeError, "expected bias of dtype float32, got float64", {"bias": torch.ones(8).double()}),
    "activation": (ValueError, 'expected activation to be one of .*, got "elu"', {"activation": "elu"}),
    "rank": (RuntimeError, r"expected input of shape \[N, C, \*spatial\]", {"input": torch.ones(2, 8)}),
    "one value": (
        ValueError,
        r"expected more than one value per channel when training, got input of shape \[1, 8, 1, 1\]",
        {"input": torch.ones(1, 8, 1, 1)},
    ),
    "residual": (
        RuntimeError,
        r"expected residual of shape \[2, 8, 3, 3\], got \[2, 8, 3, 1\]",
        {"residual": torch.ones(2, 8, 3, 1)},
    ),
    "residual's dtype": (
        TypeError,
        "expected residual of dtype float32, got float64",
        {"residual": torch.ones(2, 8, 3, 3).double()},
    ),
    "drop_scale": (RuntimeError, r"expected drop_scale of shape \[2\], got \[8\]", {"drop_scale": torch.ones(8)}),
    "drop_scale's dtype": (
        TypeError,
        "expected drop_scale of dtype float32, got float64",
        {"drop_scale": torch.ones(2).double()},
    ),
    "drop_scale that requires grad": (
        RuntimeError,
        "expected drop_scale that does not require grad",
        {"drop_scale": torch.rand(2, requires_grad=True)},
    ),
    "running_mean": (RuntimeError, r"expected running_mean of shape \[8\]", {"running_mean": torch.ones(4)}),
    "no statistics": (
        RuntimeError,
        "expected running_mean and running_var when training is False",
        {"training": False, "running_mean": None},
    ),
}


@pytest.mark.parametrize("name", BN_BLOCK_ERRORS)
def test_errors_of_a_block_behind_a_batch_norm(name: str) -> None:
    kind, message, change = BN_BLOCK_ERRORS[name]
    changed = change(torch.randn(2, 8, 3, 3), torch.rand(8))
    running = (torch.zeros(8), torch.ones(8))
    good = {
        **{"input": torch.randn(2, 8, 3, 3), "bn_weight": None, "bn_bias": None},
        **{"running_mean": running[0], "running_var": running[1]},
        **{"w1": torch.randn(4, 8), "b1": None, "w2": torch.randn(8, 4), "b2": None, "training": True},
    }
    for where in (device().type, "meta"):
        placed = {k: t.to(where) if isinstance(t, torch.Tensor) else t for k, t in (good | changed).items()}
        with pytest.raises(kind, match=f"^bn_squeeze_excite: {message}"):
            se_ext.bn_squeeze_excite(**placed)
    assert torch.equal(running[0], torch.zeros(8))  # nothing was touched
    assert torch.equal(running[1], torch.ones(8))


@pytest.mark.parametrize("name", BN_ACTIVATION_ERRORS)
def test_errors_of_a_batch_norm_with_an_activation(name: str) -> None:
    kind, message, changed = BN_ACTIVATION_ERRORS[name]
    running = {"running_mean": torch.zeros(8), "running_var": torch.ones(8), "num_batches_tracked": torch.tensor(0)}
    good = {"input": torch.randn(2, 8, 3, 3), "weight": None, "bias": None, **running}
    given = {**good, "training": True, "momentum": 0.1, "eps": 1e-5, "activation": "relu", **changed}
    for where in (device().type, "meta"):
        placed = {k: t.to(where) if isinstance(t, torch.Tensor) else t for k, t in given.items()}
        with pytest.raises(kind, match=f"^bn_activation: {message}"):
            torch.ops.se_ext._bn_activation_running(**placed)
    assert torch.equal(running["running_mean"], torch.zeros(8))  # nothing was touched
    assert int(running["num_batches_tracked"]) == 0


def test_a_statistic_elsewhere_is_an_error_before_anything_is_touched() -> None:
    tail = se_ext.BatchNormSqueezeExcitation(8, 4)
    tail.bn.running_var = tail.bn.running_var.to("meta")
    with pytest.raises(RuntimeError, match=r"^bn_squeeze_excite: expected running_var on device \w+(:0)?, got meta"):
        tail(torch.randn(2, 8, 3, 3))
    assert int(tail.bn.num_batches_tracked) == 0
    assert torch.equal(tail.bn.running_mean, torch.zeros(8))


def test_in_place_does_not_go_with_a_prologue() -> None:
    with pytest.raises(ValueError, match="squeeze_excite: expected inplace=False with a pre_bias or a pre_activation"):
        se_ext.squeeze_excite(x(), **weights(), inplace=True, pre_bias=x(C))


def test_another_torch_is_named_beside_the_one_built_against() -> None:
    with pytest.raises(ImportError) as caught:
        _loader.check_torch_version("2.12.0", "2.13.0")
    assert str(caught.value).startswith("se_ext was built against torch 2.12.0, but torch 2.13.0 is running; ")
    _loader.check_torch_version("2.13.0+cpu", "2.13.0")
    _loader.check_torch_version("2.13.0", "2.13.0+cu130")
