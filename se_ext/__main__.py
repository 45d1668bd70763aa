"""`python -m se_ext`: what the library was built with and runs on, for bug reports."""

from __future__ import annotations

import platform

import torch

import se_ext
from se_ext import _C, _build


def report() -> dict[str, str]:
    """The environment, as label → value."""
    cuda = "none in this build"
    if _C.cuda_toolkit():
        cuda = f"toolkit {_C.cuda_toolkit()}, architectures {' '.join(_C.cuda_architectures())}"
    lines = {
        "se_ext": se_ext.__version__,
        "torch": f"{torch.__version__} (built against {_build.TORCH_VERSION})",
        "Python": platform.python_version(),
        "compiler": _C.compiler(),
        "CPU": f"{platform.machine()}, {_C.cpu_capability()} kernels (of {', '.join(_C.cpu_capabilities())})",
        "caches": f"L2 {_C.cache_bytes(2) >> 10} KB, L3 {_C.cache_bytes(3) >> 10} KB",
        "threads": str(_C.num_threads()),
        "OpenMP runtime": _C.openmp_runtime(),
        "CUDA kernels": cuda,
    }
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        lines["GPU"] = f"{torch.cuda.get_device_name()}, compute capability {capability}"
    return lines


def main() -> None:
    lines = report()
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")


if __name__ == "__main__":
    main()
