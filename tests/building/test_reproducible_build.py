"""The same sources give the same source distribution and the same wheel, byte for byte, in whichever folder.

With the same compiler, torch and Python. The quick test of the wheel builds tiny sources in the place of the real ones,
with the same commands; SE_EXT_SLOW=1 builds the real ones twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

pytestmark = pytest.mark.cpu_only

# What a source may leave in an object: its path, that of a header of torch, and names that a compiler makes up.
TINY = """
namespace { struct Nameless { Nameless(); int value; } nameless; Nameless::Nameless() { value = __LINE__; } }
__attribute__((used)) static const char* file() { return __FILE__; }
"""
WITH_A_CHECK = "#include <c10/util/Exception.h>\nvoid check(bool fine) { TORCH_CHECK(fine, __FILE__); }\n"


def sources_in(folder: Path) -> Path:
    """A copy of what git holds that a build reads, new today."""
    built = shutil.ignore_patterns("*.so", "_build.py", "__pycache__", "cmake")
    folder.mkdir(parents=True)
    for name in ("csrc", "se_ext"):
        shutil.copytree(ROOT / name, folder / name, ignore=built, copy_function=shutil.copyfile)
    shutil.copytree(ROOT / "cmake", folder / "cmake")
    for file in (
        *ROOT.glob("setup*.py"),
        *(ROOT / name for name in ("pyproject.toml", "MANIFEST.in", "CMakeLists.txt")),
    ):
        shutil.copyfile(file, folder / file.name)
    for file in ("README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, folder / file)
    return folder


def run_setup(folder: Path, *command: str) -> None:
    cleared = {name: value for name, value in os.environ.items() if name not in ("SOURCE_DATE_EPOCH", "CC", "CXX")}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command, "--dist-dir", "made"],
        cwd=folder,
        env=cleared | {"FORCE_CUDA": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def twice(tmp_path: Path) -> tuple[Path, Path]:
    return sources_in(tmp_path / "a"), sources_in(tmp_path / "another" / "folder")


def made_in(folder: Path) -> Path:
    [made] = (folder / "made").iterdir()
    return made


def assert_same_wheels(one: Path, other: Path) -> None:
    """Says which file in them differs."""
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        assert first.namelist() == second.namelist()
        assert [name for name in first.namelist() if first.read(name) != second.read(name)] == []
    assert one.read_bytes() == other.read_bytes(), "times, modes or the order of files"


def test_the_source_distribution(tmp_path: Path) -> None:
    folders = twice(tmp_path)
    for age, folder in enumerate(folders):
        for file in folder.rglob("*.*"):
            os.utime(file, (1.7e9 + age, 1.7e9 + age))
            file.chmod(0o755 if file.is_dir() else (0o644, 0o600)[age])
        run_setup(folder, "sdist")
    one, other = map(made_in, folders)
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_a_wheel_of_tiny_sources(tmp_path: Path) -> None:
    folders = twice(tmp_path)
    for folder in folders:
        for source in folder.glob("csrc/**/*.cpp"):
            source.write_text(TINY)
        (folder / "csrc/ops/checks.cpp").write_text(TINY + WITH_A_CHECK)
        run_setup(folder, "bdist_wheel")
    one, other = map(made_in, folders)
    with zipfile.ZipFile(one) as wheel:
        library = wheel.read("se_ext/libse_ext.so")
    assert b"csrc/ops/checks.cpp" in library  # what the next lines look for would be there
    for place in (folders[0], Path(torch.__file__).parent):
        assert str(place).encode() not in library
    assert_same_wheels(one, other)


@pytest.mark.slow
def test_a_wheel(tmp_path: Path) -> None:
    folders = twice(tmp_path)
    for folder in folders:
        run_setup(folder, "bdist_wheel")
    assert_same_wheels(*map(made_in, folders))
