"""Builds the library with a sanitizer in it, below build/sanitize: instrument.py address|thread [--isa baseline]

address: AddressSanitizer and UndefinedBehaviorSanitizer, as a copy of the package that loads the library so built.
thread: ThreadSanitizer, as the program threads.cpp.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")

# -O1 and debug lines without variables: the compiler has less to do. UndefinedBehaviorSanitizer's vptr wants the type
# information of torch's classes, which torch hides.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"]
UNDEFINED = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr"]
# Of the kernels, without the checks that every access to an object gets (null, object-size, pointer-overflow), which
# make their compilation much longer: AddressSanitizer sees the access itself.
UNDEFINED_IN_KERNELS = [
    "-fsanitize=alignment,bool,bounds,enum,float-cast-overflow,integer-divide-by-zero,nonnull-attribute,return,"
    "shift,signed-integer-overflow,unreachable"
]
# The runtime of UndefinedBehaviorSanitizer hidden in the library: as a library of its own it would hand the name of the
# file for its reports to AddressSanitizer's, and print them where pytest takes them for a test's output.
UNDEFINED_INSIDE = ["-shared", "-static-libubsan", "-Wl,--exclude-libs,ALL"]
SANITIZERS = {"address": ["-fsanitize=address"], "thread": ["-fsanitize=thread"]}
# What the kernels mark always_inline stays a function of its own: the sanitizer makes it long, and inlined everywhere
# it takes the compiler many minutes and gigabytes.
KERNEL_FLAGS = ["-Wno-psabi", "-Wno-attributes", "-Dalways_inline=unused"]

RULES = f"""
ninja_required_version = 1.5
rule compile
  command = {CXX} $flags -MMD -MF $out.d $mode $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {CXX} $flags $in -o $out $libraries
  description = $out
"""


def instruction_sets() -> dict[str, list[str]]:
    """Name → flags, of the sets for this processor."""
    lines = [line.split() for line in (CSRC / "instruction_sets.txt").read_text().splitlines()]
    return {name: flags for processor, name, *flags in lines if processor in ("any", platform.machine())}


def folder(sanitizer: str) -> Path:
    return ROOT / "build" / "sanitize" / sanitizer


class Ninja:
    """The text of a build.ninja."""

    def __init__(self, sanitizer: str) -> None:
        self.text = RULES
        self.place = folder(sanitizer)
        self.sanitizer = sanitizer

    def edge(self, target: Path, rule: str, sources: list[Path], needs: Path | None = None, **variables: str) -> Path:
        after = f" | {needs}" if needs else ""
        self.text += f"build {target}: {rule} {' '.join(map(str, sources))}{after}\n"
        self.text += "".join(f"  {name} = {value}\n" for name, value in variables.items())
        return target

    def object(self, source: Path, flags: list[str], header: Path | None = None, name: str = "") -> Path:
        """`header`: a compiled one, which comes first."""
        target = self.place / "objects" / (name + "_".join(source.relative_to(ROOT).parts) + ".o")
        first = ["-include", str(header.with_suffix(""))] if header else []
        return self.edge(target, "compile", [source], header, flags=" ".join([*flags, *first]), mode="-c")

    def run(self, target: Path) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(self.place), *jobs, str(target)], check=True)


def build(sanitizer: str, sets: list[str], own: list[str], target: str, link: list[str]) -> Path:
    """Compiles the library with kernels of the baseline and of these instruction sets, and the sources `own`.

    A source of this folder that has the name of a source of the library takes its place.
    """
    ninja = Ninja(sanitizer)
    undefined, undefined_in_kernels = (UNDEFINED, UNDEFINED_IN_KERNELS) if sanitizer == "address" else ([], [])
    sanitize = SANITIZERS[sanitizer]
    known = instruction_sets()
    sets = [name for name in known if name in ("baseline", *sets)]  # isa.cpp cannot do without the baseline
    objects = [
        ninja.object(
            CSRC / kernels / f"{name}.cpp", [*FLAGS, *sanitize, *undefined_in_kernels, *KERNEL_FLAGS, *known[name]]
        )
        for name in sets
        for kernels in ("cpu/kernels", "cpu/kernels/depthwise")
    ]

    without = [f"-DSE_EXT_WITHOUT_{name.upper()}" for name in known if name not in sets]
    # The version has no use but to compile anew with another torch, whose headers are not among the dependencies.
    torch_flags = [*(f"-isystem {path}" for path in cpp_extension.include_paths())]
    torch_flags.append(f"-DSE_EXT_TORCH_VERSION={torch.__version__}")
    flags = [*FLAGS, *sanitize, *undefined, *torch_flags, "-fopenmp"]
    header = ninja.place / "pch.h.gch"
    ninja.edge(header, "compile", [HERE / "pch.h"], flags=" ".join(flags), mode="-x c++-header")
    for name in ("", "ops", "keys", "formula", "batch_norm", "cpu"):
        for source in sorted((CSRC / name).glob("*.cpp")):
            if source.name == "isa.cpp":  # which knows the instruction sets
                objects.append(ninja.object(source, [*flags, *without], name="-".join(sets) + "_"))
            elif source.name != "bindings.cpp" and source.name not in own:
                objects.append(ninja.object(source, flags, header))
    objects += [ninja.object(HERE / source, flags, header) for source in own]
    made = ninja.place / "-".join(sets) / target
    torch_libraries = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    libraries = [*torch_libraries, "-ltorch", "-ltorch_cpu", "-lc10", *link]
    ninja.edge(
        made, "link", objects, flags=" ".join([*sanitize, *undefined, "-pthread"]), libraries=" ".join(libraries)
    )
    ninja.run(made)
    return made


def package(sets: list[str]) -> Path:
    """The folder of a package se_ext whose ops have AddressSanitizer and UndefinedBehaviorSanitizer in them.

    Its Python files are those of the package; what Python knows of the build is the ordinary build's.
    """
    library = build("address", sets, ["broken.cpp", "scratch.cpp"], "se_ext/libse_ext.so", UNDEFINED_INSIDE)
    for file in (ROOT / "se_ext").iterdir():
        copy = library.with_name(file.name)
        if file.suffix == ".py" or file.name == "conversion":
            copy.unlink(missing_ok=True)
            copy.symlink_to(file)
    shutil.copy2(ROOT / "se_ext" / "_C.so", library.with_name("_C.so"))
    return library.parent.parent


def threads(sets: list[str]) -> Path:
    """The program that calls every op under ThreadSanitizer. What openmp.cpp defines stays out of torch's sight."""
    return build("thread", sets, ["threads.cpp", "openmp.cpp"], "threads", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument("--isa", nargs="+", choices=instruction_sets(), default=list(instruction_sets()))
    options = parser.parse_args()
    print(package(options.isa) if options.sanitizer == "address" else threads(options.isa))


if __name__ == "__main__":
    main()
