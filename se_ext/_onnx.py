"""The ops in ONNX's standard operators, as functions that torch.onnx.export calls with the arguments of a traced op.

The letters are those of docs/design.md. The exporter knows the dtype and shape of an op's arguments, but not those of
what a function here has made of them. So each function begins with a Formula, which keeps what follows from the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

op: Any = onnxscript.opset18  # its annotations leave out Python's lists of numbers, which it takes for constants
Value = Any  # of the graph: onnx_ir.Value, or what onnxscript makes of it

_FLOAT32 = ir.DataType.FLOAT
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Formula:
    """The steps of the formula, on maps like `like` [N, C, *spatial], in the type that the kernels accumulate in."""

    def __init__(self, like: Value) -> None:
        self.stored = like.dtype
        self.dtype = _FLOAT32 if like.dtype in _HALF else like.dtype
        self.spatial = list(range(2, len(like.shape)))

    def number(self, value: float) -> Value:
        return op.Constant(value=ir.tensor(value, dtype=self.dtype))

    def read(self, argument: Value) -> Value:
        """An argument of the op, in the accumulation type."""
        return argument if argument.dtype == self.dtype else op.Cast(argument, to=self.dtype)

    def store(self, value: Value) -> Value:
        """A result, in the map's type."""
        return value if self.stored == self.dtype else op.Cast(value, to=self.stored)

    def activate(self, name: str, v: Value) -> Value:
        number = self.number
        functions: dict[str, Callable[[], Value]] = {
            "identity": lambda: v,
            "relu": lambda: op.Relu(v),
            "relu6": lambda: op.Clip(v, number(0), number(6)),
            "silu": lambda: op.Mul(v, op.Sigmoid(v)),
            "gelu": lambda: op.Mul(
                op.Mul(v, number(0.5)), op.Add(op.Erf(op.Mul(v, number(math.sqrt(0.5)))), number(1))
            ),
            "hardswish": lambda: op.HardSwish(v),
            "leaky_relu": lambda: op.LeakyRelu(v, alpha=0.01),
            "tanh": lambda: op.Tanh(v),
            "sigmoid": lambda: op.Sigmoid(v),
            "hardsigmoid": lambda: op.HardSigmoid(v, alpha=1 / 6, beta=0.5),
            "double_sigmoid": lambda: op.Mul(op.Sigmoid(v), number(2)),
        }
        return functions[name]()

    def mean(self, u: Value, axes: Sequence[int]) -> Value:
        return op.ReduceMean(u, list(axes), keepdims=0)

    def per_channel(self, vector: Value) -> Value:
        """[C] → [C, 1, …, 1], which broadcasts against a map."""
        return op.Unsqueeze(vector, [axis - 1 for axis in self.spatial])

    def layer(self, z: Value, w: Value, b: Value | None) -> Value:
        """w z + b: [N, C] → [N, M], of weights [M, C] or [M, C, 1, 1]."""
        bias = () if b is None else (self.read(b),)
        return op.Gemm(z, op.Flatten(self.read(w), axis=1), *bias, transB=1)

    def excitation(
        self, z: Value, w1: Value, b1: Value | None, w2: Value, b2: Value | None, activation: str, gate: str
    ) -> Value:
        """s = gate(w2 activation(w1 z + b1) + b2), [N, C]"""
        hidden = self.activate(activation, self.layer(z, w1, b1))
        return self.activate(gate, self.layer(hidden, w2, b2))

    def tail(self, u: Value, scale: Value | None, residual: Value | None, post_activation: str) -> Value:
        """y = post(s ⊙ u + residual), s [N, C] or [N, 1]"""
        v = u if scale is None else op.Mul(u, op.Unsqueeze(scale, self.spatial))
        if residual is not None:
            v = op.Add(v, self.read(residual))
        return self.store(self.activate(post_activation, v))

    def prologue(
        self, x: Value, weight: Value | None, bias: Value | None, batch_statistics: bool, eps: float, pre: str
    ) -> tuple[Value, Value, Value, Value]:
        """u = pre(weight ⊙ norm(x) + bias), and mean, var and 1 / sqrt(var + eps) of the batch, [C]; without batch
        statistics of no elements, and norm does nothing."""
        u = self.read(x)
        mean = var = inverse = op.Constant(value=ir.tensor([], dtype=self.dtype))
        if batch_statistics:
            axes = [0, *self.spatial]
            mean = self.mean(u, axes)
            centered = op.Sub(u, self.per_channel(mean))
            var = self.mean(op.Mul(centered, centered), axes)
            inverse = op.Reciprocal(op.Sqrt(op.Add(var, self.number(eps))))
            u = op.Mul(centered, self.per_channel(inverse))
        if weight is not None:
            u = op.Mul(u, self.per_channel(self.read(weight)))
        if bias is not None:
            u = op.Add(u, self.per_channel(self.read(bias)))
        return self.activate(pre, u), mean, var, inverse


