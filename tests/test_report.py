"""`python -m se_ext`, and what import says when the library does not fit."""

from __future__ import annotations

import os
import platform
import re
import shutil
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


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package to doctor; the shared objects are links."""
    copy = tmp_path / "se_ext"
    copy.mkdir()
    for file in _loader.PACKAGE.glob("*.py"):
        shutil.copy(file, copy)
    for file in _loader.PACKAGE.glob("*.so"):
        (copy / file.name).symlink_to(file)
    return copy


def import_error(package: Path) -> str:
    """The last line that `import se_ext` prints, which must be its only ImportError."""
    done = python("-c", "import se_ext", cwd=package.parent)
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("ImportError: ")
    return last.removeprefix("ImportError: ")


def test_the_copy_works_before_it_is_doctored(package: Path) -> None:
    done = python("-c", "import se_ext; print(se_ext.__file__)", cwd=package.parent)
    assert done.stdout.strip() == str(package / "__init__.py"), done.stderr


@pytest.mark.parametrize("built", ["2.12.0", "1.2.3+cu999"])
def test_a_library_built_against_another_torch_says_so(package: Path, built: str) -> None:
    (package / "_build.py").write_text(f'TORCH_VERSION = "{built}"\n')
    # It must be caught before the library is loaded: then a mismatch is undefined symbols, or a crash.
    (package / "libse_ext.so").unlink()
    assert import_error(package) == (
        f"se_ext was built against torch {built}, but torch {torch.__version__} is running; "
        "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    )


def test_only_the_public_version_counts(package: Path) -> None:
    (package / "_build.py").write_text(f'TORCH_VERSION = "{torch.__version__.split("+")[0]}+cu130"\n')
    assert python("-c", "import se_ext", cwd=package.parent).returncode == 0


def test_a_package_that_was_never_built_says_so(package: Path) -> None:
    for file in (*package.glob("*.so"), package / "_build.py"):
        file.unlink()
    assert import_error(package) == (
        f"se_ext has not been built in {package}; "
        "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    )


def test_an_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    done = python("-m", "se_ext", cwd=_loader.PACKAGE.parent, SE_EXT_CPU_ISA="avx1024")
    assert done.returncode == 1
    assert re.search(r'SE_EXT_CPU_ISA: expected one of baseline.*, got "avx1024"', done.stderr)
