"""Values and gradients of every op are those of the formula in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    DTYPES,
    GATES,
    HALF,
    assert_close,
    assert_same_bits,
    check_against_float64,
    make_map,
    make_weights,
    tolerance,
)
from ops import BY_NAME, CASES, PAIRS, WEIGHTS_AND_DTYPES, OpCase, Options, cases, differentiable, in_float64
from torch import Tensor

import se_ext
from se_ext import reference

# ---- every op ----


def test_the_table_holds_every_op() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = [name.removeprefix("se_ext::") for name in names if name.startswith("se_ext::")]
    assert sorted(registered) == sorted(case.name for case in CASES)


@cases()
def test_the_variations_hold_every_pair(case: OpCase) -> None:
    """And every combination of the crossed options: the table's greedy rows leave nothing out."""
    domains = case.domains()
    rows = [options_row(case, options) for options in case.variations()]
    for names in [*combinations(domains, 2), case.crossed]:
        found = {tuple(map(str, (row[name] for name in names))) for row in rows}
        assert found == {tuple(map(str, values)) for values in product(*(domains[name] for name in names))}


def options_row(case: OpCase, options: Options) -> dict[str, Any]:
    grouped = {
        "dtypes": (options.dtype, options.weight_dtype),
        "layout": (options.shape[2:], options.channels_last),
    }
    return {name: grouped[name] if name in grouped else getattr(options, name) for name in case.domains()}


@pytest.mark.parametrize(
    ("case", "options"),
    [pytest.param(case, options, id=f"{case}-{options}") for case in CASES for options in case.variations()],
)
def test_values_and_gradients(case: OpCase, options: Options) -> None:
    """Over activations, gates, dtypes, ranks, layouts, and arguments that may be absent."""
    case.check(replace(options, requires_grad=True))


def test_where_terms_cancel_an_error_beyond_roundings_is_seen() -> None:
    """Sixty-four terms near 1 that sum to about 1e-4: their roundings are a thousand times eps of it."""
    terms = torch.rand(32, dtype=torch.float64) + 0.5
    arguments = {"terms": torch.cat([terms, 3e-6 - terms])}
    exact = arguments["terms"].sum()

    def compare(error: float) -> None:
        ours = (exact + error).float()
        CASES[0]._compare("sum", ours, exact, torch.float32, 1, None, arguments, lambda moved: moved["terms"].sum())

    compare(1e-7)
    with pytest.raises(AssertionError, match="times what roundings explain"):
        compare(2e-5)
    with pytest.raises(AssertionError, match="times what roundings explain"):
        compare(float("nan"))


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        pytest.param(case, wanted, id=f"{case}-{'+'.join(wanted)}")
        for case in CASES
        for count in (1, 2)
        for wanted in combinations(case.differentiable, count)
    ],
)
def test_gradients_of_some_arguments(case: OpCase, wanted: tuple[str, ...]) -> None:
    """A gradient is the same alone and in company, and an argument that wants none gets none."""
    for pre, post in [*PAIRS, ("identity", "gelu")]:
        for batch_statistics in (True, False):
            options = Options(
                channels_last=True,
                activation=post,
                gate="sigmoid",
                pre_activation=pre,
                post_activation=post,
                batch_statistics=batch_statistics,
                requires_grad=wanted,
            )
            case.check(options)
    arguments = case.make(options)
    case.run(arguments)[0].sum().backward()
    with_gradient = {k for k, t in arguments.items() if isinstance(t, Tensor) and t.grad is not None}
    assert with_gradient == set(wanted)


@cases(lambda case: case.forward)
def test_a_backward_op_gives_what_its_mask_asks_for(case: OpCase) -> None:
    """Each gradient alone, and all but one: close to what it is among all, and absent where it is not asked for."""
    for pre, post in PAIRS:
        options = Options(activation="silu", pre_activation=pre, post_activation=post)
        arguments = case.make(options)
        everything = case.run(arguments)
        count = len(everything)
        for alone in range(count):
            for mask in ([i == alone for i in range(count)], [i != alone for i in range(count)]):
                found = case.run(arguments | {"mask": mask})
                assert [t is not None for t in found] == mask
                for ours, expected in zip(found, everything, strict=True):
                    if ours is not None:
                        assert_close(ours, expected.double(), torch.float32, case.summed(options)[1])


