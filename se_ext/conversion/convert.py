"""convert and revert: a user's network with fused forwards, and as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .._known import SE_BLOCKS, is_called_plainly, is_depthwise
from .blocks import block_in
from .check import Checker
from .fused_class import Recipe, convert_instance, is_converted, restore
from .gates import gate_in
from .neighbours import Container, is_norm, is_norm_act
from .report import ConversionReport, Row
from .steps import depthwise_conv, norm_act, squeeze_excite
from .trace import NotTraceable, is_chain, original_class, trace
from .verify import Reference

# A module with more modules inside is no SE block.
_MOST_MODULES = 16
Where = Callable[[str, nn.Module], bool]


def convert(
    model: nn.Module, *, fuse: bool = True, where: Where | None = None, verify: bool | Tensor = False
) -> ConversionReport:
    """Makes a network's SE blocks, and their neighbours, run on the fused ops: in place, and on this network only.

    An SE block is recognised by its structure, whatever library its class is from: a global average pool, a layer (1x1
    convolution or Linear), an activation, a layer, a gate, and the product with the input. With `fuse`, every batch
    norm is fused with the activation behind it (timm's BatchNormAct2d, torchvision's Conv2dNormActivation, and a batch
    norm and an activation that a forward calls one after the other), and the SE block with the batch norm and the
    activation in front of it, and with stochastic depth, the shortcut's sum and the activation behind it. A depthwise
    convolution that the kernels compute (functional.depthwise_conv) runs on the op, on the CPU.

    The modules stay the objects that they are: their places, parameters, buffers, hooks, state_dict keys and isinstance
    do not change, and optimizers keep their parameters. Each gets a class that is derived from its own and has another
    forward. What another program attaches later (hooks, adapters, pruning) takes effect: the module is then called.
    deepcopy, pickle and torch.save keep the conversion; torch.jit.script compiles the original forwards. A second call
    changes nothing.

    Args:
        model: a network, in any mode, on any device.
        fuse: also the neighbours; else the SE blocks alone.
        where: path, module → whether to convert this module; None: all.
        verify: compare the network's outputs in evaluation, and in training its outputs and gradients, before and
            after, in float64 on copies, and revert what differs. True: on random images of the size that the network's
            `default_cfg` or `pretrained_cfg` names (else 3 x 64 x 64); or the batch to compare on.

    Returns:
        A report, which prints as a table; its `converted` and `skipped` are lists of rows.

    Raises:
        TypeError: model is no nn.Module, or one that was scripted, compiled or traced.
        ValueError: it has parameters that are not initialised yet (lazy modules).

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", section 3.

    Example:
        >>> import torch, se_ext
        >>> class SE(torch.nn.Module):
        ...     def __init__(self, c, m):
        ...         super().__init__()
        ...         self.fc1, self.fc2 = torch.nn.Linear(c, m), torch.nn.Linear(m, c)
        ...     def forward(self, x):
        ...         z = torch.relu(self.fc1(x.mean((2, 3))))
        ...         return x * torch.sigmoid(self.fc2(z))[:, :, None, None]
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SE(8, 2))
        >>> print(se_ext.convert(network))
        path  class  shape  converted
        1     SE     8 → 2  SE block
    """
    check_convertible("convert", model)
    reference = Reference(model, verify) if verify is not False else None
    report = ConversionReport()
    recipes = dict(_block_recipes(model, where, report))
    is_new = {id(model.get_submodule(path)) for path, recipe in recipes.items() if recipe.block is not None}

    def is_block(module: nn.Module) -> bool:
        return id(module) in is_new or type(module) in SE_BLOCKS

    if not recipes and not any(is_block(m) or is_converted(m) for m in model.modules()):
        report.message = "convert: found no SE block that it can convert; nothing was changed"
        return report
    inside = {id(m) for path in recipes for m in model.get_submodule(path).modules()}
    if fuse:
        recipes |= _norm_recipes(model, where, report)
        recipes |= _convolution_recipes(model, where, report)
        recipes |= _container_recipes(model, where, report, is_block, inside)
    for path, recipe in recipes.items():
        convert_instance(model.get_submodule(path), recipe)
    if not recipes and not report.skipped:
        report.message = "convert: everything is converted already"
    if reference is not None:
        reference.compare(model, report)
    return report


def revert(model: nn.Module) -> None:
    """Takes all conversions of `convert` back: every module has its own class again.

    Args:
        model: a network, converted or not.

    Example:
        >>> import torch, se_ext
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> se_ext.revert(network)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: expected model to be a torch.nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        if is_converted(module):
            restore(module)


