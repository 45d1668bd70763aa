"""torch.func: vmap, grad, vjp, jvp, jacobians and hessians of the ops give what the reference gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close, make_map, make_weights
from ops import OpCase, Options, cases, differentiable
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils import _pytree as pytree

import se_ext
from se_ext import reference

F64 = torch.float64
B, N, C, M = 3, 2, 5, 4
SHAPE = (N, C, 3, 2)


def assert_same(ours: Any, theirs: Any) -> None:
    """Trees of float64 tensors; chains of sums, so a generous length (an error of 1e-13)."""
    ours, theirs = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is b.dtype
        assert b.abs().max() > 0
        assert_close(a.detach(), b.detach(), F64, summed=10_000)


def block(library: Any) -> Callable[..., Tensor]:
    def f(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, residual: Any = None) -> Tensor:
        return library.squeeze_excite(x, w1, b1, w2, b2, "gelu", "sigmoid", residual, "tanh")

    return f


def arguments(batch: tuple[int, ...] = ()) -> list[Tensor]:
    """x, w1, b1, w2, b2, residual, each with `batch` before its own shape."""
    one = [make_map(SHAPE, F64), *make_weights(C, M, F64), make_map(SHAPE, F64)]
    return [torch.randn(*batch, *t.shape, dtype=F64) for t in one] if batch else one


# ---- vmap ----

OPTIONS = Options(SHAPE, M, F64, activation="silu", pre_activation="silu", gate="tanh", post_activation="tanh")
# The ops that a transform runs through. (Running statistics that move are none of a function's business: evaluation.)
transformed = cases(differentiable)


def problem(case: OpCase) -> tuple[dict[str, Any], list[str]]:
    """Arguments, and the names of those that a transform may take."""
    arguments = case.make(replace(OPTIONS, batch_statistics=not case.writes))
    return arguments, list(case.differentiable)


def through(case: OpCase, arguments: dict[str, Any], names: list[str], exact: bool = False) -> Callable[..., Tensor]:
    """The op, or the formula, as a function of the named arguments."""
    call = case.exact if exact else case.run
    return lambda *tensors: call(arguments | dict(zip(names, tensors, strict=True)))[0]


MAPPED = {
    "map": lambda name: name in ("input", "z"),
    "map and residual": lambda name: name in ("input", "z", "residual"),
    "weights": lambda name: name not in ("input", "z", "residual"),
    "one weight": lambda name: name in ("w2", "weight", "scale"),
    "all": lambda name: True,
}


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
@transformed
def test_vmap(case: OpCase, mapped: Callable[[str], bool]) -> None:
    arguments, names = problem(case)
    in_dims = tuple(0 if mapped(name) else None for name in names)
    if not any(d == 0 for d in in_dims):
        return  # vmap over nothing that the op reads has nothing to stack
    others = [problem(case)[0] for _ in range(B)]
    stacks = [
        torch.stack([other[name] for other in others]) if d == 0 else arguments[name]
        for name, d in zip(names, in_dims, strict=True)
    ]
    ours = vmap(through(case, arguments, names), in_dims)(*stacks)
    formula = through(case, arguments, names, exact=True)
    loop = [formula(*[t[i] if d == 0 else t for t, d in zip(stacks, in_dims, strict=True)]) for i in range(B)]
    assert_same(ours, torch.stack(loop))


@pytest.mark.parametrize("dim", [1, 2, 4, -1])
def test_vmap_over_another_dim(dim: int) -> None:
    """The mapped dim stands anywhere, and out_dims puts it anywhere; on a channels_last map its strides are odd."""
    _, *w, _ = arguments()
    stack = torch.stack([make_map(SHAPE, F64, channels_last=True) for _ in range(B)], dim)
    ours = vmap(lambda t: block(se_ext)(t, *w), in_dims=dim, out_dims=dim)(stack)
    assert_same(ours, torch.stack([block(reference)(t, *w) for t in stack.unbind(dim)], dim))


def test_nested_vmap() -> None:
    _, _, b1, w2, b2, _ = arguments()
    maps, weights = torch.randn(B, *SHAPE, dtype=F64), torch.randn(2, M, C, dtype=F64)
    ours = vmap(lambda w: vmap(lambda t: block(se_ext)(t, w, b1, w2, b2))(maps))(weights)
    theirs = torch.stack([torch.stack([block(reference)(t, w, b1, w2, b2) for t in maps]) for w in weights])
    assert_same(ours, theirs)


def test_vmap_that_autograd_records() -> None:
    args = [t.requires_grad_() for t in arguments((B,))]
    ours = torch.autograd.grad(vmap(block(se_ext))(*args).square().sum(), args)
    theirs = torch.autograd.grad(vmap(block(reference))(*args).square().sum(), args)
    assert_same(ours, theirs)


def test_an_ensemble_of_modules() -> None:
    """torch.func.stack_module_state's recipe: models stacked along a dim, run at once."""
    models = [se_ext.SqueezeExcitation(C, M, post_activation=nn.ReLU).double() for _ in range(B)]
    params, buffers = torch.func.stack_module_state(models)
    x, r = make_map(SHAPE, F64), make_map(SHAPE, F64)
    ours = vmap(lambda p, b: functional_call(models[0], (p, b), (x, r)))(params, buffers)
    assert_same(ours, torch.stack([m(x, r) for m in models]))


