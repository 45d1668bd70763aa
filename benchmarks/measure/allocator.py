"""Takes the allocator's page faults, and its choice of place, out of a comparison of kernels."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# With the first two, glibc serves every size from one heap and never gives memory back, so a fresh output reuses warm
# pages. With the third it puts it where the last one was: torch asks for aligned memory, whose trimmed ends would
# otherwise wait in small-block caches, so that the hole a freed output leaves is a few bytes short for the next one,
# and outputs move between two or three places. That doubles what must fit the cache and made rows differ by 2x from
# process to process, for eager and for the clone as well.
SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
}

DEFAULT = "default"
# What a user's program can be started with. In the last, torch asks the kernel for 2 MB pages for large tensors.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "page faults out": SETTINGS,
    DEFAULT: {},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}
_PREFIXES = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_")


def environment(name: str) -> dict[str, str]:
    """This process's environment with one of ENVIRONMENTS in place of its own settings of the allocator."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_PREFIXES)}
    return {**kept, **ENVIRONMENTS[name]}


def in_environment(name: str, function: Callable[..., T], *arguments: object) -> T:
    """function(*arguments) in a fresh process with that environment: glibc and torch read theirs at start-up only."""
    before = dict(os.environ)
    wanted = environment(name)
    try:
        os.environ.clear()
        os.environ.update(wanted)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def take_page_faults_out() -> None:
    """Starts this Python program again with SETTINGS in its environment, unless they are there.

    glibc reads them at start-up only. Call it before anything heavy is imported.
    """
    if any(os.environ.get(key) != value for key, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})


def note() -> str:
    """What the settings in force mean, for the output and the results file."""
    if all(os.environ.get(key) == value for key, value in SETTINGS.items()):
        return f"page faults taken out: {spelled(SETTINGS)}"
    return f"page faults included: started without {spelled(SETTINGS)}"


def spelled(settings: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "nothing set"
