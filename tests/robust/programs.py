"""Programs of this folder, which tests run in processes of their own: what ends or hangs them ends no test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TESTS

HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS, HERE))), **more}


def start(program: str, *words: str, **more: str) -> subprocess.Popen[str]:
    """`more`: of the environment."""
    return subprocess.Popen(
        [sys.executable, HERE / program, *words],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(running: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        out, error = running.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    return subprocess.CompletedProcess(running.args, running.returncode, out, error)


def run(program: str, *words: str, timeout: float, **more: str) -> subprocess.CompletedProcess[str]:
    return finish(start(program, *words, **more), timeout)


def library_to_preload(source: str, folder: Path, *flags: str) -> str:
    """Compiled from C; its path, for LD_PRELOAD."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux, glibc and a C compiler")
    library = folder / Path(source).with_suffix(".so").name
    command: list[Any] = [compiler, "-O1", "-shared", "-fPIC", "-Wall", "-Werror", *flags]
    subprocess.run([*command, "-o", library, HERE / source, "-ldl"], check=True)
    return str(library)
