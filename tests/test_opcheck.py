"""torch.library.opcheck (schema, autograd registration, fake kernel, AOT dispatch) for every op of the namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DTYPES, HALF, make_map, make_weights
from torch import Tensor

import se_ext

OPS = torch.ops.se_ext
SHAPE, HIDDEN = (3, 8, 5, 4), 4
N, C = SHAPE[:2]
# The utilities of opcheck that compare with autograd or compile need ops that are differentiable and functional.
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
Arguments = tuple[Any, ...]


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("se_ext::") for name in names if name.startswith("se_ext::")}


class Make:
    """Arguments for an op: of one dtype and layout, with or without the optional ones."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        optionals: bool = True,
        requires_grad: bool = False,
        shape: tuple[int, ...] = SHAPE,
        float32_weights: bool = False,
    ) -> None:
        self.dtype, self.channels_last, self.optionals, self.shape = dtype, channels_last, optionals, shape
        self.requires_grad = requires_grad
        self.weight_dtype = torch.float32 if float32_weights else dtype
        self.accumulate = torch.float32 if dtype in HALF else dtype

    def map(self) -> Tensor:
        return make_map(self.shape, self.dtype, self.channels_last, self.requires_grad)

    def matrix(self, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(self.shape[0], columns).to(dtype or self.dtype).requires_grad_(self.requires_grad)

    def weights(self) -> list[Tensor | None]:
        return make_weights(self.shape[1], HIDDEN, self.weight_dtype, self.optionals, self.requires_grad)

    def residual(self) -> Tensor | None:
        return self.map() if self.optionals else None

    @property
    def post(self) -> str:
        return "relu" if self.optionals else "identity"

    # one method per op, named after it

    def squeeze(self) -> Arguments:
        return (self.map(),)

    def excite(self) -> Arguments:
        return (self.matrix(self.shape[1]), *self.weights(), "silu", "hardsigmoid")

    def rescale(self) -> Arguments:
        return (self.map(), self.matrix(self.shape[1], self.weight_dtype), self.residual(), self.post)

    rescale_ = rescale

    def squeeze_excite(self) -> Arguments:
        return (self.map(), *self.weights(), "relu", "sigmoid", self.residual(), self.post)

    squeeze_excite_ = squeeze_excite

    def vector(self, size: int) -> Tensor | None:
        v = torch.rand(size).to(self.weight_dtype).requires_grad_(self.requires_grad)
        return v if self.optionals else None

    def bn_squeeze_excite(self) -> Arguments:
        """With every optional argument also the batch's statistics, without any neither."""
        c = self.shape[1]
        drop = torch.ones(self.shape[0], dtype=self.weight_dtype) if self.optionals else None
        names = ("identity", "relu", "sigmoid")
        prologue = (self.map(), self.vector(c), self.vector(c), *self.weights())
        return (*prologue, self.optionals, 1e-5, *names, self.residual(), self.post, drop)

    def _bn_squeeze_excite_forward(self) -> Arguments:
        return self.bn_squeeze_excite()

    def _bn_squeeze_excite_backward(self) -> Arguments:
        *prologue, batch, eps, pre, activation, gate, residual, post, drop = self.bn_squeeze_excite()
        with torch.no_grad():
            args = (*prologue, batch, eps, pre, activation, gate, residual, post, drop)
            y, mean, _, *small = OPS._bn_squeeze_excite_forward(*args)
        saved = None if residual is None else y
        b = self.optionals
        names = (pre, activation, gate, post)
        mask = [True, b, b, True, b, True, b, b]
        return (self.map(), *prologue, mean, *small, saved, drop, batch, eps, *names, mask)

    def _bn_squeeze_excite_running(self) -> Arguments:
        """With every optional argument training with running statistics, without any training with none."""
        x, weight, bias, *w, _, eps, pre, activation, gate, residual, post, drop = self.bn_squeeze_excite()
        c = self.shape[1]
        running = (torch.zeros(c), torch.ones(c), torch.tensor(3)) if self.optionals else (None, None, None)
        momentum = None if self.optionals else 0.1
        names = (pre, activation, gate)
        return (x, weight, bias, *running, *w, True, momentum, eps, *names, residual, post, drop)

    def _bn_activation(self) -> Arguments:
        c = self.shape[1]
        return (self.map(), self.vector(c), self.vector(c), self.optionals, 1e-5, "relu")

    def _bn_activation_backward(self) -> Arguments:
        *given, batch, eps, activation = self._bn_activation()
        with torch.no_grad():
            _, mean, _, inverse = OPS._bn_activation(*given, batch, eps, activation)
        b = self.optionals
        return (self.map(), *given, mean, inverse, batch, eps, activation, [True, b, b])

    def _bn_activation_running(self) -> Arguments:
        x, weight, bias, _, eps, activation = self._bn_activation()
        c = self.shape[1]
        running = (torch.zeros(c), torch.ones(c), torch.tensor(3)) if self.optionals else (None, None, None)
        return (x, weight, bias, *running, True, None if self.optionals else 0.1, eps, activation)

    def _excite_forward(self) -> Arguments:
        return self.excite()

    def _squeeze_excite_forward(self) -> Arguments:
        return self.squeeze_excite()

    def _excite_backward(self) -> Arguments:
        z, *w, activation, gate = self.excite()
        with torch.no_grad():
            scale, hidden = OPS._excite_forward(z, *w, activation, gate)
        b = self.optionals
        return (self.matrix(self.shape[1]), z, *w, hidden, scale, activation, gate, [True, True, b, True, b])

    def _rescale_backward(self) -> Arguments:
        x, scale, residual, post = self.rescale()
        with torch.no_grad():
            saved = None if residual is None else OPS.rescale(x, scale, residual, post)
        return (self.map(), x, scale, saved, post, [True, True, self.optionals])

    def _squeeze_excite_backward(self) -> Arguments:
        x, *w, activation, gate, residual, post = self.squeeze_excite()
        with torch.no_grad():
            y, z, hidden, scale = OPS._squeeze_excite_forward(x, *w, activation, gate, residual, post)
        saved = None if residual is None else y
        b = self.optionals
        mask = [True, True, b, True, b, b]
        return (self.map(), x, *w, z, hidden, scale, saved, activation, gate, post, mask)


IN_PLACE = ["rescale_", "squeeze_excite_"]
PUBLIC = ["squeeze", "excite", "rescale", "squeeze_excite", "bn_squeeze_excite"]
PRIVATE = [
    "_excite_forward",
    "_excite_backward",
    "_rescale_backward",
    "_squeeze_excite_forward",
    "_squeeze_excite_backward",
    "_bn_squeeze_excite_forward",
    "_bn_squeeze_excite_backward",
    "_bn_squeeze_excite_running",
    "_bn_activation",
    "_bn_activation_backward",
    "_bn_activation_running",
]
TABLE = PUBLIC + IN_PLACE + PRIVATE


def test_no_op_is_left_out_of_the_table() -> None:
    assert registered() == set(TABLE)


def opcheck(name: str, make: Make, **kwargs: Any) -> None:
    result = torch.library.opcheck(getattr(OPS, name).default, getattr(make, name)(), **kwargs)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("optionals", [True, False], ids=["all", "none"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", TABLE)
def test_float32(name: str, channels_last: bool, optionals: bool) -> None:
    opcheck(name, Make(channels_last=channels_last, optionals=optionals))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("optionals", [True, False], ids=["all", "none"])
@pytest.mark.parametrize("name", [*PUBLIC, "_bn_activation"])
def test_recorded(name: str, optionals: bool, channels_last: bool) -> None:
    """Leaves that require grad: opcheck compiles forward and backward, and compares gradients with eager's."""
    opcheck(name, Make(torch.float64, channels_last, optionals, requires_grad=True))


@pytest.mark.parametrize("name", [name for name in PRIVATE if name.endswith("backward")])
def test_backward_recorded(name: str) -> None:
    """With a graph being made, the backward ops take the plain formula; their registration must still hold."""
    opcheck(name, Make(torch.float64, requires_grad=True), test_utils=STATIC)


@pytest.mark.parametrize("float32_weights", [False, True], ids=["", "float32 weights"])
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t is not torch.float32], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_dtypes(name: str, dtype: torch.dtype, float32_weights: bool) -> None:
    if float32_weights and dtype not in HALF:
        return
    opcheck(name, Make(dtype, float32_weights=float32_weights), test_utils=STATIC)


@pytest.mark.parametrize("shape", [(2, 8, 7), (2, 8, 2, 3, 2), (0, 8, 5, 4), (2, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    opcheck(name, Make(shape=shape, channels_last=True), test_utils=STATIC)


def strided(name: str) -> Callable[[Tensor], Tensor]:
    return {
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    }[name]


@pytest.mark.parametrize("layout", ["transposed", "batch last", "sliced"])
@pytest.mark.parametrize("name", [n for n in TABLE if "excite_" not in n or "squeeze" in n])
def test_strides(name: str, layout: str) -> None:
    """Maps of a layout that the kernels do not read as it is."""
    args = getattr(Make(), name)()
    args = [strided(layout)(a) if isinstance(a, Tensor) and a.shape == SHAPE else a for a in args]
    result = torch.library.opcheck(getattr(OPS, name).default, args, test_utils=STATIC)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("index", range(6))
def test_each_gradient_alone(index: int) -> None:
    """A mask that asks for one gradient: the others come back undefined, from the real and the fake kernel alike."""
    args = list(Make()._squeeze_excite_backward())
    args[-1] = [i == index for i in range(6)]
    torch.library.opcheck(OPS._squeeze_excite_backward.default, args, test_utils=STATIC)
    outputs = OPS._squeeze_excite_backward(*args)
    assert [t is not None for t in outputs] == args[-1]


@pytest.mark.parametrize("name", TABLE)
def test_the_schema_says_what_is_written(name: str) -> None:
    """Without the compliance tag torch.compile and export warn or refuse. An op that writes into an argument returns no
    alias of it, whose memory a compiler would reuse; test_compiled_networks.py shows what comes of that."""
    op = getattr(OPS, name).default
    assert torch.Tag.pt2_compliant_tag in op.tags
    if name in IN_PLACE:
        assert op._schema.arguments[0].alias_info.is_write
        assert not op._schema.returns
    else:
        assert op._schema.is_mutable == name.endswith("_running")
    assert all(r.alias_info is None for r in op._schema.returns)


def test_the_fake_kernel_is_torchs_own_idea_of_the_op() -> None:
    """Meta tensors run no arithmetic and touch no memory: a map of a terabyte passes."""
    big = torch.empty(1024, 1024, 512, 512, device="meta")
    w = [torch.empty(s, device="meta") for s in ((64, 1024), (64,), (1024, 64), (1024,))]
    y = se_ext.squeeze_excite(big, *w, residual=big, post_activation="relu")
    assert y.shape == big.shape
    assert y.is_meta
    assert se_ext.squeeze(big).shape == (1024, 1024)
