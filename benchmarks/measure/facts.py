"""What a number depends on besides the code: machine, versions, commit, environment."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import se_ext
from benchmarks.experiments import Experiment
from benchmarks.measure import allocator
from benchmarks.measure.case import Work

ROOT = Path(__file__).resolve().parents[2]
PREFIXES = (
    "MALLOC_",
    "GLIBC_TUNABLES",
    "OMP_",
    "KMP_",
    "GOMP_",
    "MKL_",
    "ATEN_",
    "SE_EXT_",
    "THP_",
    "TORCH",
    "LD_PRELOAD",
)


def _run(*command: str) -> str | None:
    """The output of a command, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """{"L1 Data": "32K, cpus 0", ...}: the size of each cache of CPU 0, and the CPUs that share it."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size, cpus = (_read(str(index / k)) for k in ("level", "type", "size", "shared_cpu_list"))
        caches[f"L{level} {kind}"] = f"{size}, cpus {cpus}"
    return caches


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": se_ext._C.cpu_capability(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }


def software() -> dict[str, Any]:
    timm = getattr(sys.modules.get("timm"), "__version__", None)
    compiler = _run(os.environ.get("CXX", "c++"), "--version")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "se_ext": getattr(se_ext, "__version__", None),
        "compiler": compiler.splitlines()[0] if compiler else None,
        **({"timm": timm} if timm else {}),
    }


def git() -> dict[str, Any]:
    """The commit (None before the first), and whether anything but results differs from it."""
    changes = _run("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _run("git", "rev-parse", "--verify", "HEAD"), "dirty": bool(changes)}


def environment() -> dict[str, str]:
    """The variables that can change a number; not those that say where a program keeps its files."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES) and not k.endswith("_DIR")}


def header(experiment: Experiment, work: Work, settings: dict[str, Any]) -> dict[str, Any]:
    """What every results file says before its rows; `kind` says which rows."""
    (device,) = settings.get("device", ["cpu"])
    return {
        "schema": 1,
        "kind": experiment.kind,
        "experiment": experiment.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.orig_argv[1:],
        "notes": [*([allocator.note()] if experiment.page_faults_out else []), *work.notes],
        "method": experiment.method,
        "machine": machine(torch.device(device)),
        "software": software(),
        "git": git(),
        "environment": environment(),
        "settings": settings,
        **work.facts,
    }
