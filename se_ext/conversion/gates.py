"""The SE block's relatives: modules that compute a gate from the pooled input in whatever way, and multiply the input
by it (effective SE, ECA, scSE, SE with a batch norm or a maximum inside). The pool and the product become steps; what
is between them runs as it is."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from . import steps
from .blocks import PRODUCTS, pool_of
from .fused_class import Recipe
from .neighbours import recipe_of

_SUMS = (operator.add, torch.add, "add")


def gate_in(module: nn.Module, graph: fx.Graph, chains: list[str]) -> Recipe | None:
    """The recipe of a module that multiplies its input by a gate; None if it is something else.

    Args:
        module: any.
        graph: of its forward.
        chains: paths whose children take their place in the graph.
    """
    x = next(iter(graph.nodes))
    pools = [node for node in graph.nodes if (pool := pool_of(module, node, x)) is not None and pool == (2, False)]
    pooled: set[Any] = set(pools)
    for node in graph.nodes:
        if node not in pooled and pooled.intersection(node.all_input_nodes):
            pooled.add(node)
    products = [node for node in graph.nodes if _gate_of(node, x, pooled) is not None]
    if not pools or len(products) != 1:
        return None
    for node in pools:
        _replace_pool(graph, node, x)
    _replace_product(graph, products[0], x, pooled)
    graph.lint()
    return recipe_of(graph, (None, (), tuple((path, len(module.get_submodule(path)._modules)) for path in chains)))


def _gate_of(node: fx.Node, x: fx.Node, pooled: set[Any]) -> Any:
    """What a product multiplies the input by, if that comes from the pooled input alone."""
    if node.target not in PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if a is x and b in pooled and b is not x:
        return b
    return a if b is x and a in pooled else None


def _replace_pool(graph: fx.Graph, node: fx.Node, x: fx.Node) -> None:
    with graph.inserting_before(node):
        if node.op == "call_module":
            pool: Any = graph.create_node("get_attr", str(node.target))
            keepdim: Any = True
        else:
            pool = None
            keepdim = node.kwargs.get("keepdim", node.kwargs.get("keepdims", (*node.args, None, None)[2] or False))
            if node.target not in ("mean", torch.mean):
                keepdim = True  # adaptive_avg_pool2d
        node.replace_all_uses_with(graph.call_function(steps.pool, (pool, x, bool(keepdim))))
    graph.erase_node(node)


def _replace_product(graph: fx.Graph, node: fx.Node, x: fx.Node, pooled: set[Any]) -> None:
    gate = _gate_of(node, x, pooled)
    residual, last = None, node
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is not None and user.target in _SUMS and len(user.args) == 2 and not user.kwargs:
        a, b = user.args
        other = b if a is node else a
        if isinstance(other, fx.Node) and other is not node:
            residual, last = other, user
    with graph.inserting_before(last):
        last.replace_all_uses_with(graph.call_function(steps.rescale, (x, gate, residual)))
    for erased in dict.fromkeys((last, node)):
        graph.erase_node(erased)
