"""Builds the CUDA backend for the host, or the stand-in's own test: build.py [--sanitize none] [--self-test].

The library registers its ops at the CPU's dispatch key: loaded after se_ext, it takes the place of the CPU kernels.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SELF_TEST = HERE / "self_test.cpp"
BACKEND = HERE / "path.cpp"  # of the backend, not of the stand-in
CXX = os.environ.get("CXX", "g++")

FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-omit-frame-pointer"]
FLAGS += ["-fno-strict-aliasing", "-Wall", "-Wextra"]  # kernels read values in wider accesses, as nvcc lets them
SANITIZE = {"address": ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"], "none": []}


def flags(source: Path, sanitize: str) -> list[str]:
    """The sanitizer watches kernels and adapters; the stand-in itself only tells it of its stacks."""
    own = source.parent == HERE and source != SELF_TEST
    watched = ["-O1", *SANITIZE[sanitize]] if sanitize != "none" and not own else ["-O2"]
    if sanitize == "address":
        watched.append("-DCUDA_HOST_ASAN")
    fma = platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text()
    torch_headers = [f for path in cpp_extension.include_paths() for f in ("-isystem", path)]
    # The macro has no use but to compile anew with another torch, whose headers are not among the dependencies.
    version = f"-DSE_EXT_TORCH_VERSION={torch.__version__}"
    # fmaf() in software is slow.
    return [*FLAGS, *watched, *(["-mfma"] if fma else []), f"-I{HERE}", *torch_headers, version]


def changed(target: Path, command: list[str]) -> bool:
    """True where the target is older than what its dependency file names, or was made by another command."""
    record, dependencies = target.with_suffix(".command"), target.with_suffix(".d")
    if not all(p.exists() for p in (target, record, dependencies)) or record.read_text() != shlex.join(command):
        return True
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return any(not Path(n).exists() or Path(n).stat().st_mtime > made for n in names)


def compile_one(source: Path, folder: Path, sanitize: str) -> tuple[Path, bool]:
    """The object file, and whether it is new."""
    relative = source.relative_to(ROOT)
    target = folder / "objects" / ("_".join(relative.parts) + ".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [
        CXX,
        *flags(source, sanitize),
        "-DSE_EXT_CUDA_KEY=CPU",
        '-DSE_EXT_CUDA_ARCHITECTURES="host"',
        "-MMD",
        "-MF",
        str(target.with_suffix(".d")),
    ]
    command += ["-c", "-x", "c++", str(source), "-o", str(target)]
    if not changed(target, command):
        return target, False
    subprocess.run(command, check=True)
    target.with_suffix(".command").write_text(shlex.join(command))
    return target, True


def make(target: Path, sources: list[Path], sanitize: str, link: list[str]) -> Path:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_one(source, target.parent, sanitize), sources))
    command = [CXX, *SANITIZE[sanitize], *(str(o) for o, _ in objects), "-o", str(target), *link]
    record = target.with_name(target.name + ".command")
    if (
        any(new for _, new in objects)
        or not target.exists()
        or not record.exists()
        or record.read_text() != shlex.join(command)
    ):
        subprocess.run(command, check=True)
        record.write_text(shlex.join(command))
    return target


def output(sanitize: str) -> Path:
    return ROOT / "build" / ("cuda_host" if sanitize == "address" else f"cuda_host_{sanitize}")


def library(sanitize: str = "address") -> Path:
    """The CUDA backend as a shared library for torch.ops.load_library."""
    csrc = ROOT / "csrc"
    sources = [*csrc.glob("cuda/*.cpp"), *csrc.glob("cuda/kernels/*.cu"), *csrc.glob("ops/*.cpp")]
    sources.append(csrc / "formula" / "convolution.cpp")  # ATen's convolution, which the backend calls
    sources += [p for p in HERE.glob("*.cpp") if p != SELF_TEST]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    target = output(sanitize) / "libse_ext_cuda_host.so"
    return make(target, sorted(sources), sanitize, ["-shared", "-Wl,--no-undefined", *libraries])


def self_test(sanitize: str = "address") -> Path:
    sources = sorted(p for p in HERE.glob("*.cpp") if p != BACKEND)
    return make(output(sanitize) / "self_test", sources, sanitize, ["-pthread"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", choices=SANITIZE, default="address")
    parser.add_argument("--self-test", action="store_true", help="build the stand-in's own test and run it")
    options = parser.parse_args()
    if options.self_test:
        return subprocess.run([self_test(options.sanitize)], check=False).returncode
    print(library(options.sanitize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
