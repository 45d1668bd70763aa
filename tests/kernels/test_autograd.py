"""Autograd: first, second and third derivatives, forward mode, and a clear error where there is no derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from helpers import assert_close, make_map
from ops import BY_NAME, CASES, KINKS, LAYOUTS, OpCase, Options, cases, differentiable, in_float64
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import se_ext
from se_ext import reference

F64 = torch.float64
N, C, M = 2, 5, 3
MARGIN = 1e-3  # gradcheck moves an input by 1e-6


def is_smooth(case: OpCase, arguments: dict[str, Any]) -> bool:
    """Whether the formula keeps away from every kink: finite differences across one are no derivative.

    Random numbers are exactly at a kink only where an activation before it is flat, and there no difference moves them.
    """
    distances = [torch.tensor(torch.inf)]

    def watched(name: str, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def apply(v: Tensor) -> Tensor:
            for kink in KINKS.get(name, ()):
                distance = (v.detach() - kink).abs()
                distances.extend(distance[distance > 0])
            return activation(v)

        return apply

    with pytest.MonkeyPatch.context() as patch:
        for table in (reference.ACTIVATIONS, reference.GATES):
            for name, activation in table.items():
                patch.setitem(table, name, watched(name, activation))
        case.exact(in_float64(arguments))
    return bool(min(distances) > MARGIN)


def smooth(case: OpCase, options: Options, spread: float = 1.0) -> dict[str, Any]:
    """Float64 arguments on which every activation is smooth. Spread data reach both sides of the kinks."""
    options = replace(options, dtype=F64, weight_dtype=F64, maps=None)
    spread_out = replace(options, maps=lambda: options.map() * spread)
    for _ in range(300):
        arguments = case.make(spread_out)
        if arguments.get("drop_scale") is not None:
            arguments["drop_scale"] += 0.5  # a dropped sample is at the kink at 0
        if is_smooth(case, arguments):
            return arguments
    raise AssertionError("no data away from the kinks in 300 draws")


def smooth_block(
    activation: str = "silu",
    gate: str = "sigmoid",
    post: str = "identity",
    residual: bool = False,
    spatial: tuple[int, ...] = (3, 2),
) -> list[Any]:
    """x, w1, b1, w2, b2, residual: smooth arguments of the block, all requiring a gradient."""
    options = Options((N, C, *spatial), M, F64, None, False, activation, gate, "identity", post, residual=residual)
    arguments = smooth(BY_NAME["squeeze_excite"], replace(options, requires_grad=True))
    return [arguments[name] for name in BY_NAME["squeeze_excite"].differentiable]


def block(activation: str = "silu", gate: str = "sigmoid", post: str = "identity", library: Any = se_ext) -> Callable:
    def f(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, residual: Tensor | None) -> Tensor:
        return library.squeeze_excite(x, w1, b1, w2, b2, activation, gate, residual, post)

    return f


# ---- first and second derivatives against finite differences ----


def in_small(options: Options) -> Options:
    """Finite differences take one call per element."""
    spatial = {1: (3,), 2: (2, 2), 3: (1, 2, 2)}[len(options.shape) - 2]
    return replace(options, shape=(2, 3, *spatial), hidden=2, requires_grad=True)


# Behind a batch norm one activation for each way to find the slope: none, from the output, with a kink, from the input.
# What moves running statistics is the op behind a batch norm, with the affine map of the running statistics or without.
WAYS = ["identity", "tanh", "relu", "silu"]
FEWER: dict[str, dict[str, list[Any]]] = {
    "bn_squeeze_excite": {"post_activation": WAYS, "activation": ["silu"], "gate": ["tanh"]},
    "_bn_squeeze_excite_running": {
        **{"pre_activation": WAYS[::3], "post_activation": WAYS[:2], "activation": ["silu"], "gate": ["tanh"]},
        **{"convolutions": [False], "layout": LAYOUTS[1:3]},
    },
    "_bn_activation_running": {"activation": WAYS, "layout": LAYOUTS[1:3]},
    "depthwise_conv": {
        "kernel": [3, 2],
        "stride": [1, 2],
        "padding": ["same", (2, 1)],
        "layout": [*LAYOUTS[:3], LAYOUTS[4]],
    },
}
FINITE = [
    pytest.param(case, in_small(options), id=f"{case}-{in_small(options)}")
    for case in CASES
    if case.differentiable
    for options in case.variations(crossed=(), dtypes=[(F64, F64)], **FEWER.get(case.name, {}))
]


@pytest.mark.parametrize(("case", "options"), FINITE)
def test_first_and_second_derivatives(case: OpCase, options: Options) -> None:
    """Every pair of an op's options: activations, gates, layouts, arguments that are absent, the batch's statistics."""
    arguments = smooth(case, options, spread=3.0 if case.name in ("rescale", "squeeze_excite") else 1.0)
    leaves = case.leaves(arguments)

    def f(*tensors: Tensor) -> Tensor:
        return case.run(arguments | dict(zip(leaves, tensors, strict=True)))[0]

    assert gradcheck(f, tuple(leaves.values()))
    assert gradgradcheck(f, tuple(leaves.values()), gen_non_contig_grad_outputs=True)


@cases(lambda case: case.has_map and case.differentiable)
def test_derivatives_of_one_point(case: OpCase) -> None:
    arguments = smooth(case, Options((4, 3, 1, 1), 2, post_activation="tanh", activation="tanh", requires_grad=True))
    leaves = case.leaves(arguments)

    def f(*tensors: Tensor) -> Tensor:
        return case.run(arguments | dict(zip(leaves, tensors, strict=True)))[0]

    assert gradcheck(f, tuple(leaves.values()))
    assert gradgradcheck(f, tuple(leaves.values()))


# ---- against the reference: what finite differences do not reach ----


def leaves(args: list[Any]) -> list[Any]:
    return [a if a is None else a.detach().clone().requires_grad_(a.requires_grad) for a in args]


def assert_same(ours: list[Tensor | None], theirs: list[Tensor | None], summed: int = 1_000_000) -> None:
    """Derivatives of higher order chain many float64 sums whose terms cancel: a generous length bounds their rounding
    (the allowance is 1e-12; a path missed or counted twice is an error near 1)."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert b.abs().max() > 0
            assert_close(a, b, F64, summed)


