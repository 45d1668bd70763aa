"""Takes the allocator's page faults out of a comparison of kernels."""

from __future__ import annotations

import os
import sys

# glibc then serves every size from one heap and never gives memory back, so a fresh output reuses warm pages.
SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def take_page_faults_out() -> None:
    """Starts this Python program again with SETTINGS in its environment, unless they are there.

    glibc reads them at start-up only. Call it before anything heavy is imported.
    """
    if any(os.environ.get(key) != value for key, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})


def note() -> str:
    """What the settings in force mean, for the output and the results file."""
    settings = " ".join(f"{key}={value}" for key, value in SETTINGS.items())
    if all(os.environ.get(key) == value for key, value in SETTINGS.items()):
        return f"page faults taken out: {settings} (set by run.py)"
    return f"page faults included: started without {settings}"
