"""What is known about a module, and so may be fused: decided here for modules.py, models.py and whatever swaps other
libraries' modules. How it is fused, and how the rest is called, is in _fusion.py.

The rule: fuse exactly what is known, call everything else. Other libraries wrap, hook, prune, shard and adapt modules,
and what they attach takes effect when a module is called. So a module is known only if a call of it would run the
formula that the kernels have, on plain tensors, and nothing besides.

On a small map nn.Module's call and attribute look-up would take longer than the kernels do, so the modules'
dictionaries are read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrize import is_parametrized

from ._names import ACTIVATIONS, GATES
from ._ops import Excitation, Normalization

# TorchScript reads the annotations of what is scripted, so they say Optional[Tensor].
# ruff: noqa: UP045

Layers = tuple[Any, Any, str, str]
"""The two layers of an SE block, its activation and its gate by name."""

# The tensors that the kernels may take straight from a module: parameters, what torch.func.functional_call puts in
# their place, and what torch.compile and torch.export trace with. Other subclasses of Tensor (sharded, quantised)
# compute their layer in their own way.
_PLAIN = frozenset({nn.Parameter, Tensor, FakeTensor, FunctionalTensor})
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_Conv2d, _Parameter = nn.Conv2d, nn.Parameter  # found faster than through nn
_ACTIVATION_NAMES: dict[type, str] = {cls: name for name, cls in (GATES | ACTIVATIONS).items()}
# The settings with which a class is the function that the kernels compute.
_SETTINGS: dict[type, dict[str, Any]] = {
    nn.ReLU6: {"min_val": 0.0, "max_val": 6.0},
    nn.GELU: {"approximate": "none"},
    nn.LeakyReLU: {"negative_slope": 0.01},
}
# Classes of other libraries without settings, by name, so that no library is imported for them. Their functions are
# compared with ours in the tests.
_ACTIVATIONS_OF_LIBRARIES = {
    ("timm.layers.activations", "Swish"): "silu",
    ("timm.layers.activations", "Sigmoid"): "sigmoid",
    ("timm.layers.activations", "Tanh"): "tanh",
    ("timm.layers.activations", "HardSwish"): "hardswish",
    ("timm.layers.activations", "HardSigmoid"): "hardsigmoid",
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations_me", "SwishMe"): "silu",
    ("timm.layers.activations_me", "HardSwishMe"): "hardswish",
    ("timm.layers.activations_me", "HardSigmoidMe"): "hardsigmoid",
}

# The classes of batch norms whose formula is that of torch's. Conversions add those of theirs that have an activation
# inside, which is `act` of theirs.
BATCH_NORMS: set[type] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}

# The classes of the SE block, with a function that gives the two layers, the activation and the gate of one (None if it
# is not known). modules.py, which imports this file, adds SqueezeExcitation, and conversions theirs.
SE_BLOCKS: dict[type, Callable[[Any], Optional[Layers]]] = {}


def is_called_plainly(module: Any) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    if is_dynamo_compiling() and _is_hooked_when_compiled(module):
        return False
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


def _is_hooked_when_compiled(module: Any) -> bool:
    """The same of the module's own hooks, read as attributes: torch.compile guards those (where its settings say so),
    as it guards those of torch's modules. What is read from a dictionary it does not guard."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


# ---- the SE block ----


def known_block(module: Any) -> Optional[Layers]:
    """The two layers, the activation and the gate of an SE block, which a tail may take; None if the block has to be
    called."""
    layers = SE_BLOCKS.get(type(module))
    return None if layers is None or not is_called_plainly(module) else layers(module)