@pytest.mark.parametrize(
    ("activation", "gate", "post", "residual"),
    [
        ("silu", "sigmoid", "identity", False),
        ("gelu", "tanh", "tanh", True),
        ("sigmoid", "sigmoid", "silu", True),
        ("tanh", "hardsigmoid", "sigmoid", False),
        ("silu", "sigmoid", "relu", True),
    ],
)
def test_third_derivatives_match_the_reference(activation: str, gate: str, post: str, residual: bool) -> None:
    args = smooth_block(activation, gate, post, residual)

    def third(library: Any) -> list[Tensor | None]:
        inputs = [a for a in leaves(args) if a is not None]
        given = iter(inputs)
        full = [None if a is None else next(given) for a in args]
        y = block(activation, gate, post, library)(*full).square().sum()
        for seed in (1, 2):
            torch.manual_seed(seed)
            grads = torch.autograd.grad(y, inputs, create_graph=True)
            y = sum((g * torch.randn_like(g)).sum() for g in grads)
        return list(torch.autograd.grad(y, inputs))

    assert_same(third(se_ext), third(reference))


@pytest.mark.parametrize("penalised", ["input", "weights"])
def test_gradient_penalty_training_step(penalised: str) -> None:
    """The loss holds a gradient's norm (as in WGAN-GP): its backward is a double backward through the block."""
    args = smooth_block("relu", post="relu", residual=True)
    conv = torch.randn(C, C, 3, 3, dtype=F64) / 7

    def step(library: Any) -> list[Tensor | None]:
        x, w1, b1, w2, b2, r = leaves(args)
        kernel = conv.clone().requires_grad_()
        y = block("relu", post="relu", library=library)(
            torch.nn.functional.conv2d(x, kernel, padding=1).tanh(), w1, b1, w2, b2, r
        )
        loss = y.square().mean()
        of = [x] if penalised == "input" else [w1, b1, w2, b2, kernel]
        grads = torch.autograd.grad(loss, of, create_graph=True)
        (loss + sum((g.norm() - 1) ** 2 for g in grads)).backward()
        return [t.grad for t in (x, w1, b1, w2, b2, r, kernel)]

    assert_same(step(se_ext), step(reference))


