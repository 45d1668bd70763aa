"""The neighbours that are fused in a container: in the graph of its forward, each batch norm or SE block with what
stands before and behind it becomes one step (steps.py).

    [[convolution →] batch norm →] [activation →] SE block [→ stochastic depth] [→ + shortcut] [→ activation]
    [convolution →] batch norm [→ stochastic depth] [→ + shortcut] [→ activation]
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._known import BATCH_NORMS, is_convolution, known_activation
from .._names import ACTIVATIONS, function_name
from . import steps
from .fused_class import Recipe
from .trace import NotTraceable, is_chain, original_class, trace

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
# timm's batch norm with an activation inside
NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")


@dataclass
class Match:
    """One step, and the nodes of the graph that it takes the place of, in order."""

    nodes: list[fx.Node]
    input: Any
    conv: str | None = None
    bn: str | None = None
    pre: Any = None
    se: str | None = None
    drop_path: str | None = None
    residual: fx.Node | None = None
    post: Any = None
    identities: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            self.bn,
            self.pre,
            self.se,
            self.drop_path,
            "+ shortcut" if self.residual is not None else None,
            self.post,
        ]
        return " → ".join(part.removeprefix("@") for part in parts if part is not None)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm whose formula the kernels have, perhaps with a known activation inside."""
    cls = original_class(module)
    if cls in BATCH_NORMS:
        return True
    return is_norm_act(module) and steps.own_activation(module) is not None


def is_norm_act(module: nn.Module) -> bool:
    cls = original_class(module)
    return (cls.__module__, cls.__qualname__) == NORM_ACT


