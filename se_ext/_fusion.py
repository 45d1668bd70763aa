"""What is fused and what is called, decided here for modules.py, models.py and whatever swaps other libraries' modules.

The rule: fuse exactly what is known, call everything else. Other libraries wrap, hook, prune, shard and adapt modules,
and what they attach takes effect when a module is called. So a module is fused only if a call of it would run the
formula that the kernels have, on plain tensors, and nothing besides. Around a module that has to be called, as much as
possible stays fused.

On a small map nn.Module's call and attribute look-up would take longer than the kernels do, so the fused path reads the
modules' dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import is_parametrized

# TorchScript reads the annotations of what is scripted, so they say Optional[Tensor].
# ruff: noqa: UP045

# The tensors that the kernels may take straight from a module: parameters, what torch.func.functional_call puts in their
# place, and what torch.compile and torch.export trace with. Other subclasses of Tensor (sharded, quantised) compute
# their layer in their own way.
_PLAIN = frozenset({nn.Parameter, Tensor, FakeTensor, FunctionalTensor})
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_BATCH_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
# Not those with parameters of their own, which would have to be compared too.
_ACTIVATIONS: dict[type, str] = {
    type(None): "identity",
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
# The activations and gates by name, as torch's modules compute them.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda input: input,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
_blocks: set[type] = set()  # modules.py adds SqueezeExcitation, which this file cannot import

# The ops' overloads: a call of one takes 1 µs less than a call by its name.
_squeeze = torch.ops.se_ext.squeeze.default
_rescale = torch.ops.se_ext.rescale.default
_bn_squeeze_excite = torch.ops.se_ext.bn_squeeze_excite.default


# ---- what is known ----


def is_called_plainly(module: Any) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def is_known_layer(layer: Any) -> bool:
    """Whether the kernels compute the excitation's layer: an nn.Linear, or an nn.Conv2d that is one on a 1x1 map. (That
    its kernel is 1x1 the op checks.) A weight that torch.nn.utils.parametrize computes is as good as a plain one."""
    kind = type(layer)
    if kind is nn.Conv2d or kind is nn.Linear:
        parameters = layer._parameters
        if type(parameters.get("weight")) not in _PLAIN or type(parameters.get("bias")) not in _PLAIN_OR_NONE:
            return False
    elif isinstance(layer, (nn.Conv2d, nn.Linear)) and is_parametrized(layer):
        kind = kind.__bases__[0]
        if not all(type(parameter) in _PLAIN for parameter in layer.parameters()):
            return False
    if kind is nn.Conv2d:
        return layer.groups == 1 and layer.padding == (0, 0) and is_called_plainly(layer)
    return kind is nn.Linear and is_called_plainly(layer)


def is_known_block(module: Any) -> bool:
    """Whether the module is a SqueezeExcitation of which a tail may use the parts."""
    return (
        type(module) in _blocks
        and module.post_activation == "identity"
        and not module.inplace
        and is_called_plainly(module)
    )


def is_known_batch_norm(bn: Any) -> bool:
    """Whether the kernels compute the module's formula: not SyncBatchNorm's, and not that of a subclass. (A batch norm
    without an eps is torch's to refuse.)"""
    return (
        type(bn) in _BATCH_NORMS
        and all(type(parameter) in _PLAIN_OR_NONE for parameter in bn._parameters.values())
        and all(type(buffer) in _PLAIN_OR_NONE for buffer in bn._buffers.values())
        and bn.eps > 0
        and is_called_plainly(bn)
    )


def known_activation(activation: Any) -> Optional[str]:
    """The name of an activation module (None: no activation) that the kernels compute, or None."""
    name = _ACTIVATIONS.get(type(activation))
    return name if activation is None or (name is not None and is_called_plainly(activation)) else None


# ---- the parts of known modules ----


def parameters_of(layer: Any) -> tuple[Tensor, Optional[Tensor]]:
    """Weight and bias of a layer; those that torch.nn.utils.parametrize computes are looked up the usual way."""
    try:
        return layer._parameters["weight"], layer._parameters["bias"]
    except KeyError:
        return layer.weight, layer.bias


def excitation_of(se: Any) -> Optional[tuple[Tensor, Optional[Tensor], Tensor, Optional[Tensor]]]:
    """w1, b1, w2, b2 of a SqueezeExcitation, or None where its layers have to be called. Both layers are judged before
    a weight is looked up: to compute one may change it (spectral_norm), and a call of the layer would do it again."""
    modules = se._modules
    fc1, fc2 = modules["fc1"], modules["fc2"]
    if is_known_layer(fc1) and is_known_layer(fc2):
        return *parameters_of(fc1), *parameters_of(fc2)
    return None


def running_statistics(
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    num_batches_tracked: Optional[Tensor],
    training: bool,
    track_running_stats: bool,
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], bool]:
    """The buffers that torch's batch norms would use, and whether they normalise by the statistics of the batch."""
    if not training:
        return running_mean, running_var, None, running_mean is None and running_var is None
    if not track_running_stats:
        return None, None, None, True
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var to be both None or neither")
    return running_mean, running_var, num_batches_tracked, True


# ---- fused ----


