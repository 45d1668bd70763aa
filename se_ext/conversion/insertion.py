"""insert_se: SE blocks in a network that has none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import fx, nn

from ..modules import SqueezeExcitation
from .convert import check_convertible, convert
from .fused_class import is_converted, restore
from .inserted_class import Inserted, behind, insert_in_forward
from .neighbours import recipe_of
from .places import PLACEMENTS, Missed, Place, find, is_gate
from .report import Row, table
from .trace import NotTraceable, names_read, trace

Where = Callable[[str, nn.Module], bool]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
STARTS = ("plain", "paper")


@dataclass
class InsertionReport:
    """What `insert_se` did. Prints as a table.

    Attributes:
        inserted: a Row for each new SE block: the path of the unit that got it (a residual block, a stage's last
            module), the kind of unit, the channels and the squeezed width, and the path of the block.
        skipped: a Row for each place that got none, with the reason.
        parameters: the number of new parameters.
    """

    inserted: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    parameters: int = 0
    message: str = ""

    def __str__(self) -> str:
        parts = [self.message] if self.message else []
        if self.inserted:
            parts.append(table("SE block", self.inserted))
        if self.skipped:
            parts.append(table("no SE block", self.skipped))
        parts.append(f"{len(self.inserted)} SE blocks with {self.parameters:,} parameters")
        return "\n\n".join(parts)


def insert_se(
    model: nn.Module,
    reduction: float = 16,
    *,
    placement: str = "standard",
    min_channels: int = 32,
    where: Where | None = None,
    optimizers: Optimizers | None = None,
    start: str = "plain",
) -> InsertionReport:
    """Puts SE blocks into a CNN that has none: in place, on the network's own layers, fused with its neighbours.

    Where a block goes, by the kind of unit that the network is made of:

    - residual block (ResNet, ResNeXt, Wide ResNet, ConvNeXt, Inception-ResNet, …): by `placement`, below.
    - inverted residual block (MobileNetV2, MnasNet), with a shortcut or without: behind the depthwise convolution and
      its activation, where MobileNetV3 has it.
    - separable convolution (MobileNet): behind its second convolution, with norm and activation.
    - a forward that ends in a concatenation (Inception, GoogLeNet, SqueezeNet; the dense blocks of DenseNet): behind
      the concatenation. Where that is one branch beside the module's own input (ShuffleNetV2): behind the branch.
    - in a network with none of these (VGG, AlexNet, any nn.Sequential): behind each convolution, with its norm and
      activation.

    Placements, for a unit F with the shortcut x:

        standard    x + SE(F(x))     at the end of the branch, before layer scale and stochastic depth
        pre         x + F(SE(x))
        post        SE(x + F(x))     behind the activation that follows the sum
        identity    SE(x) + F(x)     on the shortcut, behind its projection

    "pre" and "post" stand before and behind the unit where it has no shortcut that is added; "identity" has no place
    there.

    The network computes what it did: each new block's gate, 2 · sigmoid, is exactly 1, because the layer in front of it
    starts at zero, and training goes on from there. (A sigmoid that is 1 to within rounding has no slope left to train
    with.) Existing parameters and buffers, and their keys, stay as they are. A new block is a child `se` of the module
    that calls it. A network that was saved before loads with `strict=False`. A second call changes nothing.

    Args:
        model: a network, in any mode, on any device. It must not be compiled or scripted yet.
        reduction: C / M, the channels of a map by the squeezed width; M is rounded, and at least 1.
        placement: "standard", "pre", "post" or "identity".
        min_channels: maps of fewer channels get no block.
        where: path, module → whether this unit gets a block. Of a unit that is a module (a residual block) these are
            its own, of another its last layer's.
        optimizers: one or more that train the model already. The new weights join the group of a convolution of their
            unit, the new biases that of a vector of their unit (a batch norm's weight); where none has these, the
            last group of the first optimizer.
        start: "plain": as above; "paper": a sigmoid and the usual random initialisation, which halves what a block
            takes, more or less.

    Returns:
        A report, which prints as a table; its `inserted` and `skipped` are lists of rows.

    Raises:
        TypeError: model is no nn.Module, or one that was scripted, compiled or traced.
        ValueError: no place was found; another placement or start; a reduction, or min_channels, that is not positive.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks" (journal version), section 3.3 and figures 2 and 3
    (units), section 6.5 and figure 7 (placements). Howard et al. 2019, "Searching for MobileNetV3", section 5.3.

    Example:
        >>> import torch, se_ext
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 128, 3), torch.nn.ReLU()
        ... )
        >>> x = torch.randn(2, 3, 8, 8)
        >>> before = network(x)
        >>> print(se_ext.insert_se(network))
        path  class        shape    SE block
        1     convolution  64 → 4   1.se
        3     convolution  128 → 8  se
        <BLANKLINE>
        2 SE blocks with 2,764 parameters
        >>> torch.equal(network(x), before)
        True
    """
    check_convertible("insert_se", model)
    _check_arguments(reduction, placement, start)
    narrowest = _whole_number("min_channels", min_channels)
    to_update = _optimizers(optimizers)
    places, missed, unread = find(model, placement)
    report = InsertionReport(skipped=[Row(m.path, m.kind, str(m.channels or ""), m.reason) for m in missed])
    if not places:
        return _nothing_found(model, placement, report, missed, unread)
    chosen = []
    for place in places:
        if place.channels < narrowest:
            reason = f"fewer channels than min_channels={narrowest}"
        elif where is not None and not where(place.path, model.get_submodule(place.path)):
            reason = "where said no"
        else:
            chosen.append(place)
            continue
        report.skipped.append(Row(place.path, place.kind, str(place.channels), reason))
    touched = _Insertion(model, reduction, start, report).insert(chosen, to_update)
    if touched:
        convert(model, where=lambda path, module: path in touched)
    return report


# ---- arguments ----


def _check_arguments(reduction: Any, placement: Any, start: Any) -> None:
    if isinstance(reduction, bool) or not isinstance(reduction, (int, float)) or not reduction > 0:
        raise ValueError(f"insert_se: expected reduction to be a positive number, got {reduction!r}")
    for name, value, known in (("placement", placement, PLACEMENTS), ("start", start, STARTS)):
        if value not in known:
            raise ValueError(f"insert_se: expected {name} to be one of {', '.join(known)}, got {value!r}")


def _whole_number(argument: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"insert_se: expected {argument} to be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"insert_se: expected {argument} to be at least 1, got {number}")
    return number


def _optimizers(optimizers: Any) -> list[torch.optim.Optimizer]:
    found = [] if optimizers is None else [optimizers] if not isinstance(optimizers, (list, tuple)) else [*optimizers]
    for optimizer in found:
        if not isinstance(optimizer, torch.optim.Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"insert_se: expected optimizers to be a torch.optim.Optimizer or several, got {kind}")
    return found


def _nothing_found(
    model: nn.Module, placement: str, report: InsertionReport, missed: Iterable[Missed], unread: Iterable[Missed]
) -> InsertionReport:
    reasons = list(dict.fromkeys(m.reason for m in missed))
    if "has an SE block already" in reasons:
        report.message = "insert_se: every place has an SE block already; nothing was changed"
        return report
    if any(is_gate(m) for m in model.modules()):
        report.message = "insert_se: the network has SE blocks, and no other place for one; nothing was changed"
        return report
    expected = "a CNN of residual blocks, separable convolutions, concatenated branches or plain convolutions"
    if reasons:
        why = f"; with placement={placement!r} each of its units {' or '.join(reasons)}"
    else:
        could_not = [f"{m.path or 'the model'} ({m.kind}): {m.reason}" for m in unread]
        why = f"; not read: {', '.join(could_not[:4])}" if could_not else ""
    raise ValueError(f"insert_se: expected {expected}, got a {type(model).__name__} with no place for an SE block{why}")


# ---- the insertion ----


class _Insertion:
    def __init__(self, model: nn.Module, reduction: float, start: str, report: InsertionReport) -> None:
        self.model, self.reduction, self.start, self.report = model, reduction, start, report
        self.touched: set[str] = set()
        """paths of modules whose forward calls a new block, and of those around them"""

    def insert(self, places: list[Place], optimizers: list[torch.optim.Optimizer]) -> set[str]:
        for place in places:
            self.unfuse(place.holder)
        in_graphs: dict[str, _Forward] = {}
        for place in places:
            block = self.block(place)
            name = self.fill_slot(place, block) or self.put_in_chain(place, block)
            if name is None:
                if place.holder not in in_graphs:
                    in_graphs[place.holder] = _Forward(self.model.get_submodule(place.holder), place)
                name = _join(place.holder, in_graphs[place.holder].call_block(place, block))
            _add_to_optimizers(block, self.unit_modules(place), optimizers)
            self.report.inserted.append(Row(place.path, place.kind, _shape(block), name))
            self.report.parameters += sum(p.numel() for p in block.parameters())
        for forward in in_graphs.values():
            forward.set()
        return self.touched

    def unfuse(self, path: str) -> None:
        """Takes away the conversion of a module and of those around it, which are converted again at the end."""
        names = path.split(".") if path else []
        for count in range(len(names) + 1):
            outer = ".".join(names[:count])
            module = self.model.get_submodule(outer)
            if is_converted(module):
                restore(module)
                self.touched.add(outer)
        self.touched.add(path)

    def block(self, place: Place) -> SqueezeExcitation:
        gate = "double_sigmoid" if self.start == "plain" else "sigmoid"
        width = max(1, round(place.channels / self.reduction))
        dims = 1 if place.dims == 1 else None  # of other maps the number of dims says what they are
        block = SqueezeExcitation(place.channels, width, scale_activation=gate, dims=dims)
        if self.start == "plain":
            nn.init.zeros_(block.fc2.weight)
            assert block.fc2.bias is not None
            nn.init.zeros_(block.fc2.bias)
        weight = next(place.like.parameters())
        block.train(self.model.get_submodule(place.holder).training)
        return block.to(weight.device, weight.dtype if weight.is_floating_point() else None)

    def unit_modules(self, place: Place) -> Iterable[nn.Module]:
        return (place.like, *self.model.get_submodule(place.holder).modules())

    def fill_slot(self, place: Place, block: SqueezeExcitation) -> str | None:
        """Puts the block where the forward itself has a place for one: timm's blocks have an attribute `se`, None or an
        nn.Identity."""
        holder = self.model.get_submodule(place.holder)
        slot = getattr(holder, "se", block)
        if isinstance(holder, Inserted) or "se" not in names_read(type(holder)):
            return None
        if slot is not None and type(slot) is not nn.Identity:
            return None
        holder.se = block
        try:
            nodes = [n for n in trace(holder, place.inlined).nodes if n.op == "call_module" and n.target == "se"]
        except NotTraceable:
            nodes = []
        if len(nodes) == 1:
            node: Any = nodes[0].args[0]
            while node.op == "call_module" and type(holder.get_submodule(node.target)) is nn.Identity:
                node = node.args[0]
            if (node.op, node.target, node.name) == (place.node.op, place.node.target, place.node.name):
                return _join(place.holder, "se")
        del holder.se
        if slot is None:
            holder.__dict__["se"] = None
        else:
            holder.se = slot
        return None

    def put_in_chain(self, place: Place, block: SqueezeExcitation) -> str | None:
        """Puts the block into the nn.Sequential that holds the layer in front of it: at its end, or, so that no other
        child moves, together with that layer in an nn.Sequential of their own."""
        if place.node.op != "call_module" or set(place.users) != set(place.node.users):
            return None
        holder = self.model.get_submodule(place.holder)
        parent_path, _, name = str(place.node.target).rpartition(".")
        chain = holder.get_submodule(parent_path)
        is_sequential = type(chain).forward is nn.Sequential.forward
        if parent_path not in place.inlined and not (parent_path == "" and is_sequential):
            return None
        if not is_sequential and name == next(reversed(chain._modules)):
            return None  # the holder's graph has a node for the chain
        chain_path = _join(place.holder, parent_path)
        self.unfuse(chain_path)
        layer = chain.get_submodule(name)
        if is_sequential and name == next(reversed(chain._modules)):
            free = _free_name(chain)
            chain.add_module(free, block)
            return _join(chain_path, free)
        if is_sequential and not any(True for _ in (*layer.parameters(), *layer.buffers())):
            pair = nn.Sequential(layer)
            pair.add_module("se", block)
            chain._modules[name] = pair.train(layer.training)
            self.touched.add(_join(chain_path, name))
            return _join(chain_path, name, "se")
        free = _free_name(layer)
        if is_converted(layer):
            restore(layer)
        layer.add_module(free, block)
        insert_in_forward(layer, behind(free))
        return _join(chain_path, name, free)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _shape(block: SqueezeExcitation) -> str:
    return f"{block.fc1.in_channels} → {block.fc1.out_channels}"


def _free_name(module: nn.Module) -> str:
    if getattr(module, "se", None) is None:
        module.__dict__.pop("se", None)
        return "se"
    return next(name for number in range(2, 1000) if not hasattr(module, name := f"se_{number}"))


class _Forward:
    """The forward of a module with new blocks: its graph, in which chains are leaves, with calls of these blocks.

    The graph is that of the module without them: a forward may go through all of its children.
    """

    def __init__(self, holder: nn.Module, place: Place) -> None:
        self.holder = holder
        self.graph = trace(holder)
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.nodes = _nodes_of(place.graph, self.graph, place.inlined)

    def call_block(self, place: Place, block: SqueezeExcitation) -> str:
        """Makes the block a child that is called at its place; returns its name."""
        name = _free_name(self.holder)
        self.holder.add_module(name, block)
        source = self.nodes[place.node]
        users = sorted({self.nodes[user] for user in place.users}, key=self.order.__getitem__)
        with self.graph.inserting_before(users[0]):
            call = self.graph.call_module(name, (source,))
        for user in users:
            user.replace_input_with(source, call)
        return name

    def set(self) -> None:
        self.graph.lint()
        insert_in_forward(self.holder, recipe_of(self.graph, None))


def _nodes_of(inlined_graph: fx.Graph, graph: fx.Graph, inlined: Sequence[str]) -> dict[fx.Node, fx.Node]:
    """For each node of a graph whose chains are inlined the node of the graph in which they are leaves."""
    there: dict[fx.Node, fx.Node] = {}
    rest = list(inlined_graph.nodes)
    for node in graph.nodes:
        if node.op == "call_module" and node.target in inlined:
            while rest and rest[0].op == "call_module" and str(rest[0].target).startswith(f"{node.target}."):
                there[rest.pop(0)] = node
        elif node.op == "call_module" and str(node.target) == "":
            continue
        else:
            there[rest.pop(0)] = node
    return there


# ---- optimizers ----


def _add_to_optimizers(
    block: SqueezeExcitation, unit: Iterable[nn.Module], optimizers: list[torch.optim.Optimizer]
) -> None:
    if not optimizers:
        return
    parameters = [p for module in unit for p in module.parameters(recurse=False)]
    new = set(block.parameters())
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for parameter in block.parameters():
        is_weight = parameter is block.fc1.weight or parameter is block.fc2.weight
        alike = [p for p in parameters if (p.dim() > 1) == is_weight and p not in new]
        others = [p for p in parameters if p not in new]
        ids = [id(p) for p in (*alike, *others)]
        group = next((g for i in ids for g in groups if any(id(p) == i for p in g["params"])), None)
        if group is None:
            group = optimizers[0].param_groups[-1]
        group["params"].append(parameter)
