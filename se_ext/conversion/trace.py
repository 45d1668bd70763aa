"""The graph of one module's forward: what it calls of its children, in which order, and what it does between the calls.

Children are leaves. A graph is trusted to be the whole of forward only where nothing else can happen in it: with one
argument, the same in training and in evaluation, and without side effects.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import fx, nn

# Libraries whose forwards are known to do nothing but compute. Others are read (has_side_effects).
LIBRARIES = ("torch", "torchvision", "timm", "monai", "segmentation_models_pytorch", "se_ext")
# What a graph could not say: it is made under one mode and runs under others.
_MODES = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_inference"}
# Containers that call their children one after the other, and compute nothing themselves.
_CHAINS = {("timm.layers.conv_bn_act", "ConvNormAct")}


class NotTraceable(Exception):
    """Why a graph does not say what a forward does."""


def is_chain(module: Any) -> bool:
    """Whether the module calls its children one after the other and does nothing besides."""
    cls = original_class(module)
    return cls.forward is nn.Sequential.forward or (cls.__module__, cls.__qualname__) in _CHAINS


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what a conversion made of it."""
    cls = type(module)
    original: type[nn.Module] = cls.__dict__.get("_original", cls)
    return original


def trace(module: nn.Module, inlined: Collection[str] = ()) -> fx.Graph:
    """The graph of module.forward(x).

    Args:
        module: any; its children are leaves.
        inlined: paths of chains (is_chain) whose children take their place.

    Raises:
        NotTraceable: the graph would not be the whole of forward.
    """
    cls = original_class(module)
    if "forward" in module.__dict__:
        raise NotTraceable("has a forward of its own")
    try:
        arguments = list(inspect.signature(cls.forward).parameters.values())
    except (TypeError, ValueError) as error:
        raise NotTraceable(str(error)) from error
    if len(arguments) != 2 or arguments[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise NotTraceable("forward has not exactly one argument")
    if cls.__module__.partition(".")[0] not in LIBRARIES and has_side_effects(cls):  # type: ignore[arg-type]
        raise NotTraceable("forward may have side effects")
    if asked := names_read(cls) & _MODES:
        raise NotTraceable(f"forward asks for {' and '.join(sorted(asked))}")
    opened = [module, *(module.get_submodule(path) for path in inlined)]
    before = [dict(m.__dict__) for m in opened]
    random_states = random.getstate(), torch.get_rng_state()
    classes = [type(m) for m in opened]
    try:
        for m in opened:
            object.__setattr__(m, "__class__", original_class(m))  # the graph is that of the originals
            del m.__dict__["training"]  # one graph is for both modes: a forward that asks which is refused
        graph = _Tracer(inlined).trace(module)
    except Exception as error:  # control flow that depends on values, and whatever else Python can do
        reads = "reads self.training" if "'training'" in str(error) else f"cannot be traced ({type(error).__name__})"
        raise NotTraceable(f"forward {reads}") from error
    finally:
        changed = False
        for m, state, converted in zip(opened, before, classes, strict=True):
            changed |= {**m.__dict__, "training": None}.keys() != state.keys()
            changed |= any(m.__dict__.get(name) is not value for name, value in state.items() if name != "training")
            m.__dict__.clear()
            m.__dict__.update(state)
            object.__setattr__(m, "__class__", converted)
    if changed:
        raise NotTraceable("forward sets attributes")
    if random.getstate() != random_states[0] or not torch.equal(torch.get_rng_state(), random_states[1]):
        random.setstate(random_states[0])
        torch.set_rng_state(random_states[1])
        raise NotTraceable("forward draws random numbers")
    return graph


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that what a forward does to a buffer is recorded rather than done

    def __init__(self, inlined: Collection[str]) -> None:
        super().__init__()
        self.inlined = inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inlined


@cache
def has_side_effects(cls: type[nn.Module]) -> bool:
    """Whether forward, or a method that it calls on self, does more than compute a value, as far as its source says:
    it sets attributes or items, calls something whose result it drops, or its source is not at hand."""
    return _may_change_something(cls, "forward", set())


def _may_change_something(cls: type[nn.Module], method: str, seen: set[str]) -> bool:
    seen.add(method)
    function: Callable[..., Any] | None = getattr(cls, method, None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, (ast.Global, ast.Nonlocal, ast.Yield, ast.Await, ast.With, ast.Delete)):
            return True
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            return True
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
            and inspect.isfunction(getattr(cls, node.func.attr, None))
            and node.func.attr not in seen
            and _may_change_something(cls, node.func.attr, seen)
        ):
            return True
    return False


def names_read(cls: type[nn.Module]) -> frozenset[str]:
    """The attributes of self that forward, or a method that it calls, may read."""
    names: set[str] = set()
    todo, seen = ["forward"], set()
    while todo:
        function = getattr(cls, todo.pop(), None)
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names.update(code.co_names)
        todo += [name for name in code.co_names if inspect.isfunction(getattr(cls, name, None))]
    return frozenset(names)
