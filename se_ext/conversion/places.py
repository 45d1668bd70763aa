"""Where an SE block goes in a network that has none, found in the graphs of its modules' forwards.

    residual block           a sum of a branch with convolutions and of the branch's input or a projection of it
    inverted residual block  the same with a depthwise convolution that is wider than the block's output
    separable convolution    a depthwise convolution and a dense one behind it
    concatenation            a forward that ends in one: Inception and Fire modules, dense blocks
    branch beside its input  a forward that ends in a concatenation of these two: shuffle units
    convolution              with the norm and the activation behind it; where a network has none of the above

A unit inside another one is the one that counts: of nested residual blocks the inner ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .._known import SE_BLOCKS
from .._names import function_name
from .blocks import block_in
from .neighbours import SUMS
from .steps import is_known_drop_path
from .trace import NotTraceable, is_chain, trace

PLACEMENTS = ("standard", "pre", "post", "identity")

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_NORMS = (_BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{dims}d") for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax") for dims in (1, 2, 3)
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_VIEWS = (
    *("view", "reshape", "transpose", "contiguous", "flatten", "unflatten"),
    *(torch.transpose, torch.reshape, torch.flatten),
)
_SPLITS = ("split", "chunk", torch.split, torch.chunk)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
# Classes that rescale channels, and are no SE block by their structure.
_GATES = (
    *("squeezeexcitation", "squeezeexcite", "semodule", "selayer", "seblock", "effectivesemodule", "ecamodule"),
    *("cecamodule", "gatherexcite", "scsemodule", "cbammodule", "lightcbammodule", "channelattn", "globalcontext"),
)
# A module with more modules inside is no SE block.
_MOST_MODULES = 16


class Place(NamedTuple):
    """One place for an SE block."""

    path: str
    """of the unit in the model: the residual block, or the last module of a stage"""
    kind: str
    holder: str
    """path of the module in whose graph the nodes are"""
    graph: fx.Graph
    """of the holder's forward, its chains inlined"""
    inlined: tuple[str, ...]
    """paths, in the holder, of these chains"""
    node: fx.Node
    """whose output the SE block takes"""
    users: tuple[fx.Node, ...]
    """which take the SE block's output in its place"""
    channels: int
    dims: int
    """spatial dims of the map"""
    like: nn.Module
    """a convolution nearby, whose device and dtype the SE block gets"""


class Missed(NamedTuple):
    """A place that gets no SE block."""

    path: str
    kind: str
    channels: int | None
    reason: str


def find(model: nn.Module, placement: str) -> tuple[list[Place], list[Missed], list[Missed]]:
    """All places of a model, in its order; those that were found and cannot be used; modules that could not be read."""
    unread: list[Missed] = []
    readers = list(_readers(model, unread))
    with_units: set[str] = set()
    units: dict[str, list[_Unit]] = {}
    for reader in reversed(readers):  # children before their parents
        units[reader.path] = [u for u in reader.units() if not any(p in with_units for p in reader.paths(u.inside))]
        if units[reader.path]:
            with_units.update(_with_parents(reader.path))
    inside = {path for reader in readers for unit in units[reader.path] for path in reader.paths(unit.inside)}
    for reader in readers:
        if not inside.intersection(_with_parents(reader.path)):
            taken = {node for unit in units[reader.path] for node in unit.inside}
            units[reader.path] += reader.separable_convolutions(taken)
    if not any(units.values()):
        units = {reader.path: list(reader.convolutions_with_activations()) for reader in readers}
        in_gates = {m for gate in model.modules() if is_gate(gate) for m in gate.modules()}
        convolutions = sum(isinstance(m, _CONVS) and m not in in_gates for m in model.modules())
        if 2 * sum(map(len, units.values())) < convolutions:  # the parts that could be read are not what the network is
            units = {}
    results = [r.place(unit, placement, len(units[r.path]) == 1) for r in readers for unit in units.get(r.path, ())]
    places = [result for result in results if isinstance(result, Place)]
    missed = [result for result in results if isinstance(result, Missed)]
    return places, missed, unread


