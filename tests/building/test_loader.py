"""What import says when the library does not fit, is not there, or is in the process already."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from se_ext import _loader

pytestmark = pytest.mark.cpu_only

REBUILD = "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
IMPORT = "import se_ext, torch; print(se_ext.__file__, se_ext.squeeze(torch.full((1, 1, 2, 2), 3.0)).item())"

# The environment of the tests may have a built se_ext (make puts the clone on sys.path): it is not to be found here.
ALONE = """
import pathlib, sys
sys.path = [p for p in sys.path if not pathlib.Path(p, "se_ext").exists() or pathlib.Path(p).samefile(".")]
"""


def python(code: str, *args: object, cwd: Path, path: Path | str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def import_error(done: subprocess.CompletedProcess[str]) -> str:
    """What the ImportError says that ended the process."""
    assert done.returncode == 1, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("ImportError: ")
    return last.removeprefix("ImportError: ")


def copy_package(folder: Path) -> Path:
    """A copy of the package in the folder; the shared objects are links."""
    copy = folder / "se_ext"
    copy.mkdir(parents=True)
    for file in _loader.PACKAGE.rglob("*.py"):
        to = copy / file.relative_to(_loader.PACKAGE)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(file, to)
    for file in _loader.PACKAGE.glob("*.so"):
        (copy / file.name).symlink_to(file)
    return copy


def remove_what_was_built(package: Path) -> None:
    for file in (*package.glob("*.so"), package / "_build.py"):
        file.unlink()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package to doctor."""
    return copy_package(tmp_path / "source")