# ---- the ops, with the arguments of their schemas ----


def squeeze(input: Value) -> Value:
    formula = Formula(input)
    return formula.store(formula.mean(formula.read(input), formula.spatial))


def excite(
    z: Value,
    w1: Value,
    b1: Value | None,
    w2: Value,
    b2: Value | None,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Value:
    formula = Formula(z)
    return formula.store(formula.excitation(formula.read(z), w1, b1, w2, b2, activation, gate))


def rescale(input: Value, scale: Value, residual: Value | None = None, post_activation: str = "identity") -> Value:
    formula = Formula(input)
    return formula.tail(formula.read(input), formula.read(scale), residual, post_activation)


def squeeze_excite(
    input: Value,
    w1: Value,
    b1: Value | None,
    w2: Value,
    b2: Value | None,
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Value | None = None,
    post_activation: str = "identity",
) -> Value:
    formula = Formula(input)
    u = formula.read(input)
    scale = formula.excitation(formula.mean(u, formula.spatial), w1, b1, w2, b2, activation, gate)
    return formula.tail(u, scale, residual, post_activation)


def bn_squeeze_excite(
    input: Value,
    bn_weight: Value | None,
    bn_bias: Value | None,
    w1: Value,
    b1: Value | None,
    w2: Value,
    b2: Value | None,
    batch_statistics: bool,
    eps: float = 1e-5,
    pre_activation: str = "identity",
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Value | None = None,
    post_activation: str = "identity",
    drop_scale: Value | None = None,
) -> tuple[Value, Value, Value]:
    formula = Formula(input)
    u, mean, var, _ = formula.prologue(input, bn_weight, bn_bias, batch_statistics, eps, pre_activation)
    scale = formula.excitation(formula.mean(u, formula.spatial), w1, b1, w2, b2, activation, gate)
    if drop_scale is not None:
        scale = op.Mul(scale, op.Unsqueeze(formula.read(drop_scale), [1]))
    return formula.tail(u, scale, residual, post_activation), mean, var


def bn_activation(
    input: Value,
    weight: Value | None,
    bias: Value | None,
    batch_statistics: bool,
    eps: float,
    activation: str,
    residual: Value | None = None,
    drop_scale: Value | None = None,
) -> tuple[Value, Value, Value, Value]:
    formula = Formula(input)
    u, *statistics = formula.prologue(input, weight, bias, batch_statistics, eps, "identity")
    scale = None if drop_scale is None else op.Unsqueeze(formula.read(drop_scale), [1])
    return formula.tail(u, scale, residual, activation), *statistics


def depthwise_conv(
    input: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
) -> Value:
    formula = Formula(input)
    kernel = list(weight.shape)[2:]
    dims = len(kernel)

    def per_dim(values: Sequence[int]) -> list[int]:
        return list(values) * dims if len(values) == 1 else list(values)

    strides, dilations = per_dim(stride), per_dim(dilation)
    if padding:
        values = per_dim(padding)
        zeros = {"pads": values * 2 if len(values) == dims else values[::2] + values[1::2]}
    else:
        zeros = same_padding(list(input.shape)[2:], kernel, strides, dilations)
    arguments = [formula.read(value) for value in (input, weight, bias) if value is not None]
    sizes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": weight.shape[0]}
    return formula.store(op.Conv(*arguments, **sizes, **zeros))


def same_padding(
    spatial: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> dict[str, Any]:
    """Numbers where they are known: ONNX Runtime has no padding by name beside a dilation. Those of stride 1 are known
    without the input's size."""
    begins, ends = [], []
    for size, taps, step, distance in zip(spatial, kernel, strides, dilations, strict=True):
        if step > 1 and not isinstance(size, int):
            return {"auto_pad": "SAME_UPPER"}
        reach = (taps - 1) * distance + 1
        total = reach - 1 if step == 1 else max((-(-size // step) - 1) * step + reach - size, 0)
        begins.append(total // 2)
        ends.append(total - total // 2)
    return {"pads": begins + ends}


def table() -> dict[Any, Callable[..., Any]]:
    ops = torch.ops.se_ext
    return {
        ops.squeeze.default: squeeze,
        ops.excite.default: excite,
        ops.rescale.default: rescale,
        ops.squeeze_excite.default: squeeze_excite,
        ops.bn_squeeze_excite.default: bn_squeeze_excite,
        ops._bn_activation.default: bn_activation,
        ops.depthwise_conv.default: depthwise_conv,
    }
