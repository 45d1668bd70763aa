"""`python -m se_ext`: what the library was built with and runs on, for bug reports. `python -m se_ext convert-report`:
what a conversion does to a network."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

import se_ext
from se_ext import _C, _build
from se_ext.conversion import command


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


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m se_ext", description="Without a command: what se_ext was built with and runs on."
    )
    parser.set_defaults(do=_print_report)
    command.add_to(parser.add_subparsers(metavar="COMMAND"))
    options = parser.parse_args(arguments)
    try:
        options.do(options)
    except command.CommandError as error:
        print(f"{parser.prog} {command.NAME}: {error}", file=sys.stderr)
        return 1
    return 0


def _print_report(options: argparse.Namespace) -> None:
    lines = report()
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
