"""Builds se_ext/libse_ext.so (the torch ops; no Python in it) and se_ext/_C (pybind11: build information).

The CPU kernels are compiled once per instruction set, each as a small static library with its own flags; the ops pick
one at run time. How compilers are run is in setup_compile.py, what CUDA needs beyond that in setup_cuda.py. Metadata is
in pyproject.toml.
"""

import gzip
import logging
import os
import platform
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import setuptools

# pip runs this file once to ask what it needs: in an environment of its own, without torch, unless told otherwise.
if missing := [name for name in ("torch", "pybind11") if find_spec(name) is None]:
    sys.exit(
        f"se_ext: no {' and no '.join(missing)} where the build looks.\n"
        "The library must be built against the torch that it will run with, which pip hides from a build unless told "
        "otherwise.\nHave torch, setuptools, pybind11 and ninja installed in one environment, and there type:\n"
        "    pip install --no-build-isolation ."
    )
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"se_ext: setuptools {setuptools.__version__} cannot read this pyproject.toml; 77 and newer can:\n"
        '    pip install --upgrade "setuptools>=77"'
    )

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.sdist import sdist
from setuptools.modified import newer_group
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip does not
import setup_cuda  # noqa: E402
from setup_compile import check_openmp, compile_each  # noqa: E402

CSRC = Path("csrc")
# Those of the map and the excitation, and those of the depthwise convolution.
KERNEL_FOLDERS = ("cpu/kernels", "cpu/kernels/depthwise")
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}

# The same sources give the same bytes: in archives every file has this time, 1980, and objects hold no path of the
# machine that built them, which torch's checks take from __FILE__.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")
NO_PATHS = [f"-ffile-prefix-map={folder}/=" for folder in (Path(torch.__file__).parent, Path.cwd())]