@pytest.mark.parametrize("post", ["identity", "tanh", "silu"])
def test_weights_computed_from_the_input_are_not_counted_twice(post: str) -> None:
    """w1 = f(x), residual = h(x): a second derivative that reached x through w1 inside the backward formula as well as
    outside it would be too large."""
    args = smooth_block(post=post)
    mix = torch.randn(M, N, dtype=F64)

    def derivatives(library: Any) -> list[Tensor | None]:
        x, _, b1, w2, b2, _ = leaves(args)
        w1 = (mix @ x.mean((2, 3))).tanh()
        y = library.squeeze_excite(x, w1, b1, w2, b2, "silu", "sigmoid", x.sin(), post)
        first = torch.autograd.grad(y.square().sum(), [x, b1, w2, b2], create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), [x, b1, w2, b2], create_graph=True)
        # Second derivatives are in the hundreds here: the sine of one would blow up its rounding.
        third = torch.autograd.grad(sum((g / g.detach().abs().max()).sin().sum() for g in second), [x, b1, w2, b2])
        return [*first, *second, *third]

    assert_same(derivatives(se_ext), derivatives(reference))


@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_one_tensor_in_two_places(post: str) -> None:
    """The input as its own residual, the squeezed map as a scale, one matrix as both layers."""
    x0 = make_map((N, C, 3, 2), F64)
    w0 = torch.randn(C, C, dtype=F64)

    def derivatives(library: Any) -> list[Tensor | None]:
        x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
        y = library.squeeze_excite(x, w, None, w, None, "tanh", "sigmoid", x, post)
        y = y + library.rescale(x, library.squeeze(x), x, post)
        first = torch.autograd.grad(y.square().sum(), [x, w], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, w])
        return [*first, *second]

    assert_same(derivatives(se_ext), derivatives(reference))


def test_a_chain_of_the_three_ops_has_the_derivatives_of_the_one() -> None:
    args = smooth_block(post="silu", residual=True)

    def derivatives(fused: bool) -> list[Tensor | None]:
        x, w1, b1, w2, b2, r = inputs = leaves(args)
        if fused:
            y = block(post="silu")(*inputs)
        else:
            y = se_ext.rescale(x, se_ext.excite(se_ext.squeeze(x), w1, b1, w2, b2, "silu"), r, "silu")
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [*first, *second]

    assert_same(derivatives(True), derivatives(False))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 3), (1, 5), (2, 4, 5)], ids=str)
@pytest.mark.parametrize("post", ["identity", "relu", "gelu"])
def test_any_subset_of_the_inputs_can_require_grad(post: str, wanted: tuple[int, ...]) -> None:
    """Gradients go to the arguments they belong to, and only those that were asked for come."""
    args = [a.detach() for a in smooth_block(post=post, residual=True)]

    def grads(library: Any, second: bool) -> list[Tensor | None]:
        inputs = [a.clone().requires_grad_(i in wanted) for i, a in enumerate(args)]
        y = block(post=post, library=library)(*inputs)
        if second:
            (y,) = torch.autograd.grad(y.square().sum(), inputs[wanted[0]], create_graph=True)
        y.square().sum().backward()
        assert all(a.grad is None for i, a in enumerate(inputs) if i not in wanted)
        return [inputs[i].grad for i in wanted]

    assert_same(grads(se_ext, False), grads(reference, False))
    if wanted[0] < 5 or post != "identity":  # an identity's residual has no second derivative of its own
        assert_same(grads(se_ext, True), grads(reference, True))


@pytest.mark.parametrize("bias", [(True, False), (False, True)], ids=["b1 only", "b2 only"])
def test_one_bias_alone(bias: tuple[bool, bool]) -> None:
    x, w1, b1, w2, b2, _ = smooth_block()

    def grads(library: Any) -> list[Tensor | None]:
        inputs = leaves([x, w1, b1 if bias[0] else None, w2, b2 if bias[1] else None, None])
        z = library.squeeze(inputs[0])
        y = block(library=library)(*inputs).square().sum() + library.excite(z, *inputs[1:5]).sin().sum()
        given = [a for a in inputs if a is not None]
        first = torch.autograd.grad(y, given, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)]

    assert_same(grads(se_ext), grads(reference))


def test_weights_of_four_dims_get_gradients_of_four_dims() -> None:
    x, w1, b1, w2, b2, _ = smooth_block()
    flat = torch.autograd.grad(block()(x, w1, b1, w2, b2, None).square().sum(), [w1, w2], create_graph=True)
    flat2 = torch.autograd.grad(sum(g.square().sum() for g in flat), [w1, w2])
    k1, k2 = (w.detach()[:, :, None, None].requires_grad_() for w in (w1, w2))
    kernel = torch.autograd.grad(block()(x, k1, b1, k2, b2, None).square().sum(), [k1, k2], create_graph=True)
    kernel2 = torch.autograd.grad(sum(g.square().sum() for g in kernel), [k1, k2])
    for a, b in zip([*kernel, *kernel2], [*flat, *flat2], strict=True):
        assert a.shape == (*b.shape, 1, 1)
        assert_close(a.flatten(1), b, F64, 100)


