"""What the CPU's and the CUDA part of setup.py share: how many compilers run, what is printed, and OpenMP.

MAX_JOBS in the environment is the number of compilers at a time, by default that of the CPUs; CXX the C++ compiler.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from setuptools.errors import CompileError, SetupError

PARALLEL_REGION = "void g(); void f() {\n#pragma omp parallel\n  g();\n}\n"
ENTRY_OF_A_REGION = re.compile(r"\b_*((?:GOMP_parallel|__kmpc_fork_call)\w*)")  # GCC's and clang's


def jobs() -> int:
    """How many compilers may run at a time."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return os.cpu_count() or 1
    if not re.fullmatch("[0-9]+", given) or int(given) == 0:
        raise SetupError(f'MAX_JOBS: expected a number of compilers, 1 or more, got "{given}"')
    return int(given)


@lru_cache(maxsize=1)
def pool_of(workers: int) -> ThreadPoolExecutor:
    """One pool for the CPU and the CUDA kernels, which are compiled at the same time."""
    return ThreadPoolExecutor(workers)


def compile_each(what: str, sources: Collection[str | Path], compile_one: Callable[[str | Path], object]) -> None:
    """Calls compile_one(source) for all of them, MAX_JOBS at a time, and prints how long each one took."""

    def timed(source: str | Path) -> None:
        start = time.perf_counter()
        compile_one(source)
        print(f"{source}: {time.perf_counter() - start:.0f} s\n", end="", flush=True)

    workers = jobs()
    if sources:
        print(f"se_ext: compiling the {what}, {workers} at a time: some minutes\n", end="", flush=True)
        list(pool_of(workers).map(timed, sources))


def run(command: list[str]) -> str:
    """What the command printed; CompileError, with all of that, where it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"{shlex.join(command)}\n{error}") from error
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def check_openmp(compiler: str, library: str) -> None:
    """Raises SetupError if the compiler's OpenMP needs a runtime that is not among what `library` (torch's) loads.

    The ops take their OpenMP symbols from torch's runtime. GCC's are in every runtime, clang's not in GCC's libgomp:
    the library would be built, but could not be loaded. Says nothing where it cannot find out.
    """
    entry = entry_of_a_region(compiler)
    if entry is None or any(has_symbol(place, entry) for place in (library, None)):
        return
    raise SetupError(
        f"OpenMP: the compiler {compiler} ({version_of(compiler)}) makes code that calls {entry}, which the OpenMP "
        f"runtime of torch here ({loaded_openmp()}) does not have: the library could not be imported. "
        "Build it with GCC: CXX=g++ pip install --no-build-isolation ."
    )


def entry_of_a_region(compiler: str) -> str | None:
    """The function of the runtime that the compiler calls for a parallel region; None if it does not tell."""
    command = [*shlex.split(compiler), "-fopenmp", "-S", "-x", "c++", "-o", "-", "-"]
    try:
        done = subprocess.run(command, input=PARALLEL_REGION, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = ENTRY_OF_A_REGION.search(done.stdout)
    return found[1] if found else None


def has_symbol(library: str | None, name: str) -> bool:
    """Whether the library, or one of those it loads, has the symbol; None: what every library of the process sees."""
    return hasattr(ctypes.CDLL(library), name)


def version_of(compiler: str) -> str:
    try:
        return run([*shlex.split(compiler), "--version"]).splitlines()[0]
    except (CompileError, IndexError):
        return "of unknown version"


def loaded_openmp() -> str:
    """The OpenMP runtimes in this process, by their paths, where the system tells."""
    try:
        files = re.findall(r"/\S*/lib(?:gomp|omp|iomp5)\b\S*", Path("/proc/self/maps").read_text())
    except OSError:
        files = []
    return ", ".join(dict.fromkeys(files)) or "unknown"
