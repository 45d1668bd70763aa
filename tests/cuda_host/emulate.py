"""Runs pytest with the CUDA backend, built for the host, in the place of the CPU kernels.

emulate.py [--sanitize none] tests/cuda/test_cuda_host.py …
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import build

# Memory comes filled with NaNs, so that a kernel that reads what nobody wrote is seen; an allocation that is too large
# fails as it does without the sanitizer. Python doesn't free all of its memory at the end: no leak is looked for.
ASAN_OPTIONS = {
    "detect_leaks": 0,
    "allocator_may_return_null": 1,
    "max_malloc_fill_size": (1 << 31) - 1,
    "malloc_fill_byte": 255,
}


def of_the_compiler(library: str) -> str:
    """Where the compiler has its library of that name."""
    found = subprocess.run([build.CXX, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve(strict=True))


def environment(library: Path) -> dict[str, str]:
    """Of a child process that may torch.ops.load_library(library), which it finds in SE_EXT_CUDA_HOST."""
    child = {**os.environ, "SE_EXT_CUDA_HOST": str(library)}
    if b"libasan.so" in library.read_bytes():
        # The sanitizer comes before all others, and finds __cxa_throw only in a libstdc++ that is there from the start.
        child["LD_PRELOAD"] = " ".join(of_the_compiler(name) for name in ("libasan.so", "libstdc++.so"))
        child["ASAN_OPTIONS"] = ":".join(f"{name}={value}" for name, value in ASAN_OPTIONS.items())
        child["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return child


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", choices=build.SANITIZE, default="address")
    options, arguments = parser.parse_known_args()
    child = environment(build.library(options.sanitize))
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=child, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