# ---- derivatives ----


@transformed
def test_grad(case: OpCase) -> None:
    arguments, names = problem(case)
    given = [arguments[name] for name in names]

    def gradient(exact: bool) -> Any:
        f = through(case, arguments, names, exact)
        return grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(len(names))))(*given)

    assert_same(gradient(False), gradient(True))


@transformed
def test_vjp_and_jvp(case: OpCase) -> None:
    (arguments, names), (other, _) = problem(case), problem(case)
    given, tangents = (tuple(a[name] for name in names) for a in (arguments, other))
    ours, formula = (through(case, arguments, names, exact) for exact in (False, True))
    y, pull = vjp(ours, *given)
    expected, reference_pull = vjp(formula, *given)
    assert_same(y, expected)
    cotangent = torch.randn_like(y)
    assert_same(pull(cotangent), reference_pull(cotangent))
    assert_same(jvp(ours, given, tangents), jvp(formula, given, tangents))


@transformed
def test_vmap_of_grad(case: OpCase) -> None:
    """Per-sample gradients."""
    arguments, names = problem(case)
    first, *rest = names
    stack = torch.stack([problem(case)[0][first] for _ in range(B)])
    given = [arguments[name] for name in rest]

    def each(exact: bool) -> Callable:
        f = through(case, arguments, names, exact)
        return grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(len(names))))

    ours = vmap(each(False), in_dims=(0, *[None] * len(rest)))(stack, *given)
    loop = [each(True)(t, *given) for t in stack]
    assert_same(ours, tuple(torch.stack(gradients) for gradients in zip(*loop, strict=True)))


def test_linearize() -> None:
    args, tangents = arguments(), arguments()
    y, push = linearize(block(se_ext), *args)
    assert_same((y, push(*tangents)), jvp(block(reference), tuple(args), tuple(tangents)))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=["jacrev", "jacfwd", "hessian"])
def test_jacobians_and_hessians(transform: Callable) -> None:
    x, w1, b1, w2, b2 = make_map((1, 3, 2), F64), *make_weights(3, 2, F64)

    def f(library: Any) -> Callable:
        def g(x: Tensor, w1: Tensor, b2: Tensor) -> Tensor:
            y = block(library)(x, w1, b1, w2, b2, x.sin())
            return y.square().sum() if transform is hessian else y

        return transform(g, argnums=(0, 1, 2))

    assert_same(f(se_ext)(x, w1, b2), f(reference)(x, w1, b2))


def test_forward_over_reverse_and_reverse_over_forward() -> None:
    x, *w = arguments()
    t = torch.randn_like(x)

    def loss(library: Any) -> Callable:
        return lambda x: block(library)(x, *w).square().sum()

    expected = torch.einsum("ijklmnop,mnop->ijkl", hessian(loss(reference))(x), t)
    assert_same(jvp(grad(loss(se_ext)), (x,), (t,))[1], expected)
    assert_same(grad(lambda x: jvp(loss(se_ext), (x,), (t,))[1])(x), expected)
    assert_same(vjp(grad(loss(se_ext)), x)[1](t)[0], expected)