def excitation_of(fc1: Any, fc2: Any) -> Optional[Excitation]:
    """w1, b1, w2, b2 of an SE block's two layers, or None if a layer has to be called.

    For two plain nn.Conv2d all that is_known_layer asks for is written out: every call of an SE block waits for it, and
    a function's call takes as long as what it would find out. All other layers are for is_known_layer, and so are these
    under torch.compile, which guards no dictionary. There both layers are judged before a weight is looked up: where
    torch.nn.utils.parametrize computes it, that may change it (spectral_norm), and a call would compute it again.
    """
    one, two = fc1.__dict__, fc2.__dict__
    if (
        type(fc1) is not _Conv2d
        or type(fc2) is not _Conv2d
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
        if is_known_layer(fc1) and is_known_layer(fc2):
            return fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return None
    one, two = one["_parameters"], two["_parameters"]
    try:
        w1, b1, w2, b2 = one["weight"], one["bias"], two["weight"], two["bias"]
    except KeyError:
        return None
    if (
        type(w1) is type(b1) is type(w2) is type(b2) is _Parameter  # the rule, and faster than to look for each
        or (type(w1) in _PLAIN and type(w2) in _PLAIN and type(b1) in _PLAIN_OR_NONE and type(b2) in _PLAIN_OR_NONE)
    ):
        return w1, b1, w2, b2
    return None


def is_known_layer(layer: Any) -> bool:
    """Whether the kernels compute a layer's formula: an nn.Linear, and an nn.Conv2d that is one on a 1x1 map (that its
    kernel is 1x1 is for the op to check). Its weight may be a parameter or one that torch.nn.utils.parametrize
    computes."""
    parametrized: bool = is_parametrized(layer)
    cls = type(layer).__bases__[0] if parametrized else type(layer)
    if cls is nn.Conv2d:
        formula: bool = layer.groups == 1 and layer.padding == (0, 0)
    else:
        formula = cls is nn.Linear
    plain = formula and all(type(parameter) in _PLAIN for parameter in layer.parameters())
    held = layer._parameters
    complete = parametrized or ("weight" in held and "bias" in held)  # torch 2.10 compiles no comparison of sets
    return plain and complete and is_called_plainly(layer)


# ---- its neighbours ----

# The classes of convolutions whose formula is that of torch's, with the padding that their forward adds: that of the
# attribute, or "same" (torch's name for an output of ceil(input / stride)). Conversions add theirs.
CONVOLUTIONS: dict[type, Optional[str]] = {nn.Conv1d: None, nn.Conv2d: None, nn.Conv3d: None}
_CONVOLUTIONS_OF_LIBRARIES = {("timm.layers.conv2d_same", "Conv2dSame"): "same"}

Depthwise = tuple[Tensor, Optional[Tensor], list[int], list[int], list[int]]
"""weight, bias, stride, padding, dilation, as the op depthwise_conv takes them"""


def is_convolution(module: Any) -> bool:
    """Whether the module is of a class of these. Its forward gives a new map, which nobody else holds."""
    cls = type(module)
    return cls in CONVOLUTIONS or (cls.__module__, cls.__qualname__) in _CONVOLUTIONS_OF_LIBRARIES


def is_depthwise(conv: Any) -> bool:
    """Whether the kernels compute a convolution: each channel has a filter of its own, which is 3, 5 or 7 wide, with
    stride 1 or 2 and dilation 1 along the last dim, and zeros beyond the map."""
    if not is_convolution(conv):
        return False
    state = conv.__dict__
    channels = state["in_channels"]
    return (
        state["groups"] == channels == state["out_channels"] > 1
        and state["padding_mode"] == "zeros"
        and state["kernel_size"][-1] in (3, 5, 7)
        and state["stride"][-1] in (1, 2)
        and state["dilation"][-1] == 1
    )


def depthwise_of(conv: Any) -> Optional[Depthwise]:
    """The arguments of the op that stand for a depthwise convolution (is_depthwise), or None if it has to be called."""
    state = conv.__dict__
    parameters = state["_parameters"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:
        return None
    if type(weight) not in _PLAIN or type(bias) not in _PLAIN_OR_NONE or not is_depthwise(conv):
        return None
    return weight, bias, state["stride"], _padding_of(conv), state["dilation"]


def padding_rule(cls: type) -> Optional[str]:
    """The padding of a class of convolutions, if that is not an attribute of its instances."""
    return CONVOLUTIONS[cls] if cls in CONVOLUTIONS else _CONVOLUTIONS_OF_LIBRARIES[cls.__module__, cls.__qualname__]


def _padding_of(conv: Any) -> Any:
    padding = padding_rule(type(conv)) or conv.__dict__["padding"]
    if isinstance(padding, str):
        return [] if padding == "same" else [0]
    return padding


def normalization_of(bn: Any) -> Optional[Normalization]:
    """The arguments of an op that stand for a batch norm, or None if it has to be called: SyncBatchNorm and subclasses
    have formulas of their own. (And a batch norm without an eps is for torch to refuse.)"""
    if type(bn) not in BATCH_NORMS:
        return None
    state = bn.__dict__
    parameters, buffers = state["_parameters"], state["_buffers"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:
        return None
    plain = (type(weight) is type(bias) is _Parameter and type(mean) is type(var) is type(count) is Tensor) or (
        type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(mean) in _PLAIN_OR_NONE
        and type(var) in _PLAIN_OR_NONE
        and type(count) in _PLAIN_OR_NONE
    )
    if plain and state["eps"] > 0 and is_called_plainly(bn):
        if is_dynamo_compiling():  # guards what is read as an attribute; torch 2.15 guards no entry of __dict__
            training, tracked, momentum, eps = bn.training, bn.track_running_stats, bn.momentum, bn.eps
        else:
            training, tracked, momentum = state["training"], state["track_running_stats"], state["momentum"]
            eps = state["eps"]
        return normalization_from(weight, bias, (mean, var, count), training, tracked, momentum, eps)
    return None


def is_left_to_compilers(bn: Any) -> bool:
    """Whether a batch norm stays an ordinary one, and the activation behind it too: in evaluation, in a program that is
    recorded for inference. A compiler folds them into the convolution in front, which it cannot do with an op of ours.
    (torch.compile with gradients keeps the fused op: there, nothing is folded.)"""
    return not bn.training and (
        is_exporting() or torch._C._get_tracing_state() is not None or (is_dynamo_compiling() and not is_grad_enabled())
    )


def normalization_from(
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    buffers: tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]],
    training: bool,
    track_running_stats: bool,
    momentum: Optional[float],
    eps: float,
) -> Normalization:
    """What the state of one of torch's batch norms means to an op: of the buffers (running_mean, running_var,
    num_batches_tracked) those that a call would read or write, and whether it would normalise by the statistics of the
    batch. (Scripted too: TorchScript passes no modules.)"""
    running_mean, running_var, num_batches_tracked = buffers
    if not training:
        if running_mean is None and running_var is None:
            return weight, bias, None, None, None, True, momentum, eps
        # The count stays as it is. It is passed so that a traced graph keeps the buffer.
        return weight, bias, running_mean, running_var, num_batches_tracked, False, momentum, eps
    if not track_running_stats:
        return weight, bias, None, None, None, True, momentum, eps
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var to be both None or neither")
    return weight, bias, running_mean, running_var, num_batches_tracked, True, momentum, eps


def known_activation(activation: Any, known: dict[str, type[nn.Module]] = ACTIVATIONS) -> Optional[str]:
    """The name of an activation module (None: no activation) that the kernels compute; None if it has to be called.
    known: ACTIVATIONS or GATES."""
    if activation is None:
        return "identity"
    cls = type(activation)
    name = _ACTIVATION_NAMES.get(cls) or _ACTIVATIONS_OF_LIBRARIES.get((cls.__module__, cls.__qualname__))
    if name is None or name not in known or not is_called_plainly(activation):
        return None
    settings = _SETTINGS.get(cls)
    if settings is not None and any(activation.__dict__.get(key) != value for key, value in settings.items()):
        return None
    return name


# ---- TorchScript ----


def check_scriptable(module: Any, bn: Any, se: Any) -> None:
    """Raises RuntimeError where a script of the module, which takes the parameters of a batch norm (or None) and a
    SqueezeExcitation, would leave out what happens when they are called."""
    known = {"bn": bn is None or normalization_of(bn) is not None}
    known["se"] = se is module or known_block(se) is not None
    known["fc1 or fc2"] = not known["se"] or excitation_of(se.fc1, se.fc2) is not None
    for child, is_known in known.items():
        if not is_known:
            raise RuntimeError(
                f"torch.jit.script: expected {child} of {type(module).__name__} to be plain, got one with hooks or "
                "with a class or tensors of its own, which a script leaves out (torch.jit.trace and torch.export do "
                "not)"
            )