def check_convertible(function: str, model: Any) -> None:
    """Raises where a model is in a form in which its modules' forwards do not run."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        where = f" (at {path!r})" if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{function}: expected a network that is not scripted, got a {type(module).__name__}{where}"
            )
        if isinstance(module, fx.GraphModule):
            raise TypeError(f"{function}: expected a network that is not traced, got an fx.GraphModule{where}")
        if type(module).__module__.startswith("torch._dynamo"):
            raise TypeError(
                f"{function}: expected a network that is not compiled, got a {type(module).__name__}{where}; "
                f"{function} the network first, then compile it"
            )
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{function}: expected parameters that are initialised, got a {type(module).__name__}{where} without "
                "shapes; run a batch through the network first"
            )


# ---- SE blocks ----


def _block_recipes(model: nn.Module, where: Where | None, report: ConversionReport) -> Iterator[tuple[str, Recipe]]:
    inside: set[int] = set()  # modules of blocks
    checker = Checker()
    for path, module in model.named_modules():
        if id(module) in inside or type(module) in SE_BLOCKS or not _may_be_block(module):
            continue
        try:
            recipe, shape, what = _recipe_of_block(module)
        except NotTraceable as reason:
            if _is_called_one(module):
                report.skipped.append(_row(path, module, "", str(reason)))
            continue
        inside.update(id(m) for m in module.modules())
        if where is not None and not where(path, module):
            report.skipped.append(_row(path, module, shape, "where said no"))
        elif difference := checker.difference(module, recipe):
            report.skipped.append(_row(path, module, shape, difference))
        else:
            report.converted.append(_row(path, module, shape, what + _hooks(module)))
            yield path, recipe


def _recipe_of_block(module: nn.Module) -> tuple[Recipe, str, str]:
    """The recipe of an SE block or of a relative, its shape, and what it is.

    Raises:
        NotTraceable: the module is neither.
    """
    chains = [path for path, m in module.named_modules() if path and is_chain(m)]
    graph = trace(module, chains)
    block = block_in(module, graph)
    if block is not None:
        layer: Any = module.get_submodule(block.layers[0])  # its weight may be computed anew when it is looked up
        kind = "features" if isinstance(layer, nn.Linear) else "channels"
        shape = " → ".join(str(getattr(layer, f"{side}_{kind}")) for side in ("in", "out"))
        source = "def forward(self, x):\n    return _squeeze_excite(self, x)\n"
        recipe = Recipe(source, (("_squeeze_excite", squeeze_excite.__module__, "squeeze_excite"),), block)
        return recipe, shape, "SE block"
    gate = gate_in(module, graph, chains)
    if gate is not None:
        return gate, "", "pool and product of a gate"
    raise NotTraceable("has not the structure of an SE block")


def _may_be_block(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__module__.startswith("torch.nn.modules") or is_converted(module) or is_chain(module) or is_norm_act(module):
        return False
    inside = list(itertools.islice(module.modules(), 1, _MOST_MODULES + 2))
    if not 2 <= len(inside) <= _MOST_MODULES:
        return False
    return not any(isinstance(m, (nn.Conv2d, nn.Conv3d)) and max(m.kernel_size) > 1 for m in inside)


def _is_called_one(module: nn.Module) -> bool:
    """Whether a reader of the report would ask about the module."""
    name = type(module).__name__.lower()
    return "squeeze" in name or "excit" in name or name in ("se", "selayer", "semodule", "seblock")


# ---- neighbours ----


def _norm_recipes(model: nn.Module, where: Where | None, report: ConversionReport) -> Iterator[tuple[str, Recipe]]:
    source = "def forward(self, x):\n    return _norm_act(self, x)\n"
    recipe = Recipe(source, (("_norm_act", norm_act.__module__, "norm_act"),), is_norm=True)
    for path, module in model.named_modules():
        if is_converted(module) or not is_norm_act(module):
            continue
        if "forward" in module.__dict__ or not is_norm(module):
            report.skipped.append(_row(path, module, "", "has an activation that the kernels do not compute"))
        elif where is not None and not where(path, module):
            report.skipped.append(_row(path, module, "", "where said no"))
        else:
            report.converted.append(_row(path, module, "", "batch norm → activation" + _hooks(module)))
            yield path, recipe


def _convolution_recipes(
    model: nn.Module, where: Where | None, report: ConversionReport
) -> Iterator[tuple[str, Recipe]]:
    source = "def forward(self, x):\n    return _depthwise_conv(self, x)\n"
    names = (("_depthwise_conv", depthwise_conv.__module__, "depthwise_conv"),)
    recipe = Recipe(source, names, is_convolution=True)
    for path, module in model.named_modules():
        if is_converted(module) or "forward" in module.__dict__ or not is_depthwise(module):
            continue
        shape = f"{module.in_channels} × {'×'.join(map(str, module.kernel_size))}"
        if where is not None and not where(path, module):
            report.skipped.append(_row(path, module, shape, "where said no"))
        else:
            report.converted.append(_row(path, module, shape, "depthwise convolution" + _hooks(module)))
            yield path, recipe


def _container_recipes(
    model: nn.Module,
    where: Where | None,
    report: ConversionReport,
    is_block: Callable[[nn.Module], bool],
    inside: set[int],
) -> Iterator[tuple[str, Recipe]]:
    for path, module in model.named_modules():
        if id(module) in inside or is_converted(module) or is_block(module) or is_norm_act(module):
            continue
        if not _has_neighbours(module, is_block):
            continue
        if where is not None and not where(path, module):
            report.skipped.append(_row(path, module, "", "where said no"))
            continue
        try:
            container = Container(module, is_block)
            matches = container.matches()
            if not matches:
                continue
            recipe = container.recipe(matches)
        except NotTraceable as reason:
            report.skipped.append(_row(path, module, "", str(reason)))
            continue
        report.converted.append(_row(path, module, "", ", ".join(map(str, matches)) + _hooks(module)))
        yield path, recipe


def _has_neighbours(module: nn.Module, is_block: Callable[[nn.Module], bool]) -> bool:
    """Whether a call of the module calls an SE block or a batch norm: of its own, or of a chain of its own."""
    if original_class(module).forward is nn.Module.forward:  # ModuleList, ModuleDict
        return False
    return any(
        is_block(child) or is_norm(child) or (is_chain(child) and _has_neighbours(child, is_block))
        for child in module.children()
    )


def _row(path: str, module: nn.Module, shape: str, outcome: str) -> Row:
    return Row(path, type(module).__name__, shape, outcome)


def _hooks(module: nn.Module) -> str:
    hooked = [path for path, m in module.named_modules() if path and path.count(".") == 0 and not is_called_plainly(m)]
    return f"; {', '.join(hooked)} with hooks: called" if hooked else ""
