"""SE blocks, recognised by their structure: a global average pool, a layer, an activation, a layer, a gate, and the
product with the input. Whoever wrote the class, this is its graph."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .._known import Layers, excitation_of, is_called_plainly, known_activation
from .._names import ACTIVATIONS, GATES, function_name

# What changes the shape of the pooled values, or tells a shape, and computes nothing.
_SHAPE_METHODS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "size",
        "dim",
        "contiguous",
        "view_as",
        "permute",
        "transpose",
    ]
)
_SHAPE_FUNCTIONS = frozenset({getattr, operator.getitem, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze})
_ARITHMETIC = frozenset({operator.add, operator.mul, operator.sub, operator.floordiv, operator.truediv})
_POOLS: dict[type[nn.Module], int] = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_POOL_FUNCTIONS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
# Not those in place: they write into the input.
PRODUCTS = (operator.mul, torch.mul, "mul")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Block:
    """Where an SE block has what it needs."""

    layers: tuple[str, str]
    """paths of the two layers"""
    activation: tuple[str, bool]
    """of the activation between them: a path (True) or a name (False)"""
    gate: tuple[str, bool]
    dims: int | None
    """spatial dims that the pool takes; None: 1 to 3"""
    channels_last: bool = False
    """whether the input is [N, *spatial, C]"""
    adds_input: bool = False
    """whether the output is the block's plus the input"""
    identities: tuple[str, ...] = ()
    """paths of modules that are not called"""

    def layers_of(self, se: Any) -> Layers | None:
        """The layers, activation and gate of a module; None if something besides them would happen in its call."""
        activation, gate = _name_at(se, self.activation, ACTIVATIONS), _name_at(se, self.gate, GATES)
        if activation is None or gate is None:
            return None
        for path in self.identities:
            m = _at(se, path)
            if (type(m) not in _POOLS and type(m) is not nn.Identity) or not is_called_plainly(m):
                return None
        one, two = self.layers
        return _at(se, one), _at(se, two), activation, gate

    def script_of(self, se: Any) -> str | None:
        """A forward that torch.jit.script can compile; None if there is none that is known."""
        layers = self.layers_of(se)
        if layers is None or excitation_of(layers[0], layers[1]) is None or self.channels_last or self.dims is None:
            return None
        one, two = ("self." + re.sub("[.]([0-9]+)", "[\\1]", path) for path in self.layers)
        residual = "x" if self.adds_input else "None"
        return (
            "def forward(self, x: Tensor) -> Tensor:\n"
            f"    assert x.dim() == {self.dims + 2}, 'expected a batch'\n"
            f"    weights = {one}.weight, {one}.bias, {two}.weight, {two}.bias\n"
            f"    return _se_ext_squeeze_excite(x, *weights, {layers[2]!r}, {layers[3]!r}, {residual})\n"
        )

    def takes(self, input: Tensor) -> bool:
        """Whether the input is a batch of maps."""
        dims = input.dim() - 2
        return dims == self.dims or (self.dims is None and 1 <= dims <= 3)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module._modules[name]
    return module


def _name_at(module: Any, what: tuple[str, bool], known: dict[str, type[nn.Module]]) -> str | None:
    return known_activation(_at(module, what[0]), known) if what[1] else what[0]


def pool_of(module: nn.Module, node: fx.Node, x: fx.Node) -> tuple[int, bool] | None:
    """The spatial dims of a node that is the global average pool of x, and whether the channels are last."""
    if not node.args or node.args[0] is not x:
        return None
    if node.op == "call_module":
        m: Any = module.get_submodule(str(node.target))
        dims = _POOLS.get(type(m), 0)
        return (dims, False) if dims and m.output_size in (1, (1,) * dims, [1] * dims) else None
    if node.op == "call_function" and node.target in _POOL_FUNCTIONS:
        dims = _POOL_FUNCTIONS[node.target]
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return (dims, False) if size in (1, (1,) * dims, [1] * dims) else None
    return (
        {
            (2, 3): (2, False),
            (-2, -1): (2, False),
            (2, 3, 4): (3, False),
            (-3, -2, -1): (3, False),
            (1, 2): (2, True),
        }.get(_dim_of(node))
        if _is_mean(node)
        else None
    )


def _is_mean(node: fx.Node) -> bool:
    return (node.op, node.target) == ("call_method", "mean") or node.target is torch.mean