OPTIMISE = ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]
# GCC warns of its own AVX-512 headers (-Wmaybe-uninitialized), and notes that vector arguments changed their ABI
# between versions (-Wpsabi), which inlined functions don't use.
KERNEL_FLAGS = ["-std=c++20", "-fPIC", *OPTIMISE, "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def headers() -> list[str]:
    return sorted(str(p) for p in CSRC.rglob("*.h"))


def sources(*folders: str) -> list[str]:
    return sorted(str(p) for folder in folders for p in (CSRC / folder).glob("*.cpp") if p.name != "bindings.cpp")


def instruction_sets() -> dict[str, list[str]]:
    """Name → flags, of the sets for this processor."""
    lines = [line.split() for line in (CSRC / "instruction_sets.txt").read_text().splitlines()]
    here = ("any", "x86_64") if IS_X86 else ("any",)
    return {name: flags for processor, name, *flags in lines if processor in here}


def kernel_libraries(name: str, flags: list[str]) -> list[tuple[str, dict]]:
    return [kernel_library(folder, name, flags) for folder in KERNEL_FOLDERS]


def kernel_library(folder: str, name: str, flags: list[str]) -> tuple[str, dict]:
    source = str(CSRC / folder / f"{name}.cpp")
    near = [h for h in headers() if Path(h).parent in (CSRC / folder, CSRC / KERNEL_FOLDERS[0])]
    kernel_headers = near + [h for h in headers() if h.endswith(("params.h", "ops/activation.h"))]
    return f"se_ext_{Path(folder).name}_{name}", {
        "sources": [source],
        "obj_deps": {source: kernel_headers},
        "cflags": [*KERNEL_FLAGS, *flags],
    }


def write_cmake_package(folder: Path, version: str) -> None:
    """What find_package(se_ext) reads, with which CMakeLists.txt does the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for template in Path("cmake").glob("*.in"):
        text = template.read_text().replace("@SE_EXT_VERSION@", version)
        text = text.replace("@SE_EXT_TORCH_VERSION@", torch.__version__.split("+")[0])
        (folder / template.stem).write_text(text)


class SourceDistribution(sdist):
    """With nothing in the archive of when and by whom it was made."""

    def make_archive(self, base_name: str, format: str, root_dir=None, base_dir=None, **options) -> str:
        if format not in ("gztar", "tar"):
            return super().make_archive(base_name, format, root_dir, base_dir, **options)
        made = int(os.environ["SOURCE_DATE_EPOCH"])

        def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = made, 0, 0, "", ""
            member.mode = 0o755 if member.mode & 0o100 else 0o644  # whatever the umask was
            return member

        path = Path(f"{base_name}.tar.gz" if format == "gztar" else f"{base_name}.tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            out = gzip.GzipFile("", "wb", fileobj=file, mtime=made) if format == "gztar" else file
            with out, tarfile.open(fileobj=out, mode="w") as archive:
                archive.add(base_dir, filter=anonymous)
        return str(path)


class BuildKernels(build_clib):
    """Compiles the instruction sets side by side: each is one long translation unit."""

    def build_libraries(self, libraries: list[tuple[str, dict]]) -> None:
        stale = {info["sources"][0]: (name, info) for name, info in libraries if self.is_stale(info)}
        build = super().build_libraries
        if self.distribution.verbose < 2:  # setup.py -v prints each compiler's command
            logging.disable(logging.INFO)
        try:
            names = ", ".join(
                str(Path(source).relative_to(CSRC / KERNEL_FOLDERS[0]).with_suffix("")) for source in stale
            )
            compile_each(f"CPU kernels for {names}", stale, lambda source: build([stale[source]]))
            build([library for library in libraries if library not in stale.values()])
        finally:
            logging.disable(logging.NOTSET)

    def is_stale(self, info: dict) -> bool:
        [source] = info["sources"]
        [made] = self.compiler.object_filenames([source], output_dir=self.build_temp)
        return newer_group([source, *info["obj_deps"][source]], made)


class Build(BuildExtension):
    """Builds the kernels first, links _C against libse_ext, and writes what is known of the build: the torch version,
    and the package for CMake."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.no_python_abi_suffix = True  # not by with_options(), whose arguments setuptools 77 does not take

    def run(self) -> None:
        if self.use_ninja:  # else it is not known here which compiler will be taken
            check_openmp(get_cxx_compiler(), torch._C.__file__)
        self.toolkit = setup_cuda.chosen_toolkit(torch.version.cuda)
        self.gpus = setup_cuda.architectures(self.toolkit) if self.toolkit else []
        with ThreadPoolExecutor(max_workers=1) as beside:  # the slow parts of both, at a time
            if self.toolkit is not None:
                kernels = beside.submit(setup_cuda.compile_kernels, self.toolkit, self.gpus, self.build_temp)
            self.run_command("build_clib")
            self.cuda_kernels = kernels.result() if self.toolkit is not None else []
        super().run()
        packages = [Path(self.build_lib, "se_ext")] + ([ROOT / "se_ext"] if self.inplace or self.editable_mode else [])
        for package in packages:
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build.py").write_text(f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n')
            write_cmake_package(package / "cmake" / "se_ext", self.distribution.get_version())

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "se_ext._C":
            ext.library_dirs.append(str(Path(self.get_ext_fullpath("se_ext.libse_ext")).parent))
        elif self.toolkit is not None:
            self.add_cuda(ext, self.toolkit)
        super().build_extension(ext)

    def add_cuda(self, ext: Extension, toolkit: setup_cuda.Toolkit) -> None:
        """Adds csrc/cuda to libse_ext; compiled apart from its sources, whose objects serve both builds."""
        ext.extra_objects += self.cuda_kernels

        def compile_adapters(adapters: list[str], **macros: str) -> list[str]:
            return self.compiler.compile(
                adapters,
                output_dir=self.build_temp,
                macros=list(macros.items()),
                include_dirs=[*ext.include_dirs, *toolkit.include_dirs],
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )

        macros = {}
        if not any(Path(folder, "c10/cuda/impl/cuda_cmake_macros.h").exists() for folder in ext.include_dirs):
            macros["C10_USING_CUSTOM_GENERATED_MACROS"] = "1"  # a torch without CUDA lacks that header
        info = str(CSRC / "cuda" / "info.cpp")
        ext.extra_objects += compile_adapters([s for s in sources("cuda") if s != info], **macros)
        ext.extra_objects += compile_adapters([info], SE_EXT_CUDA_ARCHITECTURES=f'"{" ".join(self.gpus)}"')
        ext.sources.remove(str(CSRC / "no_cuda.cpp"))
        ext.library_dirs += toolkit.library_dirs
        ext.libraries.append(setup_cuda.runtime_library(toolkit))
        if torch.version.cuda is not None:
            ext.libraries.append("c10_cuda")


def extensions() -> list[Extension]:
    ops = CppExtension(
        "se_ext.libse_ext",
        sources(".", "ops", "keys", "formula", "batch_norm", "cpu"),
        depends=headers(),
        # C++20 is named because torch 2.11 would pick 17. OpenMP is compiled for but not linked: its symbols come from
        # the runtime that torch itself loads, so that the process has one.
        extra_compile_args=["-std=c++20", *OPTIMISE, *NO_PATHS, "-fopenmp"],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )
    info = Extension(
        "se_ext._C",
        [str(CSRC / "bindings.cpp")],
        include_dirs=[pybind11.get_include()],
        libraries=["se_ext"],
        depends=headers(),
        extra_compile_args=[*OPTIMISE, *NO_PATHS],
        extra_link_args=["-Wl,-rpath,$ORIGIN"],
        language="c++",
    )
    return [ops, info]


setup(
    libraries=[library for name, flags in instruction_sets().items() for library in kernel_libraries(name, flags)],
    ext_modules=extensions(),
    cmdclass={"build_ext": Build, "build_clib": BuildKernels, "sdist": SourceDistribution},
)
