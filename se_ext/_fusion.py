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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import is_parametrized

from ._names import ACTIVATIONS, GATES

# TorchScript reads the annotations of what is scripted, so they say Optional[Tensor].
# ruff: noqa: UP045

# The tensors that the kernels may take straight from a module: parameters, what torch.func.functional_call puts in
# their place, and what torch.compile and torch.export trace with. Other subclasses of Tensor (sharded, quantised)
# compute their layer in their own way.
_PLAIN = frozenset({nn.Parameter, Tensor, FakeTensor, FunctionalTensor})
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_BATCH_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
# Not those with settings, which would have to be compared too.
_WITH_SETTINGS = (nn.ReLU6, nn.GELU, nn.LeakyReLU)
_NAMES: dict[type, str] = {cls: name for name, cls in ACTIVATIONS.items() if cls not in _WITH_SETTINGS}
# The activations and gates by name, as torch's modules compute them.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {name: cls().forward for name, cls in (ACTIVATIONS | GATES).items()}
Excitation = tuple[Tensor, Optional[Tensor], Tensor, Optional[Tensor]]  # w1, b1, w2, b2
# weight, bias, running mean and variance, count of batches, whether by the statistics of the batch, momentum, eps
Normalization = tuple[
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    Optional[Tensor],
    bool,
    Optional[float],
    float,
]

BLOCKS: set[type] = set()  # modules.py adds SqueezeExcitation, which this file cannot import

# The ops' overloads: a call of one takes 0.3 µs less than a call by its name.
_squeeze = torch.ops.se_ext.squeeze.default
_rescale = torch.ops.se_ext.rescale.default
_bn_squeeze_excite = torch.ops.se_ext.bn_squeeze_excite.default
_bn_squeeze_excite_running = torch.ops.se_ext._bn_squeeze_excite_running.default
_bn_activation_running = torch.ops.se_ext._bn_activation_running.default


# ---- what is known ----