def test_backward_twice_through_one_graph_gives_the_same_bits() -> None:
    args = smooth_block(post="relu", residual=True)
    y = block(post="relu")(*args)
    first = torch.autograd.grad(y.square().sum(), args, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), args, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(a.abs().max() > 0 for a in first)
    y.square().sum().backward()
    y_ = block(post="relu")(*args).square().sum()
    y_.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y_.backward()
    assert all(torch.allclose(t.grad, 2 * a) for t, a in zip(args, first, strict=True))


def test_a_gradient_expanded_or_strided_is_read_right() -> None:
    x, *rest = smooth_block(post="tanh", residual=True)
    for grad in (
        torch.ones((), dtype=F64).expand(x.shape),
        torch.randn(N, 1, 3, 2, dtype=F64).expand(x.shape),
        torch.randn(2, 3, C, N, dtype=F64).permute(3, 2, 1, 0),
        make_map(tuple(x.shape), F64, channels_last=True),
    ):
        ours = torch.autograd.grad(block(post="tanh")(x, *rest), [x, *rest], grad)
        theirs = torch.autograd.grad(block(post="tanh", library=reference)(x, *rest), [x, *rest], grad)
        assert_same(list(ours), list(theirs))


def test_batched_gradients_match_one_by_one() -> None:
    """is_grads_batched runs the backward ops under vmap."""
    args = smooth_block(post="relu", residual=True)
    grads = torch.randn(3, N, C, 3, 2, dtype=F64)
    y = block(post="relu")(*args)
    batched = torch.autograd.grad(y, args, grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        for b, one in zip(batched, torch.autograd.grad(y, args, g, retain_graph=True), strict=True):
            assert_close(b[i], one, F64, 100)
    x, s = args[0], torch.randn(N, C, dtype=F64, requires_grad=True)
    for y, inputs in ((se_ext.rescale(x, s), [x]), (se_ext.rescale(x, s), [s]), (se_ext.squeeze(x), [x])):
        grads = torch.randn(3, *y.shape, dtype=F64)
        batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
        for i, g in enumerate(grads):
            assert_close(batched[0][i], torch.autograd.grad(y, inputs, g, retain_graph=True)[0], F64, 100)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobian_and_hessian(vectorize: bool) -> None:
    x, *w, _ = smooth_block(spatial=(2,))
    w = [t.detach() for t in w]

    def value(library: Any) -> Callable:
        return lambda x: library.squeeze_excite(x, *w, "silu")

    def loss(library: Any) -> Callable:
        return lambda x: value(library)(x).square().sum()

    for transform, f in ((torch.autograd.functional.jacobian, value), (torch.autograd.functional.hessian, loss)):
        ours = transform(f(se_ext), x.detach(), vectorize=vectorize)
        assert_same([ours], [transform(f(reference), x.detach())])


# ---- forward mode ----


def smooth_options(case: OpCase, **other: Any) -> Options:
    tail = {"activation": "gelu", "gate": "sigmoid", "pre_activation": "silu", "post_activation": "tanh"}
    return Options((N, C, 3, 2), M, F64, **{**tail, **other})


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("batch_statistics", [False, True], ids=["", "batch"])
@cases(differentiable)
def test_forward_mode_matches_the_reference(case: OpCase, batch_statistics: bool, recorded: bool) -> None:
    """The tangent of each argument alone, and of all together."""
    options = smooth_options(case, batch_statistics=batch_statistics, requires_grad=recorded)
    arguments = case.make(options)
    names = [name for name in case.differentiable if arguments[name] is not None]

    def tangent(call: Callable, moved: list[str]) -> Tensor | None:
        with fwad.dual_level():
            given = {k: t.clone() if k in case.writes and t is not None else t for k, t in arguments.items()}
            for i, name in enumerate(moved):
                torch.manual_seed(i)
                given[name] = fwad.make_dual(given[name], torch.randn_like(given[name]))
            return fwad.unpack_dual(call(given)[0]).tangent

    for moved in [*([name] for name in names), names]:
        ours, theirs = (tangent(call, moved) for call in (case.run, case.exact))
        assert ours is not None, "a silent zero"
        assert_same([ours.detach()], [theirs.detach()])


def test_forward_over_reverse_matches_the_reference() -> None:
    """A Hessian-vector product: dual inputs through forward and backward."""
    args = smooth_block(post="tanh", residual=True)

    def product(library: Any) -> list[Tensor | None]:
        with fwad.dual_level():
            duals = [fwad.make_dual(a, torch.full_like(a, 0.3)) for a in leaves(args)]
            grads = torch.autograd.grad(block("gelu", post="tanh", library=library)(*duals).square().sum(), duals)
            return [fwad.unpack_dual(g).tangent for g in grads]

    assert_same(product(se_ext), product(reference))


@cases(differentiable)
def test_a_dual_gradient_goes_through_backward(case: OpCase) -> None:
    """Only the incoming gradient is dual, and no graph is made of backward: its tangent must come through all the
    same, never a silent zero. (torch has no forward mode of silu's backward, and says so.)"""
    arguments = case.make(smooth_options(case, pre_activation="tanh", requires_grad=True))

    def tangents(call: Callable) -> list[Tensor | None]:
        given = {k: t.clone() if k in case.writes and t is not None else t for k, t in arguments.items()}
        y = call(given)[0]
        with fwad.dual_level():
            torch.manual_seed(5)
            grad = fwad.make_dual(torch.randn_like(y), torch.randn_like(y))
            grads = torch.autograd.grad(y, list(case.leaves(given).values()), grad)
            return [fwad.unpack_dual(g).tangent for g in grads]

    assert_same(tangents(case.run), tangents(case.exact))


@pytest.mark.parametrize("op", ["rescale_", "squeeze_excite_"])
@pytest.mark.parametrize("dual", ["input", "weight"])
def test_an_in_place_op_on_dual_tensors_is_right_or_raises(op: str, dual: str) -> None:
    x, w1, _, w2, _, _ = (a if a is None else a.detach() for a in smooth_block())
    small = [torch.full((N, C), 2.0, dtype=F64)] if op == "rescale_" else [w1, None, w2, None]

    def run(write: bool) -> Tensor | None:
        with fwad.dual_level():
            input, first = x.clone(), small[0]
            if dual == "input":
                input = fwad.make_dual(input, x.sin())
            else:
                first = fwad.make_dual(first, first.sin() + 1)
            y = getattr(torch.ops.se_ext, op if write else op.rstrip("_"))(input, first, *small[1:])
            return fwad.unpack_dual(input if write else y).tangent

    expected = run(write=False)
    try:
        got = run(write=True)
    except (RuntimeError, NotImplementedError):
        return
    assert got is not None, "a silent zero"
    assert_same([got], [expected])


# ---- no derivative: an error, never a silent zero ----


@cases(lambda case: case.name.endswith("_forward"))
def test_the_forward_ops_for_autograd_have_no_derivative(case: OpCase) -> None:
    arguments = case.make(smooth_options(case))
    name = case.names[0]
    arguments[name].requires_grad_()
    for y in case.run(arguments):
        if y is not None and y.requires_grad:
            with pytest.raises(RuntimeError, match=f"derivative for se_ext::{case} is not implemented"):
                y.sum().backward(retain_graph=True)
    assert case.run(arguments)[0].requires_grad
    with fwad.dual_level():
        dual = fwad.make_dual(arguments[name].detach(), arguments[name].detach().cos())
        with pytest.raises(NotImplementedError, match=f"forward AD with se_ext::{case}"):
            case.run(arguments | {name: dual})


@pytest.mark.parametrize("op", ["rescale_", "squeeze_excite_"])
@pytest.mark.parametrize("saved_by", ["exp", "squeeze_excite", "rescale"])
def test_overwriting_what_autograd_saved_makes_backward_raise(op: str, saved_by: str) -> None:
    x, w1, b1, w2, b2, _ = smooth_block()
    if saved_by == "exp":
        saved = y = x.exp()
    elif saved_by == "rescale":
        saved = x.detach().clone()
        y = se_ext.rescale(saved, torch.randn(N, C, dtype=F64, requires_grad=True))
    else:
        saved = x.detach().clone()
        y = se_ext.squeeze_excite(saved, w1, b1, w2, b2)
    with torch.no_grad():
        if op == "rescale_":
            assert torch.ops.se_ext.rescale_(saved, torch.ones(N, C, dtype=F64)) is None
        else:
            assert se_ext.squeeze_excite(saved, w1, b1, w2, b2, inplace=True) is saved
    assert saved._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_overwriting_a_saved_output_makes_backward_raise() -> None:
    """relu with a residual keeps the output for its mask."""
    args = smooth_block(post="relu", residual=True)
    y = block(post="relu")(*args)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