@pytest.fixture(scope="module")
def other_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of another build: another file."""
    return Path(shutil.copy(_loader.LIBRARY, tmp_path_factory.mktemp("other") / "some_ops.so"))


# ---- a library that does not fit, or none ----


def test_the_copy_works_before_it_is_doctored(package: Path) -> None:
    done = python(ALONE + IMPORT, cwd=package.parent)
    assert done.stdout.split() == [str(package / "__init__.py"), "3.0"], done.stderr


@pytest.mark.parametrize("built", ["2.12.0", "1.2.3+cu999"])
def test_a_library_built_against_another_torch_says_so(package: Path, built: str) -> None:
    (package / "_build.py").write_text(f'TORCH_VERSION = "{built}"\n')
    # It must be caught before the library is loaded: then a mismatch is undefined symbols, or a crash.
    (package / "libse_ext.so").unlink()
    assert import_error(python(ALONE + IMPORT, cwd=package.parent)) == (
        f"se_ext was built against torch {built}, but torch {torch.__version__} is running; {REBUILD}"
    )


def test_only_the_public_version_counts(package: Path) -> None:
    (package / "_build.py").write_text(f'TORCH_VERSION = "{torch.__version__.split("+")[0]}+cu130"\n')
    assert python(ALONE + IMPORT, cwd=package.parent).returncode == 0


def test_a_package_that_was_never_built_says_so(package: Path) -> None:
    remove_what_was_built(package)
    assert import_error(python(ALONE + IMPORT, cwd=package.parent)) == (
        f"se_ext has not been built in {package}; {REBUILD}"
    )


# ---- a source folder that hides the installed package ----


@pytest.mark.parametrize("fault", ["not built", "built against another torch"])
def test_a_source_folder_that_hides_the_installed_package(package: Path, tmp_path: Path, fault: str) -> None:
    """Building it again would not help: the error names both folders, and another folder to start in helps."""
    installed = copy_package(tmp_path / "site")
    if fault == "not built":
        remove_what_was_built(package)
    else:
        (package / "_build.py").write_text('TORCH_VERSION = "2.9.0"\n')

    said = import_error(python(IMPORT, cwd=package.parent, path=installed.parent))
    assert said.endswith(
        f"; another copy, built in {installed}, is hidden by this one: to use that, start Python in another folder "
        f"than {package.parent}, and keep {package.parent} out of PYTHONPATH"
    )
    assert str(package) in said or "2.9.0" in said
    assert "pip install" not in said

    done = python(IMPORT, cwd=tmp_path, path=installed.parent)
    assert done.stdout.split() == [str(installed / "__init__.py"), "3.0"], done.stderr


def test_a_copy_that_was_not_built_either_is_no_way_out(package: Path, tmp_path: Path) -> None:
    other = copy_package(tmp_path / "site")
    for copy in (package, other):
        remove_what_was_built(copy)
    # And the package itself by another name is no other copy.
    (tmp_path / "link").symlink_to(package.parent)
    code = f"import sys; sys.path += [{str(other.parent)!r}, {str(tmp_path / 'link')!r}]; " + IMPORT
    assert import_error(python(ALONE + code, cwd=package.parent)) == (
        f"se_ext has not been built in {package}; {REBUILD}"
    )


# ---- a library that is in the process already ----

LOADED_BY = {
    "torch.ops.load_library": "import sys, torch; torch.ops.load_library(sys.argv[1])\n",
    "ctypes": "import ctypes, sys, torch; library = ctypes.CDLL(sys.argv[1])\n",
}


@pytest.mark.parametrize("loaded_by", LOADED_BY)
def test_another_library_with_the_same_ops_is_named(package: Path, other_library: Path, loaded_by: str) -> None:
    """torch would end the process: two libraries cannot register the same ops."""
    done = python(LOADED_BY[loaded_by] + IMPORT, other_library, cwd=package.parent)
    assert import_error(done) == (
        f"the ops of se_ext are already registered in this process, by {other_library}, so that "
        f"{package / 'libse_ext.so'} cannot be loaded; load one of them only"
    )


@pytest.mark.parametrize("loaded_by", LOADED_BY)
@pytest.mark.parametrize("through", ["the file", "a symbolic link"])
def test_the_package_s_own_library_may_be_loaded_first(tmp_path: Path, loaded_by: str, through: str) -> None:
    library = _loader.LIBRARY
    if through == "a symbolic link":
        library = tmp_path / "ops.so"
        library.symlink_to(_loader.LIBRARY)
    done = python(LOADED_BY[loaded_by] + IMPORT, library, cwd=_loader.PACKAGE.parent)
    assert done.stdout.split() == [str(_loader.PACKAGE / "__init__.py"), "3.0"], done.stderr


def test_a_library_that_cannot_be_found_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system does not tell what a process has loaded."""
    monkeypatch.setattr(torch.ops, "loaded_libraries", {"/nowhere/gone.so"})
    monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError(self)))
    assert _loader.loaded_files() == ["/nowhere/gone.so"]
    with pytest.raises(ImportError, match="already registered in this process, by another library, so that"):
        _loader.check_registered_library(_loader.loaded_files())


def test_what_adds_kernels_only_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """An implementation for another device may be registered before the ops are."""
    code = """
import torch
library = torch.library.Library("se_ext", "IMPL")
library.impl("squeeze", lambda input: input.sum((2, 3)), "PrivateUse1")
"""
    done = python(code + IMPORT, cwd=_loader.PACKAGE.parent)
    assert done.stdout.split() == [str(_loader.PACKAGE / "__init__.py"), "3.0"], done.stderr


# ---- what the import brings with it ----

NEW_MODULES = """
import sys, torch
before = set(sys.modules)
import se_ext
assert {"models", "onnx", "functional", "reference"} <= set(vars(se_ext))
print(*sorted(set(sys.modules) - before))
"""


def test_the_import_is_light() -> None:
    """Behind torch's own it brings in no module but the package's: no compiler, no exporter, no onnxscript, no timm. So
    it takes a few milliseconds, whatever is installed."""
    done = python(NEW_MODULES, cwd=_loader.PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "se_ext.onnx" in modules
    assert not {"se_ext._onnx", "se_ext.conversion"} & set(modules)
    assert [name for name in modules if name.partition(".")[0] != "se_ext"] == []
