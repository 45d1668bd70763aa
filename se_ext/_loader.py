"""Loads libse_ext.so, which registers the ops with torch, and says so clearly when it can't."""

from __future__ import annotations

from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
LIBRARY = PACKAGE / "libse_ext.so"
REBUILD = "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"


def check_torch_version(built: str, running: str) -> None:
    """Raises ImportError unless the library was built against the running torch (2.13.0+cpu and 2.13.0 are one)."""
    if built.split("+")[0] != running.split("+")[0]:
        raise ImportError(f"se_ext was built against torch {built}, but torch {running} is running; {REBUILD}")


def load() -> None:
    """Registers the ops; raises ImportError if the library is missing or belongs to another torch."""
    try:
        from . import _build
    except ImportError as error:
        raise ImportError(f"se_ext has not been built in {PACKAGE}; {REBUILD}") from error
    check_torch_version(_build.TORCH_VERSION, torch.__version__)
    torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
