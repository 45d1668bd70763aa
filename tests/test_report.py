"""`python -m se_ext`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import se_ext
from se_ext import _C, _build, _loader

pytestmark = pytest.mark.cpu_only


def python(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SE_EXT_CPU_ISA")} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def printed_report(**environment: str) -> dict[str, str]:
    done = python("-m", "se_ext", cwd=_loader.PACKAGE.parent, **environment)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines()]
    assert all(len(row) == 2 for row in rows), done.stdout
    return dict(rows)


def test_every_promised_line_is_printed() -> None:
    rows = printed_report(OMP_NUM_THREADS="2")
    assert list(rows) == [
        "se_ext",
        "torch",
        "Python",
        "compiler",
        "CPU",
        "caches",
        "threads",
        "OpenMP runtime",
        "CUDA kernels",
    ]
    assert rows["se_ext"] == se_ext.__version__
    assert rows["torch"] == f"{torch.__version__} (built against {_build.TORCH_VERSION})"
    assert rows["Python"] == platform.python_version()
    assert rows["compiler"] == _C.compiler()
    assert re.fullmatch(r"(GCC|clang) \d+\..*", rows["compiler"])
    known = ", ".join(_C.cpu_capabilities())
    assert rows["CPU"] == f"{platform.machine()}, {_C.cpu_capabilities()[-1]} kernels (of {known})"
    assert rows["threads"] == "2"
    assert Path(rows["OpenMP runtime"]).exists()
    assert re.match(r"lib(gomp|omp|iomp5)", Path(rows["OpenMP runtime"]).name)
    assert rows["CUDA kernels"].startswith("none in this build")


def test_the_instruction_set_in_use_is_printed() -> None:
    assert (
        f", baseline kernels (of {', '.join(_C.cpu_capabilities())})"
        in printed_report(SE_EXT_CPU_ISA="baseline")["CPU"]
    )


def test_the_version_built_against_is_that_of_the_headers() -> None:
    assert _C.torch_version() == _build.TORCH_VERSION.split("+")[0]


def test_an_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    done = python("-m", "se_ext", cwd=_loader.PACKAGE.parent, SE_EXT_CPU_ISA="avx1024")
    assert done.returncode == 1
    assert re.search(r'SE_EXT_CPU_ISA: expected one of baseline.*, got "avx1024"', done.stderr)