def is_called_plainly(module: Any) -> bool:
    """Whether a call of the module runs its class's forward and nothing else. (torch.compile guards hooks that are read
    as attributes, as it guards those of torch's modules: where its settings say so.)"""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def excitation_of(modules: dict[str, Any]) -> Optional[Excitation]:
    """w1, b1, w2, b2 of a SqueezeExcitation, given its children, or None if a layer has to be called. Known are an
    nn.Linear, and an nn.Conv2d that is one on a 1x1 map. (That its kernel is 1x1 is for the op to check.)

    For two plain nn.Conv2d all is written out: here a function's call takes as long as what it would find out.
    """
    fc1, fc2 = modules["fc1"], modules["fc2"]
    one, two = fc1.__dict__, fc2.__dict__
    if (
        type(fc1) is not nn.Conv2d
        or type(fc2) is not nn.Conv2d
        or one["_forward_hooks"]
        or two["_forward_hooks"]
        or one["_forward_pre_hooks"]
        or two["_forward_pre_hooks"]
        or one["_backward_hooks"]
        or two["_backward_hooks"]
        or one["_backward_pre_hooks"]
        or two["_backward_pre_hooks"]
        or "forward" in one
        or "forward" in two
        or one["groups"] != 1
        or two["groups"] != 1
        or one["padding"] != (0, 0)
        or two["padding"] != (0, 0)
        or is_dynamo_compiling()
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return _other_excitation(fc1, fc2)
    of_fc1, of_fc2 = one["_parameters"], two["_parameters"]
    try:
        w1, b1, w2, b2 = of_fc1["weight"], of_fc1["bias"], of_fc2["weight"], of_fc2["bias"]
    except KeyError:
        return None
    if type(w1) in _PLAIN and type(w2) in _PLAIN and type(b1) in _PLAIN_OR_NONE and type(b2) in _PLAIN_OR_NONE:
        return w1, b1, w2, b2
    return None


def _other_excitation(fc1: Any, fc2: Any) -> Optional[Excitation]:
    """The same of all known layers, and under torch.compile. Both are judged before a weight is looked up: where
    torch.nn.utils.parametrize computes it, that may change it (spectral_norm), and a call would compute it again."""
    if is_known_layer(fc1) and is_known_layer(fc2):
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias
    return None


def is_known_layer(layer: Any) -> bool:
    """Whether the kernels compute a layer's formula, be its weight a parameter or one that torch.nn.utils.parametrize
    computes."""
    parametrized: bool = is_parametrized(layer)
    kind = type(layer).__bases__[0] if parametrized else type(layer)
    if kind is nn.Conv2d:
        formula: bool = layer.groups == 1 and layer.padding == (0, 0)
    else:
        formula = kind is nn.Linear
    plain = formula and all(type(parameter) in _PLAIN for parameter in layer.parameters())
    return plain and (parametrized or "weight" in layer._parameters) and is_called_plainly(layer)


def is_known_block(module: Any) -> bool:
    """Whether the module is a SqueezeExcitation whose parts a tail may take."""
    if type(module) not in BLOCKS:
        return False
    state: dict[str, Any] = module.__dict__
    return state["post_activation"] == "identity" and not state["inplace"] and is_called_plainly(module)


def normalization_of(bn: Any) -> Optional[Normalization]:
    """The arguments of an op that stand for a batch norm, or None if it has to be called: SyncBatchNorm and subclasses
    have formulas of their own. (And a batch norm without an eps is for torch to refuse.)"""
    if type(bn) not in _BATCH_NORMS:
        return None
    state = bn.__dict__
    parameters, buffers = state["_parameters"], state["_buffers"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:
        return None
    if (
        type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(mean) in _PLAIN_OR_NONE
        and type(var) in _PLAIN_OR_NONE
        and type(batches) in _PLAIN_OR_NONE
        and is_called_plainly(bn)
        and state["eps"] > 0
    ):
        statistics = running_statistics(mean, var, batches, state["training"], state["track_running_stats"])
        return weight, bias, *statistics, state["momentum"], state["eps"]
    return None


def known_activation(activation: Any) -> Optional[str]:
    """The name of an activation module (None: no activation) that the kernels compute; None if it has to be called."""
    if activation is None:
        return "identity"
    name = _NAMES.get(type(activation))
    return name if name is not None and is_called_plainly(activation) else None


def check_scriptable(module: Any, bn: Any, se: Any) -> None:
    """Raises where a script of the module, which takes the parameters of a batch norm (or None) and a block, would
    leave out what happens when they are called."""
    children = {"bn": bn is None or normalization_of(bn) is not None}
    children["se"] = se is module or is_known_block(se)
    children["fc1 or fc2"] = not children["se"] or excitation_of(se._modules) is not None
    for name, known in children.items():
        if not known:
            raise RuntimeError(
                f"torch.jit.script: expected {name} of {type(module).__name__} to be plain, got one with hooks or with "
                "a class or tensors of its own, which a script leaves out (torch.jit.trace and torch.export do not)"
            )


def running_statistics(
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    num_batches_tracked: Optional[Tensor],
    training: bool,
    track_running_stats: bool,
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], bool]:
    """The buffers that torch's batch norms would use, and whether they normalise by the statistics of the batch."""
    if not training:
        if running_mean is None and running_var is None:
            return None, None, None, True
        return running_mean, running_var, num_batches_tracked, False  # not moved: a traced graph keeps the buffer
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
    others: Callable[[], tuple[Tensor | None, Tensor | None]],
    pre_activation: str,
    post_activation: str,
) -> Tensor:
    """post(drop_scale ⊙ se(pre(bn(input))) + residual), given the modules: what scripted_tail computes where all of
    them are known. se may be None. others() gives drop_scale and residual once bn and se have run, as in a network
    that calls one module after the other: hooks run, and random numbers are drawn, in that order."""
    if not is_known_block(se):
        u = named_batch_norm(bn, pre_activation, input)
        v = u if se is None else se(u)
        drop_scale, residual = others()
        return _plain_end(v, residual, drop_scale, post_activation)
    state = se.__dict__
    excitation = excitation_of(state["_modules"])
    if excitation is None:
        u = named_batch_norm(bn, pre_activation, input)
        scale = called_excitation(se, u)
        drop_scale, residual = others()
        return _rescale(u, scale if drop_scale is None else scale * drop_scale[:, None], residual, post_activation)
    w1, b1, w2, b2 = excitation
    activation, gate = state["activation"], state["scale_activation"]
    normalization = normalization_of(bn)
    if normalization is None:
        u = bn(input)
        drop_scale, residual = others()
        return _bn_squeeze_excite(
            u,
            None,
            None,
            w1,
            b1,
            w2,
            b2,
            False,
            0.0,
            pre_activation,
            activation,
            gate,
            residual,
            post_activation,
            drop_scale,
        )[0]
    weight, bias, mean, var, batches, of_the_batch, momentum, eps = normalization
    drop_scale, residual = others()
    return _bn_squeeze_excite_running(
        input,
        weight,
        bias,
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


def given(drop_scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """For a tail's `others` that are there already. (TorchScript, which leaves the call out, reads no lambda.)"""
    return drop_scale, residual


def batch_norm(bn: Any, activation: Any, input: Tensor) -> Tensor:
    """activation(bn(input)), fused where the kernels compute both; activation is a module, or None for none."""
    name = known_activation(activation)
    output = named_batch_norm(bn, name or "identity", input)
    return output if name is not None else activation(output)


def named_batch_norm(bn: Any, activation: str, input: Tensor) -> Tensor:
    """The same of an activation given by its name. Behind a batch norm that is called it is not in place, whatever its
    module says: autograd allows no change of what comes out of a module with a backward hook."""
    normalization = normalization_of(bn)
    if normalization is None:
        return _FUNCTIONS[activation](bn(input))
    return _bn_activation_running(input, *normalization, activation)


# ---- called ----


def called_excitation(se: Any, input: Tensor) -> Tensor:
    """The scale [N, C] of a SqueezeExcitation, by calls of its layers."""
    hidden = _FUNCTIONS[se.activation](_call_layer(se.fc1, _squeeze(input)))
    return _FUNCTIONS[se.scale_activation](_call_layer(se.fc2, hidden)).flatten(1)


def _call_layer(layer: Any, z: Tensor) -> Tensor:
    """layer(z), on z as a map of one point with the layer's number of dims: [N, C] for an nn.Linear, [N, C, 1, 1] for
    an nn.Conv2d. Float32 weights beside a half-typed map work here as they do in the fused op."""
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
