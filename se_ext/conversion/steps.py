"""What generated forwards call, and the forwards of converted SE blocks, batch norms and depthwise convolutions.

Each step takes modules, decides at the call what is known of them (_known.py), and runs that as one op. Whatever is not
known (it has a hook, a class of its own, an adapter) is called, in the network's order. The convolution in front is
called in any case; a step that knows it may write into its output (in_place.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import _ops
from .._fusion import FUNCTIONS, called_excitation
from .._known import (
    depthwise_of,
    excitation_of,
    is_called_plainly,
    is_left_to_compilers,
    known_activation,
    known_block,
    normalization_of,
)
from .._ops import Normalization, uses_batch_statistics
from .in_place import convolved

Act = Any
"""An activation: a module, a name of the ops', or None for none."""


# ---- containers ----


def is_as_converted(
    module: Any, size: int | None, identities: tuple[str, ...], chains: tuple[tuple[str, int], ...]
) -> bool:
    """Whether a container is still what its generated forward was made from.

    Args:
        size: the number of its children, where its forward goes through all of them.
        identities: paths of modules that the generated forward does not call.
        chains: paths of modules whose children it calls in their place, and the numbers of these children.
    """
    if size is not None and len(module._modules) != size:
        return False
    for path in identities:
        m = _submodule(module, path)
        if type(m) is not nn.Identity or not is_called_plainly(m):
            return False
    for path, length in chains:
        m = _submodule(module, path)
        if m is None or len(m._modules) != length or not is_called_plainly(m):
            return False
    return True


