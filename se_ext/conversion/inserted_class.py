"""Modules with an inserted SE block in their forward: an instance gets a class that is made for it, a subclass of its
own whose forward calls the block.

Unlike a conversion (fused_class.py) it is never taken away in silence: without the block the network would compute
something else. A conversion of such a module has this class for its original.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any

from torch import Tensor, nn

from .fused_class import Recipe, _function
from .trace import names_read

BEHIND = "def forward(self, input):\n    return self.{name}(_plain_forward(self, input))\n"


class InsertedType(type):
    """The class of these classes, which says how pickle writes one: by what it was made of."""


class Inserted(metaclass=InsertedType):
    """The base of all these classes, in front of the original one."""

    _plain: type[nn.Module]
    _inserted_recipe: Recipe
    _plain_names: frozenset[str]

    def __setattr__(self, name: str, value: Any) -> None:
        """A module may take another's place. Any other change of what the original forward reads (a setting, a module
        where there was none) would not reach the forward that was made of it."""
        if name != "training" and name in self._plain_names:
            before = getattr(self, name, None)
            if before is not value and not (isinstance(before, nn.Module) and isinstance(value, nn.Module)):
                raise AttributeError(
                    f"{type(self).__name__}.{name}: insert_se made this module's forward for {_shown(before)}, got "
                    f"{_shown(value)}; set {name} before insert_se"
                )
        super().__setattr__(name, value)


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)


def insert_in_forward(module: nn.Module, recipe: Recipe) -> None:
    """Gives the module a class with the recipe's forward."""
    object.__setattr__(module, "__class__", inserted_class(type(module), recipe))  # type: ignore[arg-type]


def behind(name: str) -> Recipe:
    """The recipe of a class that calls the child `name` on what the original forward gives."""
    return Recipe(BEHIND.format(name=name), (("_plain_forward", __name__, "plain_forward"),))


def plain_forward(module: Any, input: Tensor) -> Tensor:
    """What the module computes without the inserted block."""
    return module._plain.forward(module, input)


@cache
def inserted_class(plain: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "_plain": plain,
        "_inserted_recipe": recipe,
        "_plain_names": names_read(plain) | getattr(plain, "_plain_names", frozenset()),
        "forward": _function(plain, recipe),
    }
    bases = (plain,) if issubclass(plain, Inserted) else (Inserted, plain)
    cls: Any = InsertedType(plain.__name__, bases, namespace)
    result: type[nn.Module] = cls
    return result


def _reduce(cls: Any) -> Any:
    """For pickle: a class of this file by its parts, others by name."""
    if "_inserted_recipe" in cls.__dict__:
        return inserted_class, (cls._plain, cls._inserted_recipe)
    return cls.__qualname__


copyreg.pickle(InsertedType, _reduce)