def _dim_of(node: fx.Node) -> Any:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    return (dim,) if isinstance(dim, int) else tuple(sorted(dim)) if isinstance(dim, (tuple, list)) else None


def block_in(module: nn.Module, graph: fx.Graph) -> Block | None:
    """The SE block that a module's graph is; None if it is something else."""
    return _Reader(module, graph).block()


class _Reader:
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.output = next(iter(reversed(graph.nodes))).args[0]
        self.input = self.nodes[0]
        self.identities: list[str] = []

    def block(self) -> Block | None:
        """Reads the graph node by node: what the pool gives, passes through in order layer, activation, layer, gate."""
        shapes: set[Any] = set()  # nodes that are shapes
        views: set[Any] = {self.input}  # the input, also reshaped
        pooled: set[Any] = set()  # the last of the pooled values, also reshaped
        found: list[Any] = []
        dims: int | None = None
        channels_last = has_pool = adds_input = False
        product = None
        for node in self.nodes[1:]:
            sources = [n for n in node.all_input_nodes if n not in shapes]
            if not has_pool and (pool := self.pool(node, views)) is not None:
                dims, channels_last = pool
                has_pool = True
                pooled = {node}
            elif node.op == "get_attr" or (self.is_shape(node) and not sources) or self.tells_shape(node):
                shapes.add(node)
            elif self.is_view(node) and sources and (sources[0] in views or sources[0] in pooled):
                (views if sources[0] in views else pooled).add(node)
            elif product is None and len(found) == 4 and self.is_product(node, pooled):
                product = node
            elif product is not None and self.is_sum(node, product):
                adds_input, product = True, node
            elif len(found) < 4 and len(sources) == 1 and sources[0] in pooled:
                part = self.part(node, len(found))
                if part is None:
                    return None
                if part != "":
                    found.append(part)
                pooled = {node}
            else:
                return None
        if product is None or self.output is not product:
            return None
        one, activation, two, gate = found
        return Block((one, two), activation, gate, dims, channels_last, adds_input, tuple(self.identities))

    def pool(self, node: fx.Node, views: set[Any]) -> tuple[int | None, bool] | None:
        pool = pool_of(self.module, node, self.input)
        if pool is not None:
            if node.op == "call_module":
                self.identities.append(str(node.target))
            return pool
        # x.flatten(2).mean(-1)
        is_of_view = bool(node.args) and node.args[0] in views and node.args[0] is not self.input
        return (None, False) if is_of_view and _is_mean(node) and _dim_of(node) in ((-1,), (2,)) else None

    def part(self, node: fx.Node, index: int) -> Any:
        """The layer, activation, layer or gate that a node is, by index; "" for the identity, None for another."""
        known = ACTIVATIONS if index == 1 else GATES
        if node.op == "call_module":
            path = str(node.target)
            m = self.module.get_submodule(path)
            if type(m) is nn.Identity:
                self.identities.append(path)
                return ""
            if index in (0, 2):
                return path if isinstance(m, _LAYERS) else None
            return None if known_activation(m, known) is None else (path, True)
        if index in (1, 3) and node.op in ("call_function", "call_method"):
            function = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
            name = function_name(function)
            is_plain = len(node.args) == 1 and node.kwargs.keys() <= {"inplace"}
            return (name, False) if name in known and is_plain else None
        return None

    def is_product(self, node: fx.Node, pooled: set[Any]) -> bool:
        if node.target not in PRODUCTS or len(node.args) != 2:
            return False
        a, b = node.args
        return (a is self.input and b in pooled) or (b is self.input and a in pooled)

    def is_sum(self, node: fx.Node, product: fx.Node) -> bool:
        if node.target not in (operator.add, operator.iadd, torch.add, "add", "add_") or len(node.args) != 2:
            return False
        return set(node.args) == {product, self.input}

    @staticmethod
    def is_shape(node: fx.Node) -> bool:
        return node.op == "call_function" and (node.target in _ARITHMETIC or node.target in _SHAPE_FUNCTIONS)

    @staticmethod
    def tells_shape(node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target is getattr and node.args[1] in ("shape", "ndim")
        return node.op == "call_method" and node.target in ("size", "dim")

    @staticmethod
    def is_view(node: fx.Node) -> bool:
        if node.target is operator.getitem:
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            return all(i is None or i is Ellipsis or i == slice(None) for i in index)
        if node.op == "call_function":
            return node.target in _SHAPE_FUNCTIONS and node.target is not getattr
        return node.op == "call_method" and node.target in _SHAPE_METHODS