def _with_parents(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names) + 1)]


def _readers(model: nn.Module, unread: list[Missed]) -> Iterator[Reader]:
    """One for each module with a graph, but chains that are a part of another's graph."""
    inlined: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inlined or not any(isinstance(m, _CONVS) for m in module.modules()) or isinstance(module, _CONVS):
            continue
        if type(module).forward is nn.Module.forward or is_gate(module):  # ModuleList, ModuleDict
            continue
        try:
            reader = Reader(path, module)
        except NotTraceable as reason:
            unread.append(Missed(path, type(module).__name__, None, str(reason)))
            continue
        inlined.update(module.get_submodule(name) for name in reader.inlined)
        yield reader


def is_gate(module: nn.Module | None) -> bool:
    """Whether the module is an SE block, or called one."""
    if module is None:
        return False
    if type(module) in SE_BLOCKS:
        return True
    if type(module).__name__.lower() in _GATES:
        return True
    if type(module).__module__.startswith("torch.nn.") or len(list(module.modules())) > _MOST_MODULES:
        return False
    try:
        chains = [path for path, m in module.named_modules() if path and is_chain(m)]
        return block_in(module, trace(module, chains)) is not None
    except (NotTraceable, IndexError):
        return False


@dataclass
class _Unit:
    """A unit of a graph, whatever the placement."""

    kind: str
    source: fx.Node
    """the map that comes in"""
    inside: set[fx.Node]
    """the nodes of the branch"""
    end: fx.Node
    """the last node of the branch"""
    output: fx.Node
    """the unit's"""
    shortcut: fx.Node | None = None
    """the node that is added to the branch"""
    gated: fx.Node | None = None
    """what the standard placement takes; None: end"""