@cases(lambda case: case.is_public and case.differentiable and case.name != "bn_squeeze_excite")
def test_the_function_is_the_op(case: OpCase) -> None:
    """se_ext.<name> takes the op's arguments, in the op's order and with its defaults."""
    function = getattr(se_ext, case.name)
    for options in (Options(), Options(residual=False, post_activation="identity", biases=(False, False))):
        arguments = case.make(options)
        assert_same_bits([function(**arguments)], case.run(arguments))
        assert_same_bits([function(*arguments.values())], case.run(arguments))
    required = {k: v for k, v in arguments.items() if isinstance(v, Tensor) or k in ("b1", "b2")}
    assert_same_bits([function(**required)], [case.op(**required)])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_the_function_is_the_op_behind_a_batch_norm(momentum: float, training: bool) -> None:
    """se_ext.bn_squeeze_excite takes running statistics, and no count of batches."""
    case = BY_NAME["_bn_squeeze_excite_running"]
    arguments = case.make(Options(momentum=momentum, pre_activation="silu", gate="hardsigmoid"))
    arguments |= {"num_batches_tracked": None, "training": training}
    copies = {k: t.clone() if isinstance(t, Tensor) else t for k, t in arguments.items() if k != "num_batches_tracked"}
    (expected, *_) = case.run(arguments)
    assert_same_bits([se_ext.bn_squeeze_excite(**copies)], [expected])
    for name in ("running_mean", "running_var"):
        assert_same_bits([copies[name]], [arguments[name]])


# ---- sizes ----

# Whole blocks of samples, rows and registers and what is left of each; squeezes narrow and wide, more samples than are
# copied beside each other, matrices within the first-level cache and beyond it.
SIZES = [
    (1, 64, 8),
    (4, 72, 24),
    (6, 96, 32),
    (9, 130, 40),
    (8, 1031, 33),
    (16, 2048, 128),
    (65, 300, 33),
    (66, 40, 70),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS_AND_DTYPES)