def scripted_tail(
    input: Tensor,
    bn_weight: Optional[Tensor],
    bn_bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    num_batches_tracked: Optional[Tensor],
    momentum: Optional[float],
    eps: float,
    training: bool,
    track_running_stats: bool,
    w1: Tensor,
    b1: Optional[Tensor],
    w2: Tensor,
    b2: Optional[Tensor],
    pre_activation: str,
    activation: str,
    gate: str,
    residual: Optional[Tensor],
    post_activation: str,
    drop_scale: Optional[Tensor],
) -> Tensor:
    """bn_squeeze_excite with what a BatchNorm2d and a SqueezeExcitation hold (TorchScript passes no modules).

    Like BatchNorm2d's forward it counts the batches, averages over all of them where momentum is None, and uses the
    batch's statistics where it has no others.
    """
    mean, var, batches, of_the_batch = running_statistics(
        running_mean, running_var, num_batches_tracked, training, track_running_stats
    )
    return torch.ops.se_ext._bn_squeeze_excite_running(
        input,
        bn_weight,
        bn_bias,
        mean,
        var,
        batches,
        w1,
        b1,
        w2,
        b2,
        of_the_batch,
        momentum,
        eps,
        pre_activation,
        activation,
        gate,
        residual,
        post_activation,
        drop_scale,
    )


def tail(
    bn: Any,
    se: Any,
    input: Tensor,
    residual: Tensor | None,
    drop_scale: Tensor | None,
    pre_activation: str,
    post_activation: str,
) -> Tensor:
    """post(drop_scale ⊙ se(pre(bn(input))) + residual), given the modules: what scripted_tail computes where all of them
    are known. se may be None."""
    if not is_known_block(se):
        u = _batch_norm(bn, input, pre_activation)
        return _plain_end(u if se is None else se(u), residual, drop_scale, post_activation)
    excitation = excitation_of(se)
    if excitation is None:
        u = _batch_norm(bn, input, pre_activation)
        scale = called_excitation(se, u)
        return _rescale(u, scale if drop_scale is None else scale * drop_scale[:, None], residual, post_activation)
    if not is_known_batch_norm(bn):
        output, _, _ = _bn_squeeze_excite(
            bn(input),
            None,
            None,
            *excitation,
            False,
            0.0,
            pre_activation,
            se.activation,
            se.scale_activation,
            residual,
            post_activation,
            drop_scale,
        )
        return output
    buffers = bn._buffers
    return scripted_tail(
        input,
        *parameters_of(bn),
        buffers["running_mean"],
        buffers["running_var"],
        buffers["num_batches_tracked"],
        bn.momentum,
        bn.eps,
        bn.training,
        bn.track_running_stats,
        *excitation,
        pre_activation,
        se.activation,
        se.scale_activation,
        residual,
        post_activation,
        drop_scale,
    )


def batch_norm(bn: Any, activation: Any, input: Tensor) -> Tensor:
    """activation(bn(input)), fused where the kernels compute both; activation is a module, or None for none."""
    if not is_known_batch_norm(bn):
        output = bn(input)
    else:
        name = known_activation(activation)
        output = _batch_norm_known(bn, input, name or "identity")
        if name is not None:
            return output
    return output if activation is None else activation(output)


def _batch_norm_known(bn: Any, input: Tensor, activation: str) -> Tensor:
    weight, bias = parameters_of(bn)
    buffers = bn._buffers
    mean, var, batches, of_the_batch = running_statistics(
        buffers["running_mean"],
        buffers["running_var"],
        buffers["num_batches_tracked"],
        bn.training,
        bn.track_running_stats,
    )
    return torch.ops.se_ext._bn_activation_running(
        input, weight, bias, mean, var, batches, of_the_batch, bn.momentum, bn.eps, activation
    )


def _batch_norm(bn: Any, input: Tensor, activation: str) -> Tensor:
    """activation(bn(input)), the activation given by its name."""
    return _batch_norm_known(bn, input, activation) if is_known_batch_norm(bn) else _FUNCTIONS[activation](bn(input))


# ---- called ----


def called_excitation(se: Any, input: Tensor) -> Tensor:
    """The scale [N, C] of a SqueezeExcitation, by calls of its layers."""
    hidden = _FUNCTIONS[se.activation](_call_layer(se.fc1, _squeeze(input)))
    return _FUNCTIONS[se.scale_activation](_call_layer(se.fc2, hidden)).flatten(1)


def _call_layer(layer: Any, z: Tensor) -> Tensor:
    """layer(z), on z as a map of one point with the layer's number of dims: [N, C] for an nn.Linear, [N, C, 1, 1] for an
    nn.Conv2d. Float32 weights beside a half-typed map work here as they do in the fused op."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        dims = 2 if isinstance(layer, nn.Linear) else 4
    else:
        weight = getattr(layer, "weight", None)
        dims = weight.dim() if isinstance(weight, Tensor) else 4
    z = z.flatten(1)[(..., *[None] * (dims - 2))]
    if isinstance(z, Tensor) and z.dtype in (torch.bfloat16, torch.float16):  # not torch.fx's Proxy
        parameter = next(layer.parameters(), None)
        if parameter is not None and parameter.dtype is torch.float32 and not torch.is_autocast_enabled(z.device.type):
            z = z.float()
    return layer(z)


def called_block(se: Any, input: Tensor, residual: Tensor | None) -> Tensor:
    """A SqueezeExcitation whose layers have to be called: the squeeze and the rescale are fused."""
    scale = called_excitation(se, input)
    if se.inplace and not torch.is_grad_enabled():
        torch.ops.se_ext.rescale_(input, scale, residual, se.post_activation)
        return input
    return _rescale(input, scale, residual, se.post_activation)


def _plain_end(v: Tensor, residual: Tensor | None, drop_scale: Tensor | None, post_activation: str) -> Tensor:
    """post(drop_scale ⊙ v + residual), behind a module that was called."""
    if drop_scale is not None:
        v = v * drop_scale.to(v.dtype)[(..., *[None] * (v.dim() - 1))]
    return _FUNCTIONS[post_activation](v if residual is None else v + residual)
