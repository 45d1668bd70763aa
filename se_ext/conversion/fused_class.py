"""Converted modules: an instance gets a class that is made for it, a subclass of its own with another forward.

So the module stays the object that it was, with its parameters, hooks and place in the network, and isinstance holds.
(torch.nn.utils.parametrize and FSDP change instances in the same way.) The class is described by a Recipe, which is
data: a pickled module brings it along.
"""

from __future__ import annotations

import copyreg
import importlib
import linecache
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._known import BATCH_NORMS, CONVOLUTIONS, SE_BLOCKS, Layers, padding_rule
from .blocks import Block
from .trace import names_read


class Recipe(NamedTuple):
    """What makes a converted class of an original one."""

    source: str
    """of the function `forward(self, …)`"""
    imports: tuple[tuple[str, str, str], ...]
    """the global names in it: name, module, qualified name there (empty: the module itself)"""
    block: Block | None = None
    """of an SE block"""
    is_norm: bool = False
    """whether it is a batch norm with an activation inside"""
    is_convolution: bool = False
    """whether it is a depthwise convolution"""
    script: str | None = None
    """of the function that torch.jit.script compiles; None: the original's forward"""


# What blocks.Block.script_of names.
_SCRIPT_IMPORTS = (("Tensor", "torch", "Tensor"), ("_se_ext_squeeze_excite", "se_ext.functional", "squeeze_excite"))


class Converted:
    """The base of all converted classes, in front of the original one."""

    _original: type[nn.Module]
    _recipe: Recipe
    _names_read: frozenset[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """type(module)(…), as in a slice of a Sequential, makes an ordinary module: the recipe is another's."""
        restore(self)
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        """A module, parameter or buffer in another's place is what the forwards expect, which look each up at the call.
        Any other change of what forward reads takes the conversion away."""
        if name != "training" and name in self._names_read:
            before = getattr(self, name, None)
            if before is not value and not self._is_in_its_place(name, before, value):
                restore(self)
                setattr(self, name, value)
                return
        super().__setattr__(name, value)

    def _is_in_its_place(self, name: str, before: Any, value: Any) -> bool:
        for kind in (nn.Module, nn.Parameter):
            if isinstance(before, kind):
                return isinstance(value, kind)
        return name in self.__dict__["_buffers"] and isinstance(before, Tensor) and isinstance(value, Tensor)

    def __delattr__(self, name: str) -> None:
        restore(self)
        delattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For deepcopy and pickle, which find no class of this name."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        if function is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return (_new, (self._original, self._recipe), *state)
        return (function, arguments, *state)

    def __prepare_scriptable__(self) -> Converted:
        """For torch.jit.script, which puts what this gives into the network: the module itself, with a class whose
        forward names what is to be compiled."""
        block = self._recipe.block
        if block is not None:
            recipe = self._recipe._replace(script=block.script_of(self))
            object.__setattr__(self, "__class__", _class(self._original, recipe))  # type: ignore[arg-type]
        return self


def convert_instance(module: nn.Module, recipe: Recipe) -> None:
    object.__setattr__(module, "__class__", _class(type(module), recipe))  # type: ignore[arg-type]


def restore(module: Any) -> None:
    """Gives a converted module its own class back."""
    object.__setattr__(module, "__class__", module._original)


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Converted)


def _new(original: type[nn.Module], recipe: Recipe) -> nn.Module:
    cls = _class(original, recipe)  # type: ignore[arg-type]
    return cls.__new__(cls)


@cache
def _class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_original": original,
        "_recipe": recipe,
        "_names_read": names_read(original),
        "forward": _function(original, recipe),
    }
    cls = type(original.__name__, (Converted, original), namespace)
    if recipe.block is not None:
        SE_BLOCKS[cls] = _layers_in_a_tail
    if recipe.is_norm:
        BATCH_NORMS.add(cls)
    if recipe.is_convolution:
        CONVOLUTIONS[cls] = padding_rule(original)
    return cls


def _layers_in_a_tail(se: Any) -> Layers | None:
    block = se._recipe.block
    return None if block.channels_last or block.adds_input else block.layers_of(se)


def _function(original: type[nn.Module], recipe: Recipe) -> Callable[[Any, Tensor], Tensor]:
    """forward. Like any wrapper it names what it stands for. torch.jit.script compiles that, and looks up its globals
    in forward's own. (`__name__` is not among them: torch.compile takes the globals of a module from the module.)"""
    theirs = getattr(original.forward, "__globals__", {})
    names: dict[str, Any] = {name: value for name, value in theirs.items() if not name.startswith("__")}
    for name, module, qualified_name in (*recipe.imports, *_SCRIPT_IMPORTS):
        value: Any = importlib.import_module(module)
        for part in filter(None, qualified_name.split(".")):
            value = getattr(value, part)
        names[name] = value
    wrapped = original.forward if recipe.script is None else _run(recipe.script, names, original)
    function = _run(recipe.source, names, original)
    function.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return function


def _run(source: str, names: dict[str, Any], original: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    """The function `forward` of a source."""
    file = f"<se_ext: forward of {original.__module__}.{original.__qualname__} {zlib.crc32(source.encode()):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks and torch.jit.script
    exec(compile(source, file, "exec"), names)
    function: Callable[[Any, Tensor], Tensor] = names["forward"]
    return function
