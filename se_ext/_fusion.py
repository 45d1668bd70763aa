"""How a tail (batch norm, SE block, shortcut, activation) and a batch norm with an activation run: what is known
(_known.py) in one op, the rest by calls, and as much as possible around it fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops
from ._known import (
    Layers,
    excitation_of,
    is_left_to_compilers,
    known_activation,
    known_block,
    normalization_of,
)
from ._names import ACTIVATIONS, GATES

# The activations and gates by name, as torch's modules compute them.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {name: cls().forward for name, cls in (ACTIVATIONS | GATES).items()}
FUNCTIONS["hardsigmoid"] = lambda t: (
    torch.nn.functional.hardtanh(t + 3, 0.0, 6.0) / 6
)  # torch's has no second derivative

# What joins a tail behind the SE block: drop_scale and residual.
Branches = tuple[Tensor | None, Tensor | None]


def tail(
    bn: Any,
    se: Any,
    input: Tensor,
    branches: Branches | Callable[[], Branches],
    pre_activation: str,
    post_activation: str,
) -> Tensor:
    """post(drop_scale ⊙ se(pre(bn(input))) + residual).

    Args:
        bn: the batch norm, any module.
        se: the SE block, any module, or None.
        input: [N, C, *spatial].
        branches: drop_scale [N] (or None) and residual (of input's shape, or None); or a function that gives them,
            called once bn and se have run. So hooks run, and random numbers are drawn, in the order of a network that
            calls one module after the other.
        pre_activation: by name, between bn and se.
        post_activation: by name, applied last.
    """
    layers = known_block(se)
    if layers is None:
        u = named_batch_norm(bn, pre_activation, input)
        v = u if se is None else se(u)
        drop_scale, residual = branches() if callable(branches) else branches
        return _plain_end(v, residual, drop_scale, post_activation)
    fc1, fc2, activation, gate = layers
    excitation = excitation_of(fc1, fc2)
    if excitation is None:
        u = named_batch_norm(bn, pre_activation, input)
        scale = called_excitation(layers, u)
        drop_scale, residual = branches() if callable(branches) else branches
        scale = scale if drop_scale is None else scale * drop_scale[:, None]
        return _ops.rescale(u, scale, residual, post_activation)
    is_ordinary = is_left_to_compilers(bn)
    normalization = None if is_ordinary else normalization_of(bn)
    if normalization is None:
        u = bn(input)
        if is_ordinary:
            u, pre_activation = FUNCTIONS[pre_activation](u), "identity"
        drop_scale, residual = branches() if callable(branches) else branches
        if pre_activation == "identity" and drop_scale is None:
            return _ops.squeeze_excite(u, *excitation, activation, gate, residual, post_activation)
        return _ops.squeeze_excite_behind_activation(
            u, None, excitation, pre_activation, activation, gate, residual, post_activation, drop_scale
        )
    drop_scale, residual = branches() if callable(branches) else branches
    return _ops.squeeze_excite_behind_batch_norm(
        input, normalization, excitation, pre_activation, activation, gate, residual, post_activation, drop_scale
    )


def batch_norm(bn: Any, activation: Any, input: Tensor) -> Tensor:
    """activation(bn(input)), fused where the kernels compute both; activation is a module, or None for none."""
    name = known_activation(activation)
    output = named_batch_norm(bn, name or "identity", input)
    return output if name is not None else activation(output)


def named_batch_norm(bn: Any, activation: str, input: Tensor) -> Tensor:
    """The same of an activation given by its name. Behind a batch norm that is called it is not in place, whatever its
    module says: autograd allows no change of what comes out of a module with a backward hook."""
    normalization = None if is_left_to_compilers(bn) else normalization_of(bn)
    if normalization is None:
        return FUNCTIONS[activation](bn(input))
    return _ops.bn_activation_running(input, *normalization, activation)


# ---- called ----


def called_block(se: Any, input: Tensor, residual: Tensor | None) -> Tensor:
    """A SqueezeExcitation whose layers have to be called: the squeeze and the rescale are fused."""
    scale = called_excitation((se.fc1, se.fc2, se.activation, se.scale_activation), input)
    if se.inplace and not torch.is_grad_enabled():
        _ops.rescale_(input, scale, residual, se.post_activation)
        return _ops.written(input)
    return _ops.rescale(input, scale, residual, se.post_activation)


def called_excitation(layers: Layers, input: Tensor) -> Tensor:
    """The scale [N, C] of an SE block, by calls of its layers."""
    fc1, fc2, activation, gate = layers
    hidden = FUNCTIONS[activation](call_layer(fc1, _ops.squeeze(input)))
    return FUNCTIONS[gate](call_layer(fc2, hidden)).flatten(1)


def call_layer(layer: Any, z: Tensor) -> Tensor:
    """layer(z), on z as a map of one point with the layer's number of dims: [N, C] for an nn.Linear, [N, C, 1, 1] for
    an nn.Conv2d. Float32 weights beside a half-typed map work here as they do in the fused op."""
    if isinstance(layer, nn.Conv2d):
        dims = 4
    elif hasattr(layer, "in_features"):  # nn.Linear, and what quantisation puts in its place
        dims = 2
    else:
        weight = getattr(layer, "weight", None)
        dims = weight.dim() if isinstance(weight, Tensor) else 4
    z = z.flatten(1)[(..., *[None] * (dims - 2))]
    if isinstance(z, Tensor) and z.dtype in (torch.bfloat16, torch.float16):  # not torch.fx's Proxy
        parameter = next(layer.parameters(), None)
        if parameter is not None and parameter.dtype is torch.float32 and not torch.is_autocast_enabled(z.device.type):
            z = z.float()
    return layer(z)


def _plain_end(v: Tensor, residual: Tensor | None, drop_scale: Tensor | None, post_activation: str) -> Tensor:
    """post(drop_scale ⊙ v + residual), behind a module that was called."""
    if drop_scale is not None:
        v = v * drop_scale.to(v.dtype)[(..., *[None] * (v.dim() - 1))]
    return FUNCTIONS[post_activation](v if residual is None else v + residual)