def _submodule(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def batch_norm(
    conv: Any, bn: Any, act: Act, input: Tensor, drop_path: Any = None, residual: Tensor | None = None
) -> Tensor:
    """act(drop_path(bn(conv(input))) + residual); conv None: no convolution."""
    x, overwrite = convolved(conv, input)
    name = _known_name(act)
    if not _is_of_the_same_kind(residual, x) or not _is_map(bn, x):
        name = None
    if name is not None and not is_left_to_compilers(bn) and (drop_path is None or is_known_drop_path(drop_path)):
        known = known_norm(bn)
        if known is not None:
            normalization, own = known
            if own == "identity" or (name == "identity" and residual is None and drop_path is None):
                drop_scale = drop_scale_of(drop_path, x)
                name = own if name == "identity" else name
                if overwrite and not uses_batch_statistics(normalization):
                    return _ops.bn_activation_by_overwriting(x, normalization, name, residual, drop_scale)
                return _ops.bn_activation_running(x, *normalization, name, residual, drop_scale)
    return _end(bn(x), act, drop_path, residual)


def tail(
    conv: Any,
    bn: Any,
    pre: Act,
    se: Any,
    input: Tensor,
    drop_path: Any = None,
    residual: Tensor | None = None,
    post: Act = None,
) -> Tensor:
    """post(drop_path(se(pre(bn(conv(input))))) + residual); conv None: no convolution; bn None: no batch norm."""
    x, overwrite = convolved(conv, input)
    pre_name, post_name = _known_name(pre), _known_name(post)
    layers = known_block(se)
    excitation = None if layers is None else excitation_of(layers[0], layers[1])
    can_drop = drop_path is None or is_known_drop_path(drop_path)
    can_add = _is_of_the_same_kind(residual, x)
    if excitation is None or layers is None or post_name is None or not can_drop or not can_add:
        return _end(se(_activated(bn, pre, x)), post, drop_path, residual)
    _, _, activation, gate = layers
    is_called = bn is None or pre_name is None or is_left_to_compilers(bn) or not _is_map(bn, x)
    known = None if is_called else known_norm(bn)
    if known is not None:
        normalization, own = known
        if own == "identity" or pre_name == "identity":
            drop_scale = drop_scale_of(drop_path, x)
            pre_name = own if pre_name is None or pre_name == "identity" else pre_name
            names = (pre_name, activation, gate)
            if overwrite and not uses_batch_statistics(normalization):
                return _ops.squeeze_excite_by_overwriting(
                    x, normalization, excitation, *names, residual, post_name, drop_scale
                )
            return _ops.squeeze_excite_behind_batch_norm(
                x, normalization, excitation, *names, residual, post_name, drop_scale
            )
    u = _activated(bn, pre, x)
    drop_scale = drop_scale_of(drop_path, u)
    if drop_scale is None:
        return _ops.squeeze_excite(u, *excitation, activation, gate, residual, post_name)
    return _ops.squeeze_excite_behind_activation(
        u, None, excitation, "identity", activation, gate, residual, post_name, drop_scale
    )


def _is_of_the_same_kind(residual: Tensor | None, input: Tensor) -> bool:
    """Whether the ops take a shortcut beside an input: torch's sum also broadcasts and promotes."""
    if residual is None or not isinstance(residual, Tensor) or not isinstance(input, Tensor):  # torch.fx's Proxy
        return True
    return residual.shape == input.shape and residual.dtype == input.dtype


def _is_map(bn: Any, input: Tensor) -> bool:
    """Whether the ops take a batch norm's input: BatchNorm1d's may be [N, C]."""
    return input.dim() > 2 if isinstance(input, Tensor) else type(bn) is not nn.BatchNorm1d


def _activated(bn: Any, act: Act, input: Tensor) -> Tensor:
    return _activate(act, input) if bn is None else batch_norm(None, bn, act, input)


def _end(v: Tensor, act: Act, drop_path: Any, residual: Tensor | None) -> Tensor:
    if drop_path is not None:
        v = drop_path(v)
    return _activate(act, v if residual is None else v + residual)


def _activate(act: Act, v: Tensor) -> Tensor:
    if act is None:
        return v
    return FUNCTIONS[act](v) if isinstance(act, str) else act(v)


def _known_name(act: Act) -> str | None:
    return act if isinstance(act, str) else known_activation(act)


# ---- batch norms ----


def known_norm(bn: Any) -> tuple[Normalization, str] | None:
    """What stands for a batch norm in an op, and the name of the activation inside it; None if it has to be called."""
    normalization = normalization_of(bn)
    if normalization is None:
        return None
    own = own_activation(bn)
    return None if own is None else (normalization, own)


def own_activation(bn: Any) -> str | None:
    """The name of the activation inside a batch norm of a known class; None if it has to be called."""
    modules = bn._modules
    if not modules:
        return "identity"
    drop = modules["drop"]  # timm's BatchNormAct2d
    if type(drop) is not nn.Identity or not is_called_plainly(drop):
        return None
    return known_activation(modules["act"])


def norm_act(bn: Any, input: Tensor) -> Tensor:
    """The forward of a converted batch norm with an activation inside."""
    if not is_left_to_compilers(bn) and (not isinstance(input, Tensor) or input.dim() == 4):
        known = known_norm(bn)  # its hooks run around this call
        if known is not None:
            normalization, own = known
            return _ops.bn_activation_running(input, *normalization, own)
    return original_forward(bn, input)


def original_forward(module: Any, input: Tensor) -> Tensor:
    """What the module computes without its conversion."""
    return type(module)._original.forward(module, input)


# ---- depthwise convolutions ----


def depthwise_conv(conv: Any, input: Tensor) -> Tensor:
    """The forward of a converted depthwise convolution. On other devices than the CPU ATen's is called either way, and
    a single map without a batch is for torch."""
    is_batch = isinstance(input, Tensor) and input.dim() == len(conv.__dict__["kernel_size"]) + 2
    if is_batch and input.is_cpu and not is_left_to_compilers(conv) and (known := depthwise_of(conv)) is not None:
        return _ops.depthwise_conv(input, *known)
    return original_forward(conv, input)


# ---- SE blocks ----


def squeeze_excite(se: Any, input: Tensor) -> Tensor:
    """The forward of a converted SE block."""
    block = type(se)._recipe.block
    layers = block.layers_of(se)
    if layers is None or not (isinstance(input, Proxy) or block.takes(input)):
        return original_forward(se, input)
    if block.channels_last:
        return _squeeze_excite(layers, input.permute(0, 3, 1, 2), block.adds_input).permute(0, 2, 3, 1)
    return _squeeze_excite(layers, input, block.adds_input)


def _squeeze_excite(layers: Any, input: Tensor, adds_input: bool) -> Tensor:
    fc1, fc2, activation, gate = layers
    residual = input if adds_input else None
    excitation = excitation_of(fc1, fc2)
    if excitation is None:
        return _ops.rescale(input, called_excitation(layers, input), residual, "identity")
    return _ops.squeeze_excite(input, *excitation, activation, gate, residual, "identity")


# ---- relatives of the SE block ----


def pool(module: Any, input: Tensor, keepdim: bool) -> Tensor:
    """The mean over the spatial dims of a map [N, C, H, W]: [N, C, 1, 1] or [N, C]. module: the pool that the original
    calls, or None."""
    if not isinstance(input, Proxy) and input.dim() != 4:  # one image
        return input.mean((-2, -1), keepdim=keepdim) if module is None else module(input)
    if module is not None and not is_called_plainly(module):
        return module(input)
    z = _ops.squeeze(input)
    return z[:, :, None, None] if keepdim else z


def rescale(input: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
    """gate ⊙ input + residual, fused where the gate is one number per sample and channel."""
    if isinstance(input, Tensor) and isinstance(gate, Tensor) and gate.dtype == input.dtype and input.dim() == 4:
        is_gate = gate.shape == (*input.shape[:2], 1, 1) or (gate.stride()[2:] == (0, 0) and gate.shape == input.shape)
        if is_gate and (residual is None or (residual.shape == input.shape and residual.dtype == input.dtype)):
            return _ops.rescale(input, gate[:, :, 0, 0], residual, "identity")
    v = input * gate
    return v if residual is None else v + residual


# ---- stochastic depth ----


def _timm(module: Any) -> tuple[float, bool]:
    return module.drop_prob, module.scale_by_keep


def _torchvision(module: Any) -> tuple[float, bool]:
    return module.p, True


# Class → its probability of a drop, and whether what is kept is scaled.
_DROP_PATHS: dict[tuple[str, str], Callable[[Any], tuple[float, bool]]] = {
    ("timm.layers.drop", "DropPath"): _timm,
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): _torchvision,
}


def is_known_drop_path(module: Any) -> bool:
    """Whether the module drops samples of a batch (or is the identity), and a call does nothing besides."""
    cls = type(module)
    if cls is not nn.Identity:
        if (cls.__module__, cls.__qualname__) not in _DROP_PATHS:
            return False
        if getattr(module, "mode", "row") != "row":
            return False
    return is_called_plainly(module)


def drop_scale_of(module: Any, input: Tensor) -> Tensor | None:
    """[N]: 0 for a dropped sample, 1 / keep probability for the others, drawn as the module (is_known_drop_path) would;
    None where nothing is to be dropped."""
    if module is None or type(module) is nn.Identity or not module.training:
        return None
    drop, is_scaled = _DROP_PATHS[type(module).__module__, type(module).__qualname__](module)
    if drop == 0.0:
        return None
    keep = 1.0 - drop
    kept = input.new_empty([input.size(0)]).bernoulli_(keep)
    kept = kept + kept.new_zeros([1], dtype=torch.float32)  # half types become float32; torch.fx traces no dtype
    return kept / keep if keep > 0.0 and is_scaled else kept
