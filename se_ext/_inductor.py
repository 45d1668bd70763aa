"""For Inductor, the default backend of torch.compile: an op whose input nobody reads afterwards writes into it, as
Inductor's own multiplication would.

Whether somebody reads it is decided by Inductor's reinplacing pass, from its own analysis of what is alive and of what
shares memory. The pass knows pairs of a functional op and its form in place; ours are added here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ._when_imported import when_imported

ops = torch.ops.se_ext
IN_PLACE = {
    ops.rescale.default: ops.rescale_.default,
    ops.squeeze_excite.default: ops.squeeze_excite_.default,
}


def register() -> None:
    when_imported("torch._inductor.fx_passes.reinplace", add_pairs_or_warn)


def add_pairs_or_warn(reinplace: Any) -> None:
    """What is used of Inductor is private, and another version may lack it. Programs are right without it."""
    try:
        add_pairs(reinplace)
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        warnings.warn(
            f"se_ext: compiled blocks do not write in place with torch {torch.__version__}: {error}", stacklevel=2
        )


def add_pairs(reinplace: Any) -> None:
    """To the pass, the module; and to Inductor's table of lowerings, which its import has filled."""
    from torch._inductor import lowering

    for functional, in_place in IN_PLACE.items():
        pair = reinplace.InplaceableOp(in_place, 0, extra_check=may_write)
        reinplace.inplaceable_ops[functional] = pair
        call: Any = lowering.fallback_handler
        register: Any = lowering.register_lowering(in_place, type_promotion_kind=None)
        register(lowered(call(functional), call(in_place), lowering.lowerings[torch.ops.aten.copy_.default]))


def may_write(node: Any) -> bool:
    """Whether a functional op may write into its input, as far as the pass does not find out who else reads it.

    Its input is no view and has the strides of the output, and no other argument shares its memory. Memory that the
    caller gave is written only where the output is nothing but copied into it: else the caller might get an output that
    is the same memory, where the functional op gives a tensor of its own.
    """
    from torch._inductor.fx_utils import get_node_storage
    from torch.fx.passes.reinplace import _is_view_op

    written, *others = node.args
    memory = get_node_storage(written)
    given = [other for other in node.graph.nodes if other.op in ("placeholder", "get_attr")]
    return (
        not _is_view_op(written.target)
        and written.meta["val"].stride() == node.meta["val"].stride()
        and not any(isinstance(other, torch.fx.Node) and get_node_storage(other) == memory for other in others)
        and (
            all(get_node_storage(other) != memory for other in given)
            or all(user.target is torch.ops.aten.copy_.default for user in node.users)
        )
    )


def lowered(functional: Any, in_place: Any, copy_: Any) -> Any:
    """What the op in place becomes in Inductor's program; its value is its input, changed."""

    def lower(input: Any, *others: Any) -> Any:
        from torch._inductor import ir

        input.realize()
        if not isinstance(input.data, ir.StorageBox):  # a view of a buffer, which an op might get as a copy
            return copy_(input, functional(input, *others))
        with torch.no_grad():  # the program runs without gradients; to AOTInductor, weights are still parameters
            in_place(input, *others)
        return input

    return lower
