"""What is to be done to modules of torch that se_ext does not import itself: their import would cost every program
milliseconds to seconds, and where there is a GPU that of Triton."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _Finder:
    """Finds one module as Python does, and calls `then` with it once it is loaded."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            self.then(module)

        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Calls `then` with the module of that name: now if it is imported already, else (and at each reload) once it is.
    A call for the same module twice (se_ext reloaded) must do no harm."""
    if name in sys.modules:
        then(sys.modules[name])
    sys.meta_path.insert(0, _Finder(name, then))
