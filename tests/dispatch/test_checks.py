"""One set of checks an op: real, fake and meta tensors, recorded or not, in training and evaluation are told the same,
before anything is read or written. (What the checks say of each bad input is in test_errors.py.)"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import MODES, PARTIAL_OVERLAP, device, make_map, make_weights, tensors_of
from ops import CASES, OpCase, Options
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import se_ext

N, C, M = 3, 8, 4
SHAPE = (N, C, 5, 5)
OPS = torch.ops.se_ext


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


# ---- what forward saved, given to the backward ops ----

# (a backward op, the name of what it is given beside forward's arguments)
SAVED = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in CASES
    if case.forward
    for name in case.names
    if name in ("grad_output", "saved", *case.forward[1])
]


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "name"), SAVED)
def test_a_saved_tensor_that_does_not_fit(case: OpCase, name: str, mode: str, recorded: bool) -> None:
    """Its shape, dtype and device. Recorded, double backward takes the plain formula, which reads none of it."""
    who = case.name.removeprefix("_").removesuffix("_backward")
    called = "residual" if name == "saved" else name  # forward's name for the map of that shape
    with tensors_of(mode) as there:
        good = case.make(Options(SHAPE, M))
        good["w1" if "w1" in good else "input"].requires_grad_(recorded)
        case.run(good)
        shape = list(good[name].shape)
        longer = [*shape[:-1], shape[-1] + 1]
        here = good["grad_output" if name != "grad_output" else "w1" if "w1" in good else "input"].device
        bad = {
            rf"^{who}: expected {called} of shape \[{', '.join(map(str, shape))}\], got ": ones(*longer),
            rf"^{who}: expected {called} of dtype float32, got float64$": ones(*shape, dtype=torch.float64),
        }
        # Of fake tensors on two devices torch itself speaks first, where autograd does not.
        by_torch = mode == "fake" and not recorded
        elsewhere = (
            r"two (different )?devices" if by_torch else rf"^{who}: expected {called} on device {here}, got {there}$"
        )
        bad[elsewhere] = torch.ones(shape, device=there)
        for message, tensor in bad.items():
            with pytest.raises((RuntimeError, TypeError), match=message):
                case.run(good | {name: tensor})


# ---- the in-place ops ----


def overlapping() -> tuple[Tensor, Tensor]:
    """A map, and one that begins a hundred values later in the same memory."""
    memory, size = torch.randn(2 * N * C * 25), N * C * 25
    return memory[:size].view(SHAPE), memory[100 : size + 100].view(SHAPE)


def write(op: str, input: Tensor, residual: Tensor, call: Callable[..., Any] | None = None) -> None:
    small = [ones(N, C)] if op == "rescale_" else [ones(M, C), ones(M), ones(C, M), ones(C), "relu", "sigmoid"]
    (call or getattr(OPS, op))(input, *small, residual, "relu")


@pytest.mark.parametrize("op", ["rescale_", "squeeze_excite_"])
@pytest.mark.parametrize("where", [*MODES, "formula", "vmap", "functionalised", "compiled"])
def test_a_residual_that_overlaps_the_input_in_part(op: str, where: str) -> None:
    """A result half computed from itself: refused by the kernels, and by whatever takes their place."""
    calls: dict[str, Callable[..., Any]] = {
        "formula": lambda *args: getattr(OPS, op).default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.XLA), *args
        ),
        "vmap": lambda input, *args: torch.func.vmap(lambda _: getattr(OPS, op)(input, *args))(ones(2)),
        "functionalised": lambda *args: torch.func.functionalize(lambda: getattr(OPS, op)(*args))(),
        "compiled": lambda *args: torch.compile(getattr(OPS, op), backend="aot_eager")(*args),
    }
    with tensors_of(where if where in MODES else "real"), torch.no_grad():
        input, residual = overlapping()
        with pytest.raises(RuntimeError, match=re.escape(f"{op}: {PARTIAL_OVERLAP}")):
            write(op, input, residual, calls.get(where))


# ---- a batch norm's vectors in evaluation, where they are folded before the op sees them ----


def evaluate(op: str, training: bool, weight: Any, bias: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    x, mean, var = make_map((N, C, 4, 4), dtype), torch.zeros(C), torch.ones(C)
    if op == "bn_activation":
        return OPS._bn_activation_running(x, weight, bias, mean, var, None, training, 0.1, 1e-5, "relu")
    return se_ext.bn_squeeze_excite(x, weight, bias, mean, var, *make_weights(C, M), training=training)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_fake_map_beside_real_vectors(in_place: bool) -> None:
    """What is folded is fake too: it has no memory to compute in."""
    vectors = [torch.ones(C) for _ in range(4)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(N, C, 4, 4)
        if in_place:
            assert OPS._bn_activation_running_(x, *vectors, 1e-5, "relu") is None
        else:
            y = OPS._bn_activation_running(x, *vectors, None, False, 0.1, 1e-5, "relu")
            assert type(y) is FakeTensor
            assert y.shape == x.shape


BAD_VECTORS = {
    "one value": lambda: torch.ones(1),
    "no dims": lambda: torch.tensor(1.0),
    "two dims": lambda: torch.ones(1, C),
    "too long": lambda: torch.ones(C + 1),
    "complex": lambda: torch.ones(C, dtype=torch.complex64),
    "integers": lambda: torch.ones(C, dtype=torch.int64),
    "double": lambda: torch.ones(C, dtype=torch.float64),
    "half": lambda: torch.ones(C, dtype=torch.float16),
    "another device": lambda: torch.ones(C, device="meta"),
    "sparse": lambda: torch.ones(C).to_sparse(),
}


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("op", ["bn_squeeze_excite", "bn_activation"])
@pytest.mark.parametrize("kind", BAD_VECTORS)
def test_bad_vectors_of_a_batch_norm_are_told_the_same_in_evaluation_and_training(kind, op, which) -> None:
    vector = BAD_VECTORS[kind]()
    given = (vector, None) if which == "weight" else (None, vector)
    messages = []
    for training in (True, False):
        with pytest.raises((RuntimeError, TypeError)) as caught:
            evaluate(op, training, *given)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]
    assert messages[0][1].startswith(f"{op}: expected {'bn_' * (op == 'bn_squeeze_excite')}{which} ")


@pytest.mark.parametrize("op", ["bn_squeeze_excite", "bn_activation"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_lets_the_same_vectors_through_in_evaluation_and_training(op, kind, training) -> None:
    """Half types are cast along; float64, which autocast leaves alone, does not go with a bfloat16 map."""
    vector = torch.ones(C, dtype=getattr(torch, kind))
    with torch.autocast(device().type, dtype=torch.bfloat16):
        if kind == "float64":
            with pytest.raises(TypeError, match="weight of dtype bfloat16 or float32, got float64"):
                evaluate(op, training, vector, None)
        else:
            assert evaluate(op, training, vector, None).dtype is torch.bfloat16


# ---- maps of no points ----


@pytest.mark.parametrize("pre", ["identity", "silu"])
@pytest.mark.parametrize("batch_statistics", [False, True], ids=["affine", "batch"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_gradients_of_a_map_of_no_points(channels_last: bool, batch_statistics: bool, pre: str) -> None:
    """A sum over no points is 0, also where the mean over them, in another term, is NaN: so has autograd of the plain
    formula, which torch.func runs."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    leaves = [torch.empty(2, C, 0, 3).to(memory_format=format), torch.randn(C), torch.randn(C), *make_weights(C, M)]
    wanted = [t.requires_grad_() for t in leaves]

    def loss(*tensors: Tensor) -> Tensor:
        return OPS.bn_squeeze_excite(*tensors, batch_statistics, 1e-5, pre)[0].sum()

    ours = torch.autograd.grad(loss(*wanted), wanted)
    formula = torch.func.grad(loss, argnums=tuple(range(7)))(*[t.detach() for t in leaves])
    for name, a, b in zip(("input", "weight", "bias", "w1", "b1", "w2", "b2"), ours, formula, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
    assert ours[1].count_nonzero() == ours[2].count_nonzero() == 0


def test_gradient_of_pre_bias_of_a_map_of_no_points() -> None:
    bias = torch.randn(C, requires_grad=True)
    se_ext.squeeze_excite(torch.empty(2, C, 0), *make_weights(C, M), pre_bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(C))


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["affine", "batch"])
def test_gradients_of_a_batch_norm_of_no_points(batch_statistics: bool) -> None:
    leaves = [torch.empty(2, C, 0, requires_grad=True), *[torch.randn(C, requires_grad=True) for _ in range(2)]]
    y = OPS._bn_activation(*leaves, batch_statistics, 1e-5, "relu")[0]
    for gradient in torch.autograd.grad(y.sum(), leaves):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(2, 0, 3, 3), (0, C, 3, 3), (2, 0, 0)], ids=str)
def test_gradients_of_a_batch_norm_of_no_channels_or_samples(shape: tuple[int, ...]) -> None:
    channels = shape[1]
    leaves = [torch.empty(shape, requires_grad=True), *[torch.randn(channels, requires_grad=True) for _ in range(2)]]
    y = OPS._bn_activation(*leaves, False, 1e-5, "relu")[0]
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.count_nonzero() == 0
