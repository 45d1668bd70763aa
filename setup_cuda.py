"""The CUDA part of setup.py: the toolkit, the architectures, and the kernels compiled by nvcc.

The environment decides: FORCE_CUDA (1: build it; 0: don't; else where torch has CUDA and nvcc is found), CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CC; nvcc itself reads NVCC_APPEND_FLAGS.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import SetupError

from setup_compile import compile_each, jobs, run

SOURCES = Path("csrc/cuda")
KERNELS = SOURCES / "kernels"
HOST_FLAGS = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
# Without -fmad=false, nvcc would fuse multiplications and additions where the source does not; compressed, the kernels
# take a fifth of the space.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xfatbin=-compress-all", HOST_FLAGS, f"-I{KERNELS}", "-Icsrc"]

DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # PTX of the last
FAMILIES = {  # torch's names
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
}


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str
    known: tuple[str, ...]  # architectures, as "9.0"
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]


def find_toolkit() -> Toolkit | None:
    """The toolkit in CUDA_HOME, else that of the nvcc on the PATH, else /usr/local/cuda; folders as nvcc knows them."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if nvcc is None or not os.path.exists(nvcc):
        return None
    plan = run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull])
    folders = {name: tuple(re.findall(rf'"-{name}([^"]+)"', plan)) for name in "IL"}
    release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    known = re.findall(r"compute_(\d+)(\d)\b", run([nvcc, "--list-gpu-arch"]))
    if release is None or not known:
        raise SetupError(f"CUDA_HOME: {nvcc} tells no version or no architectures")
    return Toolkit(nvcc, release[1], tuple(f"{a}.{b}" for a, b in known), unique(folders["I"]), unique(folders["L"]))


def runtime_library(toolkit: Toolkit) -> str:
    """What the linker is asked for. NVIDIA's wheels hold libcudart.so.13, say, without the link named libcudart.so."""
    folders = [Path(folder) for folder in toolkit.library_dirs]
    if any((folder / "libcudart.so").exists() for folder in folders):
        return "cudart"
    major = toolkit.version.split(".")[0]
    versioned = f"libcudart.so.{major}"
    return f":{versioned}" if any((folder / versioned).exists() for folder in folders) else "cudart"


def chosen_toolkit(torch_cuda: str | None) -> Toolkit | None:
    """The toolkit to build with, None to build without CUDA; torch_cuda is the CUDA version torch was built with."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        raise SetupError(f'FORCE_CUDA: expected 0 or 1, got "{force}"')
    if force == "0" or (torch_cuda is None and force != "1"):
        return None
    toolkit = find_toolkit()
    where = "in CUDA_HOME, on the PATH or in /usr/local/cuda"
    if toolkit is None and force == "1":
        raise SetupError(f"FORCE_CUDA=1: no nvcc {where}")
    if toolkit is None:
        print(f"se_ext: built without CUDA, since there is no nvcc {where}; FORCE_CUDA=1 makes that an error")
    elif torch_cuda is None:
        print("se_ext: FORCE_CUDA=1 beside a torch without CUDA: the library is built, but cannot be imported here")
    elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise SetupError(
            f"CUDA_HOME: {toolkit.nvcc} is of CUDA {toolkit.version}, but torch was built with CUDA {torch_cuda}; "
            "point CUDA_HOME at a toolkit of that major version, or build without CUDA: FORCE_CUDA=0"
        )
    return toolkit


def architectures(toolkit: Toolkit) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST names, by default those of ours that nvcc knows; as "8.0" or "9.0+PTX"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        kept = [a for a in DEFAULT_ARCHITECTURES if a in toolkit.known]
        if kept != DEFAULT_ARCHITECTURES:
            dropped = ", ".join(a for a in DEFAULT_ARCHITECTURES if a not in kept)
            print(f"se_ext: nvcc {toolkit.version} does not know {dropped}: left out (TORCH_CUDA_ARCH_LIST)")
        return [*kept[:-1], f"{kept[-1]}+PTX"]
    listed = [a for name in listed for a in FAMILIES.get(name, name).split()]
    for name in listed:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if match is None:
            raise SetupError(f'TORCH_CUDA_ARCH_LIST: expected the likes of "8.0 9.0a 12.0+PTX" or Hopper, got "{name}"')
        if match[1] not in toolkit.known:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: nvcc {toolkit.version} knows {', '.join(toolkit.known)}, but not {name}"
            )
    return list(unique(listed))


def architecture_flags(names: list[str]) -> list[str]:
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_kernels(toolkit: Toolkit, names: list[str], build_temp: str) -> list[str]:
    """Compiles each .cu that changed into a folder of these flags; the objects. Each time, repeats what nvcc said."""
    command = [toolkit.nvcc, *NVCC_FLAGS, *architecture_flags(names)]
    if "CC" in os.environ:  # as torch does
        command += ["-ccbin", os.environ["CC"]]
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NVCC_"))
    key = hashlib.sha256("\n".join([*command, toolkit.version, *settings]).encode()).hexdigest()[:12]
    folder = Path(build_temp, KERNELS, key)
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{source.stem}.o" for source in sorted(KERNELS.glob("*.cu"))}
    stale = [source for source, made in objects.items() if not up_to_date(made)]
    threads = -(-jobs() // max(1, len(stale)))

    def compile_one(source: Path) -> None:
        made = objects[source]
        made.unlink(missing_ok=True)
        arguments = [f"--threads={threads}", "-MD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)]
        Path(f"{made}.log").write_text(run([*command, *arguments]))

    compile_each(f"CUDA kernels for {' '.join(names)}", stale, compile_one)
    for made in objects.values():
        print(Path(f"{made}.log").read_text(), end="", flush=True)
    return [str(made) for made in objects.values()]


def up_to_date(made: Path) -> bool:
    """Whether the object is there and no older than any file that went into it."""
    try:
        read = Path(f"{made}.d").read_text().replace("\\\n", " ").split(" : ", 1)[1].split()
        return all(os.path.getmtime(file) <= made.stat().st_mtime for file in read)
    except FileNotFoundError:
        return False


def unique(items: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