class Container:
    """A module whose forward is read for neighbours to fuse.

    Args:
        module: the container.
        is_block: whether a module is an SE block, converted or about to be.

    Raises:
        NotTraceable: its forward cannot be read.
    """

    def __init__(self, module: nn.Module, is_block: Callable[[nn.Module], bool]) -> None:
        self.module = module
        self.is_block = is_block
        self.inlined: list[str] = []
        self.steps: dict[Any, fx.Node] = {}  # for the last node of each match that became a step: the step
        while True:
            self.graph = trace(module, self.inlined)
            wanted = self.wanted_chains()
            if not wanted:
                break
            self.inlined += wanted

    # ---- the graph ----

    def called(self, node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return None

    @staticmethod
    def only_user(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def activation(self, node: fx.Node | None) -> Any:
        """An activation's node as "@" and the path of its module, or as a name; None if the node is no activation."""
        if node is None:
            return None
        m = self.called(node)
        if m is not None:
            return f"@{node.target}" if type(m) is not nn.Identity and known_activation(m) is not None else None
        if node.op not in ("call_function", "call_method") or len(node.args) != 1:
            return None
        function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
        name = function_name(function)
        return name if name in ACTIVATIONS and name != "identity" and node.kwargs.keys() <= {"inplace"} else None

    def wanted_chains(self) -> list[str]:
        """Paths of chains (nn.Sequential, …) that end in what an SE block or a sum behind them would take."""
        wanted = []
        for node in self.graph.nodes:
            m = self.called(node)
            if m is not None and is_chain(m) and any(self.is_block(child) for child in m.children()):
                before = self.called(node.args[0])
                if before is not None and is_norm(before):  # behind it an activation and a block (insert_se)
                    wanted.append(str(node.target))
                continue
            if m is not None and self.is_block(m):
                candidates = [node.args[0]]
            elif node.target in SUMS and len(node.args) == 2:
                candidates = list(node.args)
            else:
                continue
            for candidate in candidates:
                source = self.behind_skips(candidate)
                child = self.called(source)
                if child is None or len(source.users) != 1:
                    continue
                if is_norm(child) or self.is_block(child):
                    break
                if is_chain(child) and self.ends_in_norm(child):
                    wanted.append(str(source.target))
                    break
        return list(dict.fromkeys(wanted))

    def behind_skips(self, node: Any) -> Any:
        while (m := self.called(node)) is not None and (type(m) is nn.Identity or steps.is_known_drop_path(m)):
            node = node.args[0]
        return node

    def ends_in_norm(self, chain: nn.Module) -> bool:
        children = [m for m in chain.children() if type(m) is not nn.Identity]
        while children and known_activation(children[-1]) is not None:
            children.pop()
        if not children:
            return False
        last = children[-1]
        return is_norm(last) or self.is_block(last) or (is_chain(last) and self.ends_in_norm(last))

    # ---- matches ----

    def matches(self) -> list[Match]:
        """What there is to fuse, in the order of the graph."""
        taken: set[fx.Node] = set()
        found = []
        blocks = [node for node in self.graph.nodes if (m := self.called(node)) is not None and self.is_block(m)]
        norms = [node for node in self.graph.nodes if (m := self.called(node)) is not None and is_norm(m)]
        for node in (*blocks, *norms):
            if node in taken or len(node.args) != 1 or node.kwargs:
                continue
            match = self.behind(node, self.before_block(node) if node in blocks else self.only_norm(node), taken)
            taken.update(match.nodes)
            found.append(match)
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        ends = {match.nodes[-1] for match in found}
        for match in found:
            if match.bn is not None:
                self.take_convolution(match, order, ends)
        found = [match for match in found if not self.is_call(match)]
        return sorted(found, key=lambda match: order[match.nodes[0]])

    def take_convolution(self, match: Match, order: dict[fx.Node, int], ends: set[fx.Node]) -> None:
        """Has the step call the convolution in front, where nobody else reads its output.

        The step stands where the last node of the match does, so the convolution is called later than it was. What is
        called in between must not change what the convolution reads: so either nothing is called in between, or the
        convolution reads the output of another step (one of `ends`), and nobody else does.
        """
        node = match.input
        m = self.called(node)
        if m is None or not is_convolution(m) or len(node.users) != 1 or len(node.args) != 1 or node.kwargs:
            return
        between = range(order[node] + 1, order[match.nodes[-1]])
        calls = {n for n, index in order.items() if index in between and n.op.startswith("call_")} - {*match.nodes}
        identities, _ = self.skip_back(node.args[0])
        source: Any = identities[0].args[0] if identities else node.args[0]
        if calls and (source not in ends or len(source.users) != 1):
            return
        match.conv = str(node.target)
        match.input = node.args[0]
        match.nodes.insert(0, node)

    def is_call(self, match: Match) -> bool:
        """Whether a match is the call of a module that does the same by itself."""
        if match.conv is not None or len(match.nodes) > 1:
            return False
        return match.bn is None or is_norm_act(self.module.get_submodule(match.bn))

    def only_norm(self, node: fx.Node) -> Match:
        return Match([node], node.args[0], bn=str(node.target))

    def before_block(self, node: fx.Node) -> Match:
        """The batch norm and activation in front of an SE block."""
        match = Match([node], node.args[0], se=str(node.target))
        nodes, identities = self.skip_back(node.args[0])
        source: Any = nodes[0].args[0] if nodes else node.args[0]
        act = None
        if isinstance(source, fx.Node) and len(source.users) == 1 and (act := self.activation(source)) is not None:
            more, more_identities = self.skip_back(source.args[0])
            nodes = [*more, source, *nodes]
            identities += more_identities
            source = more[0].args[0] if more else source.args[0]
        m = self.called(source)
        if m is None or len(source.users) != 1 or not is_norm(m) or len(source.args) != 1:
            return match
        if act is not None and steps.own_activation(m) != "identity":
            return match
        bn = str(source.target)
        return Match([source, *nodes, node], source.args[0], bn=bn, pre=act, se=match.se, identities=identities)

    def skip_back(self, node: Any) -> tuple[list[fx.Node], list[str]]:
        """The identities that end in node, in the graph's order, each with one user."""
        nodes: list[fx.Node] = []
        while (m := self.called(node)) is not None and type(m) is nn.Identity and len(node.users) == 1:
            nodes.insert(0, node)
            node = node.args[0]
        return nodes, [str(n.target) for n in nodes]

    def behind(self, node: fx.Node, match: Match, taken: set[fx.Node]) -> Match:
        """What follows a block or a batch norm."""
        ends_in_act = match.se is None and steps.own_activation(self.module.get_submodule(str(match.bn))) != "identity"
        passed: list[fx.Node] = []
        identities: list[str] = []

        def take(more: fx.Node) -> None:
            match.nodes += [*passed, more]
            match.identities += identities
            passed.clear()
            identities.clear()

        last = node
        while not ends_in_act and (user := self.only_user(last)) is not None and user not in taken:
            m = self.called(user)
            last = user
            if m is not None and type(m) is nn.Identity:
                passed.append(user)
                identities.append(str(user.target))
                continue
            act = self.activation(user)
            if act is not None:
                match.post = act
                take(user)
                break
            if match.residual is not None:
                break
            if m is not None and match.drop_path is None and steps.is_known_drop_path(m):
                match.drop_path = str(user.target)
                take(user)
                continue
            if user.target in SUMS and len(user.args) == 2 and not user.kwargs:
                mine = passed[-1] if passed else match.nodes[-1]
                a, b = user.args
                other = b if a is mine else a
                if isinstance(other, fx.Node) and other is not mine:
                    match.residual = other
                    take(user)
                    continue
            break
        return match

    # ---- the generated forward ----

    def recipe(self, matches: list[Match]) -> Recipe:
        """The recipe of the container's class."""
        for match in matches:
            self.replace(match)
        self.graph.lint()
        identities = tuple(dict.fromkeys(path for match in matches for path in match.identities))
        chains = tuple((path, len(self.module.get_submodule(path)._modules)) for path in self.inlined)
        size = len(self.module._modules) if is_chain(self.module) else None
        return recipe_of(self.graph, (size, identities, chains))

    def replace(self, match: Match) -> None:
        graph, last = self.graph, match.nodes[-1]

        def node_of(what: Any) -> Any:
            if isinstance(what, str) and what.startswith("@"):
                what = what[1:]
            elif what is None or what in ACTIVATIONS:
                return what
            return graph.create_node("get_attr", what)

        input, residual = (self.steps.get(node, node) for node in (match.input, match.residual))
        with graph.inserting_before(last):
            conv, bn, se, drop_path = (
                None if path is None else graph.create_node("get_attr", path)
                for path in (match.conv, match.bn, match.se, match.drop_path)
            )
            pre, post = node_of(match.pre), node_of(match.post)
            if se is None:
                step = graph.call_function(steps.batch_norm, (conv, bn, post, input, drop_path, residual))
            else:
                step = graph.call_function(steps.tail, (conv, bn, pre, se, input, drop_path, residual, post))
        last.replace_all_uses_with(step)
        self.steps[last] = step
        for node in reversed(match.nodes):
            graph.erase_node(node)


def recipe_of(graph: fx.Graph, guard: tuple[Any, Any, Any] | None) -> Recipe:
    """The recipe of a class with a graph's forward, for modules that are as steps.is_as_converted(module, *guard) says;
    others run their original forward. With no guard all modules run the graph's."""
    for node in graph.nodes:
        node.type = None  # annotations would be more names to import
    code = graph.python_code("self")
    lines = code.src.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    argument = next(node for node in graph.nodes if node.op == "placeholder")
    name = str(argument.target)
    header = (
        []
        if guard is None
        else [
            f"    if not _is_as_converted(self, *{guard!r}):",
            f"        return _original_forward(self, {name})",
        ]
    )
    names: dict[str, Any] = {
        **code.globals,
        "_is_as_converted": steps.is_as_converted,
        "_original_forward": steps.original_forward,
    }
    source = "\n".join([lines[start], *header, *lines[start + 1 :]])
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    imports = tuple((name, *_place(value)) for name, value in sorted(names.items()) if name in used)
    return Recipe(source, imports)


def _place(value: Any) -> tuple[str, str]:
    """The module and qualified name that a global of a generated forward is imported from."""
    if hasattr(value, "__spec__") and hasattr(value, "__name__") and not hasattr(value, "__qualname__"):
        return value.__name__, ""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or name is None or "<locals>" in name:
        raise NotTraceable(f"calls {value!r}")
    return module, name
