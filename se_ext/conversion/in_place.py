"""Whether a step may write its output into the map that the convolution in front of it gave. Then the step needs no new
map: the allocator may have to ask the system for a new map's memory at every call.

In the graph nobody but the step reads the convolution's map. At a call somebody may hold it all the same: a hook, a
module in the convolution's place, an adapter, a mode that sees every operator, autograd. So a map is overwritten only
where nobody can have seen it: a known class's forward made it, and nothing watched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import forward_ad

from .._known import is_called_plainly, is_convolution

_PLAIN = {nn.Parameter, Tensor}


def convolved(conv: Any, input: Any) -> tuple[Any, bool]:
    """conv(input), and whether it may be overwritten. Without a convolution (None) input itself, which may not be.

    What is attached to the convolution is looked for before the call: a hook may take itself away.
    """
    if conv is None:
        return input, False
    is_unseen = not torch.is_grad_enabled() and type(input) is Tensor and not _is_watched(input) and _is_plain(conv)
    return conv(input), is_unseen


def _is_plain(conv: Any) -> bool:
    """Whether a call of the module runs the forward of a known convolution, on plain weights, and nothing besides."""
    state = conv.__dict__
    parameters = state["_parameters"]
    return (
        is_convolution(conv)
        and is_called_plainly(conv)
        and "_conv_forward" not in state
        and state.get("_compiled_call_impl") is None  # of conv.compile()
        and type(parameters.get("weight")) in _PLAIN
        and (parameters.get("bias") is None or type(parameters["bias"]) in _PLAIN)
    )


def _is_watched(input: Tensor) -> bool:
    """Whether operators on the input do more than compute: a compiler, mode, transform or dual level is active.
    Autocast is among these, because the ops in place are not part of it. (While torch.jit.trace runs, no batch norm in
    evaluation is fused: is_left_to_compilers.)"""
    return (
        torch.compiler.is_compiling()
        or _len_torch_function_stack() > 0
        or _len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(input.device.type)
    )