def test_per_sample_gradients() -> None:
    """vmap(grad): the recipe of differential privacy, through functional_call on the module."""
    module = se_ext.SqueezeExcitation(C, M, post_activation=nn.ReLU).double()
    params = {k: p.detach() for k, p in module.named_parameters()}
    x, target = torch.randn(B, C, 3, 2, dtype=F64), torch.randn(B, C, 3, 2, dtype=F64)

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (functional_call(module, params, (x[None],))[0] - target).square().sum()

    ours = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, target)
    for i in range(B):
        module.zero_grad()
        w = (module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)
        y = reference.squeeze_excite(x[i : i + 1], *w, post_activation="relu")
        (y[0] - target[i]).square().sum().backward()
        assert_same({k: g[i] for k, g in ours.items()}, {k: p.grad for k, p in module.named_parameters()})
    batch = grad(lambda p: (functional_call(module, p, (x,)) - target).square().sum())(params)
    assert_same({k: g.sum(0) for k, g in ours.items()}, batch)


def test_functional_call_uses_the_given_parameters() -> None:
    module = se_ext.SqueezeExcitation(C, M).double()
    other = {k: torch.randn_like(p) for k, p in module.named_parameters()}
    x = make_map(SHAPE, F64)
    ours = functional_call(module, other, (x,))
    theirs = reference.squeeze_excite(x, *other.values())
    assert_same(ours, theirs)
    assert not torch.allclose(ours, module(x))


# ---- in place ----


@pytest.mark.parametrize("op", ["rescale_", "squeeze_excite_"])
def test_in_place_under_vmap(op: str) -> None:
    x, r = torch.randn(B, *SHAPE, dtype=F64), torch.randn(B, *SHAPE, dtype=F64)
    small: list[Any] = [torch.randn(N, C, dtype=F64)] if op == "rescale_" else make_weights(C, M, F64)
    names: list[Any] = [] if op == "rescale_" else ["relu", "sigmoid"]
    expected = [getattr(reference, op[:-1])(a, *small, *names, b, "tanh") for a, b in zip(x, r, strict=True)]

    def write(a: Tensor, b: Tensor) -> Tensor:
        getattr(torch.ops.se_ext, op)(a, *small, *names, b, "tanh")
        return a

    assert torch.equal(vmap(write)(x, r), x)
    assert_same(x, torch.stack(expected))


def test_in_place_under_vmap_into_an_unbatched_map_raises() -> None:
    """One map can't hold B results."""
    x, s = make_map(SHAPE, F64), torch.randn(B, N, C, dtype=F64)
    before = x.clone()

    def write(s: Tensor) -> Tensor:
        torch.ops.se_ext.rescale_(x, s)
        return x

    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        vmap(write)(s)
    assert torch.equal(x, before)


@pytest.mark.parametrize("argnum", [0, 1])
def test_in_place_under_grad_raises(argnum: int) -> None:
    """The ops that write into their input are for inference, here as everywhere."""
    x, s = make_map(SHAPE, F64), torch.randn(N, C, dtype=F64)

    def loss(x: Tensor, s: Tensor) -> Tensor:
        doubled = x * 2
        torch.ops.se_ext.rescale_(doubled, s, x, "gelu")
        return doubled.sum()

    with pytest.raises(RuntimeError, match=r"^rescale_: expected no argument that requires grad"):
        grad(loss, argnums=argnum)(x, s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_accumulate_in_float32_here_too(dtype: torch.dtype) -> None:
    """The formula that transforms run on keeps the promise of the kernels: a float16 sum past 65504 is right."""
    x = torch.full((B, 1, C, 64, 64), 100.0, dtype=dtype)
    ours = vmap(se_ext.squeeze)(x)
    assert ours.dtype is dtype
    assert torch.equal(ours, torch.full((B, 1, C), 100.0, dtype=dtype))
    w = make_weights(C, M)  # float32 beside a half-typed map
    map_ = make_map((2, C, 5, 4), dtype)
    y = vmap(lambda t: se_ext.squeeze_excite(t, *w))(map_[:, None])
    exact = reference.squeeze_excite(map_.double(), *[t.double() for t in w])
    assert y.dtype is dtype
    assert_close(y[:, 0], exact, dtype, summed=20 + C)