class Reader:
    """The graph of one module's forward.

    Args:
        path: of the module in the model.
        module: its chains (nn.Sequential) are inlined.

    Raises:
        NotTraceable: its forward cannot be read.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.inlined: list[str] = []
        while True:
            self.graph = trace(module, self.inlined)
            leaves = [node for node in self.graph.nodes if node.op == "call_module"]
            chains = [str(node.target) for node in leaves if is_chain(self.called(node))]
            if not chains:
                break
            self.inlined += dict.fromkeys(chains)
        self.nodes: list[fx.Node] = [node for node in self.graph.nodes if node.op != "output"]
        self.output: Any = next(iter(reversed(self.graph.nodes))).args[0]

    # ---- what nodes are ----

    def called(self, node: Any) -> Any:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return None

    def convolutions(self, nodes: set[fx.Node]) -> list[nn.Module]:
        called = [m for m in map(self.called, nodes) if m is not None and not is_gate(m)]
        return [m for outer in called for m in outer.modules() if isinstance(m, _CONVS)]

    def is_activation(self, node: Any) -> bool:
        m = self.called(node)
        if m is not None:
            return type(m).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))
        if not isinstance(node, fx.Node) or len(node.all_input_nodes) != 1:
            return False
        function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
        return node.op in ("call_function", "call_method") and function_name(function) is not None

    def is_depthwise(self, node: Any) -> bool:
        m = self.called(node)
        return isinstance(m, _CONVS) and 1 < m.groups == m.in_channels == m.out_channels

    def is_dense(self, node: Any) -> bool:
        return isinstance(self.called(node), _CONVS) and not self.is_depthwise(node)

    def is_passed(self, node: fx.Node) -> bool:
        """Whether an identity or an SE block."""
        m = self.called(node)
        return m is not None and (type(m) is nn.Identity or is_gate(m))

    @staticmethod
    def is_constant(value: Any) -> bool:
        """Whether a number, or a node that depends on no input: a parameter, perhaps reshaped."""
        if not isinstance(value, fx.Node):
            return not isinstance(value, (list, tuple))
        if value.op == "placeholder":
            return False
        return value.op == "get_attr" or all(map(Reader.is_constant, value.all_input_nodes))

    def behind_skips(self, node: fx.Node) -> fx.Node:
        """The node behind which stochastic depth, dropout, identities and a layer's scale stand."""
        while True:
            m = self.called(node)
            maps = [a for a in node.args if not self.is_constant(a)]
            is_scaling = node.target in _PRODUCTS and len(node.args) == 2 and len(maps) == 1
            if not is_scaling and not (m is not None and (is_known_drop_path(m) or isinstance(m, _DROPOUTS))):
                return node
            node = maps[0]  # type: ignore[assignment]

    def with_norm_and_activation(self, node: fx.Node) -> fx.Node:
        """The last node of a convolution with its norm and activation."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            m = self.called(user)
            if not (isinstance(m, (*_NORMS, nn.Identity)) or self.is_activation(user)):
                break
            node = user
            if self.is_activation(user):
                break
        while type(self.called(node)) is nn.Identity:
            node = node.args[0]  # type: ignore[assignment]
        return node

    @staticmethod
    def ancestors(node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = [node]
        while todo:
            if (n := todo.pop()) not in found:
                found.add(n)
                todo += n.all_input_nodes
        return found

    # ---- channels ----

    def channels(self, node: Any, last: bool = False) -> int | None:
        """The channels of a node's output: its second dim, or its last one."""
        if not isinstance(node, fx.Node):
            return None
        m = self.called(node)
        if isinstance(m, _CONVS):
            return None if last else m.out_channels
        if isinstance(m, nn.Linear):
            return m.out_features if last else None
        if isinstance(m, _BATCH_NORMS):
            return None if last else m.num_features
        if m is not None and type(m).__name__ == "Permute":
            return self.channels_before(node, tuple(m.dims), last)
        if m is not None and not (
            isinstance(m, (*_NORMS, *_POOLS, *_DROPOUTS, nn.Identity))
            or self.is_activation(node)
            or is_known_drop_path(m)
        ):
            return _channels_of_output(m, last)
        if node.target in _CONCATENATIONS:
            numbers = [self.channels(part) for part in self.concatenated(node)]
            return None if last or None in numbers else sum(number for number in numbers if number is not None)
        if node.target in ("permute", torch.permute):
            dims = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
            return self.channels_before(node, tuple(dims), last)  # type: ignore[arg-type]
        if node.target is operator.getitem and (split := node.all_input_nodes[0]).target in ("chunk", torch.chunk):
            return None if last else self.channels_taken(node, tuple(u for part in split.users for u in part.users))
        if node.op == "placeholder" or node.target in (operator.getitem, *_VIEWS):
            return None if last else self.channels_taken(node, tuple(node.users))
        for argument in node.all_input_nodes:
            if (number := self.channels(argument, last)) is not None:
                return number
        return None

    def channels_before(self, node: fx.Node, dims: tuple[int, ...], last: bool) -> int | None:
        if not last and dims in ((0, 3, 1, 2), (0, 4, 1, 2, 3), (0, 2, 1)):
            return self.channels(node.args[0], True)
        if last and dims in ((0, 2, 3, 1), (0, 2, 3, 4, 1), (0, 2, 1)):
            return self.channels(node.args[0], False)
        return None

    def channels_taken(self, node: fx.Node, users: tuple[fx.Node, ...]) -> int | None:
        """The channels of a node, as far as its users tell."""
        for user in users:
            m = self.called(user)
            if isinstance(m, _CONVS):
                return m.in_channels
            if isinstance(m, _BATCH_NORMS):
                return m.num_features
            number = None
            if self.is_activation(user) or isinstance(m, (*_NORMS, *_POOLS, nn.Identity)):
                number = self.channels_taken(user, tuple(user.users))
            elif m is not None and user.args[0] in (node, [node]):  # a dense layer takes a list
                number = _channels_of_input(m)
            elif user.target in _CONCATENATIONS and user.args[0] is node:
                number = self.channels_taken(user, tuple(user.users))
            if number is not None:
                return number
        return None

    @staticmethod
    def concatenated(node: fx.Node) -> list[fx.Node]:
        parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        return list(parts) if isinstance(parts, (list, tuple)) else []

    # ---- units ----

    def units(self) -> Iterator[_Unit]:
        yield from self.residual_blocks()
        yield from self.concatenations()

    def paths(self, nodes: set[fx.Node]) -> set[str]:
        """The paths, in the model, of the modules that nodes call."""
        prefix = f"{self.path}." if self.path else ""
        return {f"{prefix}{node.target}" for node in nodes if node.op == "call_module"}

    def residual_blocks(self) -> Iterator[_Unit]:
        for node in self.nodes:
            if node.target not in SUMS or len(node.args) != 2:
                continue
            if not all(isinstance(argument, fx.Node) for argument in node.args):
                continue
            ancestors = [self.ancestors(argument) for argument in node.args]  # type: ignore[arg-type]
            common = ancestors[0] & ancestors[1]
            sources = [n for n in self.nodes if n in common]
            if not sources or sources[-1].target in _SPLITS:
                continue
            inside = [a - common for a in ancestors]
            counts = [len(self.convolutions(nodes)) for nodes in inside]
            branch = 0 if counts[0] > counts[1] else 1
            if counts[branch] == 0 or counts[1 - branch] > 1 or counts[0] == counts[1]:
                continue
            end, shortcut = node.args[branch], node.args[1 - branch]
            output = self.with_norm_and_activation(node)
            yield self.inverted(
                _Unit("residual block", sources[-1], inside[branch], end, output, shortcut)  # type: ignore[arg-type]
            )

    def inverted(self, unit: _Unit) -> _Unit:
        width = self.channels(self.behind_skips(unit.end))
        for node in self.nodes:
            is_depthwise = node in unit.inside and self.is_depthwise(node)
            if is_depthwise and width is not None and self.called(node).out_channels > width:
                unit.gated = self.with_norm_and_activation(node)
                unit.kind = "inverted residual block"
        return unit

    def concatenations(self) -> Iterator[_Unit]:
        node = output = self.output
        while isinstance(node, fx.Node) and (node.target in _VIEWS or self.is_activation(node) or self.is_passed(node)):
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.target not in _CONCATENATIONS:
            return
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts = [part for part in self.concatenated(node) if isinstance(part, fx.Node)]
        if dim != 1 or len(parts) < 2:
            return
        ancestors = [self.ancestors(part) for part in parts]
        common = set.intersection(*ancestors)
        sources = [n for n in self.nodes if n in common]
        inside = [a - common for a in ancestors]
        counts = [len(self.convolutions(nodes)) for nodes in inside]
        if not sources or not any(counts):
            return
        if len(parts) == 2 and 0 in counts:  # a shuffle unit: its input beside a branch
            branch = 0 if counts[0] else 1
            output = self.with_norm_and_activation(node)
            yield _Unit("branch beside its input", sources[-1], inside[branch], parts[branch], output)
            return
        if sources[-1].target in _SPLITS:  # each part is computed from its own channels: one mixed convolution
            return
        end = self.with_norm_and_activation(node)
        everything = set.union(*ancestors) - common
        yield _Unit("concatenation", sources[-1], everything, end, end)

    def separable_convolutions(self, taken: set[fx.Node]) -> Iterator[_Unit]:
        for node in self.nodes:
            if node in taken or not self.is_depthwise(node):
                continue
            middle = end = self.with_norm_and_activation(node)
            between = set()
            while len(end.users) == 1 and self.is_passed(user := next(iter(end.users))):
                between.add(end := user)
            dense = next(iter(end.users)) if len(end.users) == 1 else None
            if dense is None or not self.is_dense(dense):
                continue
            end = self.with_norm_and_activation(dense)
            source, before = self.expanded(node)
            unit = _Unit("separable convolution", source, {*before, node, middle, *between, dense, end}, end, end)
            if self.called(node).out_channels > self.called(dense).out_channels:
                unit.gated, unit.kind = middle, "inverted residual block"
            yield unit

    def expanded(self, depthwise: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
        """The map that a depthwise convolution is computed from, and the nodes of the convolution that widens it: where
        the module's own input is that map."""
        before: set[fx.Node] = set()
        node: Any = depthwise.args[0]
        while len(node.users) == 1 and (
            self.is_dense(node) or isinstance(self.called(node), (*_NORMS, nn.Identity)) or self.is_activation(node)
        ):
            before.add(node)
            node = node.args[0]
        is_whole = node.op == "placeholder" or is_gate(self.called(node))
        return (node, before) if is_whole else (depthwise.args[0], set())  # type: ignore[return-value]

    def convolutions_with_activations(self) -> Iterator[_Unit]:
        for node in self.nodes:
            if self.is_dense(node):
                end = self.with_norm_and_activation(node)
                if end is not node:
                    yield _Unit("convolution", node.args[0], {node, end}, end, end)  # type: ignore[arg-type]

    # ---- from a unit to a place ----

    def place(self, unit: _Unit, placement: str, is_only: bool) -> Place | Missed:
        end = self.behind_skips(unit.end)
        width = self.channels(end)
        if placement == "pre":
            node = unit.source
            if node.target in _SPLITS:
                node = next(user for user in node.users if user in unit.inside)
            users = tuple(user for user in node.users if user in unit.inside)
            channels = self.channels_taken(node, users)
        elif placement == "post":
            node, users, channels = unit.output, tuple(unit.output.users), self.channels(unit.output)
        elif placement == "identity":
            node, users = unit.shortcut or end, (unit.output,)
            channels = width
            if unit.shortcut is not None:
                users = tuple(user for user in node.users if user.target in SUMS)
        else:
            node = end if unit.gated is None else unit.gated
            users, channels = tuple(node.users), self.channels(node)
        path = self.path
        if not is_only or is_chain(self.module) or not self.path:
            last = unit.end if unit.gated is None else unit.gated
            if last.op == "call_module" and unit.shortcut is None:
                path = f"{self.path}.{last.target}" if self.path else str(last.target)
        convolutions = [m for n in self.nodes if n in unit.inside for m in self.convolutions({n})]
        if placement == "identity" and unit.shortcut is None:
            return Missed(path, unit.kind, channels, "has no shortcut that is added")
        if self.has_gate(unit, placement):
            return Missed(path, unit.kind, channels, "has an SE block already")
        if channels is None:
            return Missed(path, unit.kind, None, "the number of its channels cannot be told from its layers")
        if placement == "pre" and any(getattr(self.called(user), "inplace", False) for user in users):
            return Missed(path, unit.kind, channels, "its first layer writes into the map that the shortcut reads")
        dims = _CONVS.index(next(cls for cls in _CONVS if isinstance(convolutions[0], cls))) + 1
        return Place(
            path, unit.kind, self.path, self.graph, tuple(self.inlined), node, users, channels, dims, convolutions[-1]
        )

    def has_gate(self, unit: _Unit, placement: str) -> bool:
        around = {unit.output, unit.end, *unit.inside, *unit.output.users, *unit.end.users}
        if unit.shortcut is not None:
            around.add(unit.shortcut)
        if placement == "pre":
            around.add(unit.source)  # elsewhere it may be the block of the unit before
        return any(m is not None and any(is_gate(c) for c in m.modules()) for m in map(self.called, around))


def _channels_of_output(module: nn.Module, last: bool) -> int | None:
    try:
        reader = Reader("", module)
    except NotTraceable:
        return None
    return reader.channels(reader.output, last)


def _channels_of_input(module: nn.Module) -> int | None:
    try:
        reader = Reader("", module)
    except NotTraceable:
        return None
    return reader.channels_taken(reader.nodes[0], tuple(reader.nodes[0].users))
