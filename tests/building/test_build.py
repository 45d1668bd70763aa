"""What builds the library: setup.py, what it says where it cannot, and the source distribution.

No test here runs a compiler for long: where one is needed it is a script that stands in for it.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from setuptools.errors import CompileError, SetupError
from torch.utils.cpp_extension import get_cxx_compiler

import setup_compile
from se_ext import _C

pytestmark = pytest.mark.cpu_only


def python(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if name not in ("MAX_JOBS", "FORCE_CUDA", "CXX", "CC")}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=cleared | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def made_up_compiler(file: Path, script: str) -> str:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


# ---- the source distribution ----


def test_the_source_distribution_holds_all_that_a_build_reads(tmp_path: Path) -> None:
    """And nothing that a build writes, which this folder is full of."""
    done = python(
        "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--formats", "tar", "--dist-dir", tmp_path
    )
    assert done.returncode == 0, done.stdout
    [archive] = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        held = {Path(*Path(member.name).parts[1:]).as_posix() for member in tar if member.isfile()}

    patterns = ("csrc/**/*", "cmake/*", "se_ext/**/*.py", "se_ext/*.pyi", "setup*.py")
    sources = [file for pattern in patterns for file in ROOT.glob(pattern)]
    wanted = {file.relative_to(ROOT).as_posix() for file in sources if file.is_file()} - {"se_ext/_build.py"}
    wanted |= {"pyproject.toml", "LICENSE", "README.md", "CMakeLists.txt", "se_ext/py.typed"}
    assert {
        "setup_cuda.py",
        "csrc/params.h",
        "csrc/cuda/kernels/cluster_forward.cu",
        "csrc/instruction_sets.txt",
    } <= wanted
    assert wanted <= held, sorted(wanted - held)
    beyond = {name for name in held - wanted if not name.startswith("se_ext.egg-info/")}
    assert beyond <= {"MANIFEST.in", "PKG-INFO", "setup.cfg"}, beyond


def test_a_wheel_holds_what_a_build_writes(tmp_path: Path) -> None:
    """The libraries, the torch version, and the package for CMake; built by a compiler that writes empty files."""
    script = 'while test $# -gt 0; do test "$1 $2" != "-o -" && test "$1" = -o && : > "$2"; shift; done; true'
    compiler = made_up_compiler(tmp_path / "made-up-compiler", script)
    done = python(
        "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "build",
        "bdist_wheel", "--skip-build", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "wheel",
        CC=compiler, CXX=compiler, FORCE_CUDA="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    [wheel] = tmp_path.glob("*.whl")
    written = {"libse_ext.so", "_C.so", "_build.py"}
    written |= {"cmake/se_ext/se_extConfig.cmake", "cmake/se_ext/se_extConfigVersion.cmake"}
    with zipfile.ZipFile(wheel) as archive:
        assert {f"se_ext/{name}" for name in written} <= set(archive.namelist())


# ---- what is missing ----

HIDE = "import sys; sys.modules.update(dict.fromkeys({missing!r})); "
ASK = "from setuptools import build_meta; build_meta.get_requires_for_build_wheel({})"


@pytest.mark.parametrize("missing", [["torch"], ["pybind11"], ["torch", "pybind11"]])
def test_a_build_without_torch_or_pybind11_says_what_to_type(missing: list[str]) -> None:
    """As pip asks, in an environment of its own, what the build needs: one message, no traceback."""
    done = python("-c", HIDE.format(missing=missing) + ASK)
    assert done.returncode == 1
    first, *_, last = done.stdout.splitlines()
    assert first == f"se_ext: no {' and no '.join(missing)} where the build looks."
    assert last.strip() == "pip install --no-build-isolation ."
    assert "the torch that it will run with" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_torch_that_is_broken_shows_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import a_library_of_torch")
    done = python("-c", ASK, PYTHONPATH=str(tmp_path))
    assert "No module named 'a_library_of_torch'" in done.stdout
    assert "--no-build-isolation" not in done.stdout


def test_a_setuptools_that_cannot_read_the_metadata_says_so() -> None:
    done = python("-c", "import setuptools; setuptools.__version__ = '69.5.1'; " + ASK)
    assert done.returncode == 1
    assert done.stdout.startswith("se_ext: setuptools 69.5.1 cannot read this pyproject.toml; 77 and newer can:\n")
    assert "Traceback" not in done.stdout


# ---- how many compilers run, and what is printed ----


@pytest.mark.parametrize("given", ["", " ", None])
def test_without_a_number_there_are_as_many_jobs_as_cpus(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if given is not None:
        monkeypatch.setenv("MAX_JOBS", given)
    assert setup_compile.jobs() == os.cpu_count()


@pytest.mark.parametrize("given", ["x", "0", "-1", "1.5", "²"])
def test_a_bad_number_of_jobs_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    with pytest.raises(SetupError, match=f'^MAX_JOBS: expected a number of compilers, 1 or more, got "{given}"$'):
        setup_compile.compile_each("kernels", [], print)


def test_the_cpu_and_the_cuda_kernels_share_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled at the same time, from two threads."""
    monkeypatch.setenv("MAX_JOBS", "3")
    running, most, lock = 0, 0, threading.Lock()

    def compile_one(source: str | Path) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1

    threads = [
        threading.Thread(target=setup_compile.compile_each, args=(kind, ["a", "b", "c", "d"], compile_one))
        for kind in ("CPU kernels", "CUDA kernels")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3


def build_kernels(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds the CPU kernels with a compiler that writes empty objects, and into $LOG when it began and ended."""
    script = f"""
test -z "$FAIL" || {{ echo "kernels.cpp:1: it does not compile"; exit 1; }}
echo begin >> {folder}/log
sleep 0.5
while test $# -gt 0; do test "$1" = -o && : > "$2"; shift; done
echo end >> {folder}/log"""
    compiler = made_up_compiler(folder / "made-up-compiler", script)
    return python(
        "setup.py", *options, "build_clib", "--build-temp", folder, "--build-clib", folder,
        CC=compiler, CXX=compiler, **environment,
    )  # fmt: skip


def kernel_files() -> list[str]:
    names = ["avx2", "avx512", "baseline"] if platform.machine().lower() in {"x86_64", "amd64"} else ["baseline"]
    return sorted(f"csrc/cpu/kernels/{folder}{name}.cpp" for folder in ("", "depthwise/") for name in names)


@pytest.mark.parametrize(("max_jobs", "most"), [("1", 1), ("3", 3)])
def test_max_jobs_bounds_the_cpu_kernels(tmp_path: Path, max_jobs: str, most: int) -> None:
    done = build_kernels(tmp_path, MAX_JOBS=max_jobs)
    assert done.returncode == 0, done.stdout
    events = (tmp_path / "log").read_text().split()
    running = [sum(1 if event == "begin" else -1 for event in events[: i + 1]) for i in range(len(events))]
    assert len(events) == 2 * len(kernel_files())
    assert max(running) == min(most, len(kernel_files()))


def test_the_build_tells_how_far_it_is_in_short_lines(tmp_path: Path) -> None:
    """What is being done before it is, then a line per file with its seconds; and nothing is done twice."""
    done = build_kernels(tmp_path, "--quiet", MAX_JOBS="1")
    first, *lines = done.stdout.splitlines()
    assert re.fullmatch(r"se_ext: compiling the CPU kernels for .*baseline.*, 1 at a time: some minutes", first)
    assert sorted(line.split(": ")[0] for line in lines) == kernel_files(), done.stdout
    assert all(re.fullmatch(r".*: \d+ s", line) for line in lines)

    again = build_kernels(tmp_path, "--quiet", MAX_JOBS="1")
    assert (again.returncode, again.stdout) == (0, "")


def test_whole_compiler_lines_are_printed_where_they_are_asked_for(tmp_path: Path) -> None:
    """Not in what pip shows with -v, which is setup.py's default."""
    assert "-Wno-psabi" not in build_kernels(tmp_path).stdout
    for made in tmp_path.glob("**/*.o"):
        made.unlink()
    assert "-Wno-psabi" in build_kernels(tmp_path, "-v").stdout


def test_a_kernel_that_does_not_compile_ends_the_build(tmp_path: Path) -> None:
    done = build_kernels(tmp_path, "--quiet", FAIL="1")
    assert done.returncode == 1
    assert "kernels.cpp:1: it does not compile" in done.stdout
    assert re.search(r"^error: .*made-up-compiler.* exit (status|code) 1", done.stdout, re.MULTILINE)


def test_a_command_that_fails_is_shown_with_all_that_it_said() -> None:
    with pytest.raises(CompileError, match=r"-c 'print\(6 \* 7\); exit\(1\)'\n42\n"):
        setup_compile.run([sys.executable, "-c", "print(6 * 7); exit(1)"])
    with pytest.raises(CompileError, match="no-such-compiler"):
        setup_compile.run(["no-such-compiler", "-c"])


# ---- OpenMP ----

# What the compilers make of a parallel region.
GCC = "echo 'g++ (Debian) 12.2.0'; echo '\tcall\tGOMP_parallel@PLT'"
CLANG = "echo 'clang version 14.0.6'; echo '\tcallq\t__kmpc_fork_call@PLT'"
CLANG_ON_A_MAC = "echo 'Apple clang version 15'; echo '\tbl\t___kmpc_fork_call'"
NO_OPENMP = "echo 'Apple clang version 15'; case \"$*\" in *-fopenmp*) exit 1;; esac"
ANOTHER = "echo 'nvc++ 24.1'; echo '\tcall\t_mp_pcpu_add@PLT'"

# The functions of the runtimes: LLVM's and Intel's have GCC's too.
LIBGOMP = {"GOMP_parallel"}
LIBOMP = {"GOMP_parallel", "__kmpc_fork_call"}


@pytest.mark.parametrize(
    ("script", "runtime", "builds"),
    [
        (GCC, LIBGOMP, True),
        (GCC, LIBOMP, True),
        (CLANG, LIBGOMP, False),
        (CLANG, LIBOMP, True),
        (CLANG_ON_A_MAC, LIBOMP, True),
        (NO_OPENMP, LIBGOMP, True),
        (ANOTHER, LIBGOMP, True),
        ("exit 127", LIBGOMP, True),
    ],
    ids=[
        "GCC, libgomp",
        "GCC, libomp",
        "clang, libgomp",
        "clang, libomp",
        "clang on a Mac",
        "no OpenMP",
        "another compiler",
        "no compiler",
    ],
)
def test_a_compiler_is_refused_only_where_torch_lacks_its_openmp(
    script: str, runtime: set[str], builds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = made_up_compiler(tmp_path / "c++", script)
    monkeypatch.setattr(setup_compile, "has_symbol", lambda library, name: name in runtime)
    if builds:
        setup_compile.check_openmp(compiler, "torch")
        return
    with pytest.raises(SetupError) as caught:
        setup_compile.check_openmp(f"{compiler} -stdlib=libstdc++", "torch")
    said = str(caught.value)
    assert said.startswith(f"OpenMP: the compiler {compiler} -stdlib=libstdc++ (clang version 14.0.6)")
    assert _C.openmp_runtime() in said
    assert "CXX=g++ pip install --no-build-isolation ." in said


def test_no_compiler_at_all_is_for_the_build_to_report() -> None:
    setup_compile.check_openmp("/nowhere/c++", torch._C.__file__)


def test_the_compiler_that_built_this_library_is_accepted() -> None:
    """And torch's runtime is looked into, not just assumed."""
    assert setup_compile.entry_of_a_region(get_cxx_compiler()) is not None
    setup_compile.check_openmp(get_cxx_compiler(), torch._C.__file__)
    assert setup_compile.has_symbol(torch._C.__file__, "GOMP_parallel")
    assert not setup_compile.has_symbol(torch._C.__file__, "GOMP_no_such_function")


def test_the_build_is_refused_before_the_kernels_are_compiled(tmp_path: Path) -> None:
    if setup_compile.has_symbol(torch._C.__file__, "__kmpc_fork_call"):
        pytest.skip("this torch has clang's OpenMP")
    compiler = made_up_compiler(tmp_path / "c++", CLANG)
    done = python("setup.py", "--quiet", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path, CXX=compiler)
    assert done.returncode == 1
    assert done.stdout.startswith(f"error: OpenMP: the compiler {compiler} (clang version 14.0.6)"), done.stdout


# ---- the module ----


@pytest.mark.skipif(sysconfig.get_config_var("Py_GIL_DISABLED") != 1, reason="this Python always has its lock")
def test_the_module_does_not_need_the_lock() -> None:
    """A Python without the lock takes it for a module that does not say so, and warns."""
    done = python("-W", "always::RuntimeWarning", "-c", "import torch; from se_ext import _C")
    assert done.returncode == 0, done.stdout
    assert "se_ext._C" not in done.stdout