def test_excite_of_every_size(dtype: torch.dtype, weight_dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """With silu, which has no kink where float32 may rightly take the other branch."""
    samples, channels, hidden = size
    shape = (samples, channels)
    options = Options(shape, hidden, dtype, weight_dtype, activation="silu", requires_grad=True)
    BY_NAME["excite"].check(options)


@pytest.mark.parametrize("channels", [8, 24, 40, 72, 200, 264, 1032, 77])
@pytest.mark.parametrize("spatial", [(1, 1), (3, 5), (20, 19)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_of_every_width(dtype: torch.dtype, spatial: tuple[int, int], channels: int) -> None:
    """Bands of eight, four, two and one registers of channels, and part of one."""
    x = make_map((2, channels, *spatial), dtype, channels_last=True, requires_grad=True)
    tensors = [x, *make_weights(channels, 4, dtype, requires_grad=True)]
    names = {"activation": "silu", "post_activation": "silu"}
    length = spatial[0] * spatial[1] * channels
    check_against_float64(
        partial(se_ext.squeeze_excite, **names),
        partial(reference.squeeze_excite, **names),
        tensors,
        (length, 2 * length),
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [pytest.param((8, 256, 56, 56), marks=pytest.mark.large), (4, 2048, 7, 7)], ids=str)
def test_a_batch_norm_of_real_shapes(shape: tuple[int, ...], channels_last: bool) -> None:
    BY_NAME["bn_squeeze_excite"].check(Options(shape, 6, channels_last=channels_last))


# ---- kinks ----

KINKS = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0]


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("post", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_at_the_kinks(dtype: torch.dtype, post: str, with_residual: bool) -> None:
    """Exactly at a kink the slope is the one torch gives there, in the body and in the tail of a vector loop."""
    x = torch.tensor(KINKS, dtype=dtype).repeat(9)[None, None, :-3].requires_grad_()
    residual = torch.zeros_like(x) if with_residual else None
    check_against_float64(
        partial(se_ext.rescale, post_activation=post),
        partial(reference.rescale, post_activation=post),
        [x, torch.ones(1, 1, dtype=dtype), residual],
        (1, 1),
        torch.ones_like(x),
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_at_the_kinks_of_excite(activation: str, gate: str) -> None:
    """W1 and W2 are the identity, so that z itself arrives at the activation (or, past the identity, at the gate)."""
    z = torch.tensor(KINKS).repeat(3)[:-3].expand(2, -1).clone().requires_grad_()
    eye = torch.eye(z.shape[1])
    for act in (activation, "identity"):
        check_against_float64(
            partial(se_ext.excite, activation=act, gate=gate),
            partial(reference.excite, activation=act, gate=gate),
            [z, eye, None, eye, None],
            (1, 1),
            torch.ones_like(z),
        )


# ---- what an argument means ----


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pre_activation", ["identity", "relu", "silu"])
@cases(lambda case: case.writes == ("input",))
def test_in_place_with_input_as_residual(case: OpCase, pre_activation: str, channels_last: bool) -> None:
    """The residual may be the input itself: each element is read before it is written."""
    arguments = case.make(
        Options(pre_activation=pre_activation, post_activation="identity", channels_last=channels_last)
    )
    arguments["residual"] = arguments["input"]
    (exact,) = case.exact(in_float64(arguments))
    case.run(arguments)
    assert_close(arguments["input"], exact, torch.float32, case.summed(Options())[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_the_function_returns_its_input_in_place(inplace: bool) -> None:
    arguments = BY_NAME["squeeze_excite"].make()
    x = arguments["input"]
    assert (se_ext.squeeze_excite(**arguments, inplace=inplace) is x) is inplace


@pytest.mark.parametrize(
    ("op", "pre"), [("bn_squeeze_excite", "identity"), ("bn_squeeze_excite", "silu"), ("_bn_activation", "identity")]
)
def test_dropped_samples_are_their_shortcut(op: str, pre: str) -> None:
    case = BY_NAME[op]
    options = Options((4, 12, 5, 5), pre_activation=pre, post_activation="identity", activation="identity")
    arguments = case.make(options) | {"drop_scale": torch.tensor([0.0, 2.0, 0.0, 2.0])}
    y, residual = case.run(arguments)[0], arguments["residual"]
    assert torch.equal(y[::2], residual[::2])
    assert not torch.allclose(y[1::2], residual[1::2])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pre", ["identity", "relu", "silu", "hardswish", "tanh"])
def test_bias_and_activation_before_the_block(pre: str, channels_last: bool) -> None:
    """pre_bias and pre_activation of the function: the rest of a batch norm that was folded into a convolution."""
    options = Options((3, 24, 7, 5), 6, channels_last=channels_last, requires_grad=True)
    arguments = BY_NAME["squeeze_excite"].make(options)
    x, w1, b1, w2, b2, residual = (arguments[k] for k in ("input", "w1", "b1", "w2", "b2", "residual"))

    def run(module: Any, x: Tensor, bias: Tensor | None, *rest: Tensor | None) -> Tensor:
        *weights, residual = rest
        return module.squeeze_excite(x, *weights, residual=residual, pre_bias=bias, pre_activation=pre)

    for pre_bias in (options.vector(0.0).requires_grad_(), None):
        check_against_float64(
            partial(run, se_ext),
            partial(run, reference),
            [x, pre_bias, w1, b1, w2, b2, residual],
            summed=(35, 3 * 35 + 24),
        )


@pytest.mark.parametrize("dtype", sorted(HALF, key=str))
@pytest.mark.parametrize("channels_last", [False, True])
def test_master_weights_get_float32_gradients(dtype: torch.dtype, channels_last: bool) -> None:
    """Beside a half-typed map, float32 weights are never rounded: their gradients are right to float32."""
    case = BY_NAME["squeeze_excite"]
    options = Options(
        dtype=dtype,
        weight_dtype=torch.float32,
        channels_last=channels_last,
        residual=False,
        post_activation="identity",
        requires_grad=True,
    )
    arguments = case.make(options)
    exact_arguments = in_float64(arguments)
    y, exact = case.run(arguments)[0], case.exact(exact_arguments)[0]
    g = torch.randn(y.shape).to(dtype)
    names, summed = ("w1", "b1", "w2", "b2"), case.summed(options)[1]
    ours = torch.autograd.grad(y, [arguments[k] for k in names], g)
    theirs = torch.autograd.grad(exact, [exact_arguments[k] for k in names], g.double())
    for actual, wanted in zip(ours, theirs, strict=True):
        assert_close(actual, wanted, torch.float32, summed)
    assert tolerance(torch.float32, summed) < torch.finfo(dtype).eps / 64  # or this would show nothing


@cases(differentiable)
def test_gradients_accumulate(case: OpCase) -> None:
    """A second backward adds to .grad, and the first graph may be kept."""
    arguments = case.make(Options(requires_grad=True))
    y = case.run(arguments)[0]
    y.sum().backward(retain_graph=True)
    leaves = case.leaves(arguments)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    y.sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[name])
