"""Loads libse_ext.so, which registers the ops with torch, and says so clearly when it can't."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
LIBRARY = PACKAGE / "libse_ext.so"
REBUILD = "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
SCHEMA = b"squeeze_excite(Tensor input, Tensor w1"  # is in no library but one that registers the ops


def check_torch_version(built: str, running: str) -> None:
    """Raises ImportError unless the library was built against the running torch (2.13.0+cpu and 2.13.0 are one)."""
    if built.split("+")[0] != running.split("+")[0]:
        raise ImportError(f"se_ext was built against torch {built}, but torch {running} is running; {advice()}")


def load() -> None:
    """Registers the ops; raises ImportError if the library is missing or belongs to another torch, or if another one
    has registered them."""
    try:
        from . import _build  # written by setup.py; what is missing before a build is reported here
    except ImportError as error:
        raise ImportError(f"se_ext has not been built in {PACKAGE}; {advice()}") from error
    check_torch_version(_build.TORCH_VERSION, torch.__version__)
    if torch._C._jit_get_schemas_for_operator("se_ext::squeeze_excite"):
        check_registered_library(loaded_files())
    torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]


def advice() -> str:
    """To build, unless that would not help: a source folder hides the installed package from a Python started in it."""
    hidden = installed_elsewhere()
    if hidden is None:
        return REBUILD
    return (
        f"another copy, built in {hidden}, is hidden by this one: to use that, start Python in another folder than "
        f"{PACKAGE.parent}, and keep {PACKAGE.parent} out of PYTHONPATH"
    )


def installed_elsewhere() -> Path | None:
    """Another folder from which the package could be imported, were it not for this one."""
    for entry in sys.path:
        package = Path(entry or ".", "se_ext").absolute()
        if (package / "_build.py").exists() and not same_file(package, PACKAGE):
            return package
    return None


def check_registered_library(files: list[str]) -> None:
    """Raises ImportError unless LIBRARY is one of the loaded files, so that it was the one that registered the ops.

    Where a second library registers them, torch ends the process.
    """
    if any(same_file(file, LIBRARY) for file in files):
        return
    other = next((file for file in files if holds_schema(file)), "another library")
    raise ImportError(
        f"the ops of se_ext are already registered in this process, by {other}, so that {LIBRARY} cannot be loaded; "
        "load one of them only"
    )


def loaded_files() -> list[str]:
    """What torch.ops.load_library has loaded, and all code mapped into the process where the system tells."""
    files = [str(file) for file in torch.ops.loaded_libraries]
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        mappings = []
    for line in mappings:
        _, permissions, _, _, _, *path = line.split(maxsplit=5)
        if "x" in permissions:
            files += path
    return list(dict.fromkeys(files))


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether both paths lead to one file that exists."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def holds_schema(file: str) -> bool:
    """Whether the ops' schemas are in the file; torch's own libraries, which are large, are not read."""
    try:
        return Path(torch.__file__).parent not in Path(file).parents and SCHEMA in Path(file).read_bytes()
    except OSError:
        return False
