"""What can be known of the CUDA build without a GPU: `make cuda-check`.

Builds the whole library as FORCE_CUDA=1 does, into build/cuda-check, and looks at what the linker leaves open, at what
ptxas reports of every kernel, at how many of its thread blocks the registers let run side by side, and at the loads in
its PTX; for TORCH_CUDA_ARCH_LIST, or 7.5 and 9.0.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup_cuda  # noqa: E402

# A kernel whose demangled name one of these finds must load 16 bytes at once: those over the map whose int template
# argument, the values in an access, is 16 / the size of the type that their visitor begins with.
WHOLE_VECTORS = {"float": 4, "double": 2, "float16": 8, "bfloat16": 8}
MUST_LOAD_16_BYTES = [
    rf"\b{kernel}{n}, [^<]*<[\w:]*\b{t}\b"
    for kernel in (r"sum_\w+<", r"write_\w+<", r"cluster_kernel<[^,]*, ")
    for t, n in WHOLE_VECTORS.items()
]

# The thread blocks of a kernel whose registers must have room on a multiprocessor, by the first rule that finds it:
# what csrc/cuda/plan.cpp counts on (most_per_multiprocessor) and csrc/cuda/kernels/map.cuh (kWriteBlocks; a visitor's
# kBlocks; kRowBlocks for narrow accesses of one map), and for all others that a block can be launched at all.
BLOCKS_PER_MULTIPROCESSOR = [
    (r"\bcluster_kernel<[^<]*<double, [\w:]*Any>, [^<]*<double, [\w:]*Any>, [\w:]*ExciteBackward<", 1),
    (r"\bcluster_kernel<", 2),
    (r"\bwrite_\w+<", 2),
    (r"\bsum_\w+<\d, [\w:]*SumPrologueBackward<[\w:]*float16, [\w:]*Any,", 1),  # five sums of eight values
    (r"\bsum_\w+<\d, [\w:]*Sum\w+Backward<[\w:]*\bb?float(16)?,", 2),
    (r"\bsum_rows<1, [\w:]*\bSum(Input|Prologue|Moments)<", 4),
    (r"\bsum_rows<4, [\w:]*\bSum(Input|Prologue|Moments)<[\w:]*float16>", 4),
    (r"", 1),
]
THREADS = [(r"\bbackward_kernel<", 128), (r"\bgradients_kernel<", 64), (r"", 256)]  # per block, at most
REGISTERS = 64 * 1024  # of a multiprocessor, from compute capability 7.5 on

# The products for a batch read a weight and the vectors of `samples` samples 16 bytes at a time: template arguments.
DOT = re.compile(r"\bforward_kernel<(\d+), (\d+), [\w:]*\b(float|double|float16|bfloat16), (float|double)>")
# The tiles of their backward, where they need not mind an edge, read four values at a time: weights in the first, of
# four rows before they are used; vectors in the second, of eight samples, or four in float64.
TILE = re.compile(r"\b(backward|gradients)_kernel<true, [\w:]*\b(float|double|float16|bfloat16), (float|double)>")

# From global memory, or from where the compiler cannot know the memory; or past the registers.
LOAD_16_BYTES = re.compile(
    r"\bld(?![.\w:]*\.(?:param|shared|local|const))[.\w:]*\.(?:v4\.[ufbs]32|v2\.[ufbs]64|v8\.[ufbs]32|v4\.[ufbs]64)\b"
    r"|\bcp\.async\.c[ag]\.[^;]*, 16\b"
)


def build(folder: Path, kept: Path, architectures: str) -> str:
    """Builds libse_ext into the folder, nvcc's intermediate files kept; everything that was said."""
    kept.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": architectures,
        "NVCC_APPEND_FLAGS": f"-Xptxas=-v --keep --keep-dir={kept}",
    }
    # The usual build/temp: objects that other builds made are taken from there, and serve them later.
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\ncuda-check: the build failed")
    return done.stdout


def tool(*command: str | Path, feed: str | None = None, environment: dict[str, str] | None = None) -> str:
    words = list(map(str, command))
    return subprocess.run(words, input=feed, env=environment, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> list[str]:
    return tool("c++filt", feed="\n".join(names)).splitlines()


def open_symbols(library: Path, folders: list[str]) -> list[str]:
    """The symbols, demangled, that the library takes from others but none of those it loads has."""
    taken = [line.split()[-2:] for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    path = {"LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])}
    loaded = re.findall(r"(/\S+) \(0x", tool("ldd", library, environment={**os.environ, **path}))
    loaded += map(str, Path(folders[0]).glob("libgomp*"))  # torch loads it
    given = set()
    for file in loaded:
        given.update(line.split()[-1].split("@")[0] for line in tool("nm", "-D", "--defined-only", file).splitlines())
    names = [name.split("@")[0] for kind, name in taken if kind == "U"]  # the others are weak
    return sorted(demangled([name for name in names if name not in given]))


def first_rule(rules: list[tuple[str, int]], kernel: str) -> tuple[str, int]:
    return next(rule for rule in rules if re.search(rule[0], kernel))


def blocks_per_multiprocessor(kernel: Kernel) -> int:
    """As far as registers decide: they are given to a warp in units of 256."""
    per_warp = -(-kernel.registers * 32 // 256) * 256
    return REGISTERS // (per_warp * first_rule(THREADS, kernel.name)[1] // 32)


def wide_loads_of_products(kernel: str) -> int:
    """The 16-byte loads that one step of a product takes; 0 where it need not load so much at once."""
    if match := DOT.search(kernel):
        if match[1] == "1":
            return 0
        values, samples = int(match[1]), int(match[2])
        return 1 + samples * values * {"float": 4, "double": 8}[match[4]] // 16
    if match := TILE.search(kernel):
        of_weights = {"float": 4, "double": 8}.get(match[2], 0)
        return of_weights if match[1] == "backward" else 16
    return 0


class Kernel(NamedTuple):
    name: str  # demangled
    architecture: str
    registers: int
    stack: int  # bytes
    spills: int  # bytes


def ptxas_report(said: str) -> list[Kernel]:
    """What `ptxas -v` printed."""

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, part)))

    kernels = []
    for part in said.split("Compiling entry function '")[1:]:
        name, architecture = re.findall(r"^(\w+)' for '(\w+)'", part)[0]
        spills = total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads")
        kernels.append(Kernel(name, architecture, total(r"Used (\d+) registers"), total(r"(\d+) bytes stack"), spills))
    names = demangled([k.name for k in kernels])
    return [k._replace(name=name) for k, name in zip(kernels, names, strict=True)]


def kernels_in_ptx(ptx: str) -> dict[str, str]:
    """Demangled kernel → its body."""
    found = re.findall(r"^(?:\.\w+ )*\.entry (\w+)\(.*?^\{(.*?)^\}", ptx, re.MULTILINE | re.DOTALL)
    return dict(zip(demangled([name for name, _ in found]), (body for _, body in found), strict=True))


def must_load_16_bytes(kernel: str) -> bool:
    return any(re.search(pattern, kernel) for pattern in MUST_LOAD_16_BYTES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda-check", help="default: build/cuda-check")
    parser.add_argument("--verbose", action="store_true", help="list every kernel, and all that the build printed")
    options = parser.parse_args()

    toolkit = setup_cuda.find_toolkit()
    if toolkit is None:
        print("no nvcc: skipped")
        return int(os.environ.get("SE_EXT_REQUIRE_NVCC") == "1")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or "7.5;9.0"
    out = options.out.resolve()
    kept = out / re.sub(r"[^\w.+]+", "_", f"kept_{toolkit.version}_{architectures}")

    start = time.perf_counter()
    said = build(out, kept, architectures)
    print(f"nvcc {toolkit.version} for {architectures}: built in {time.perf_counter() - start:.0f} s")
    shown = r".*" if options.verbose else r"csrc/cuda/\S+: \d+ s|.*\bwarning\b.*"
    print("\n".join(re.findall(rf"^(?:{shown})$", said, re.MULTILINE)))
    failed = []

    torch_libraries = str(Path(torch.__file__).parent / "lib")
    left = open_symbols(out / "se_ext" / "libse_ext.so", [torch_libraries, *toolkit.library_dirs])
    print(f"symbols that neither this torch nor the toolkit has: {len(left)}", *left, sep="\n  ")
    others = [name for name in left if not re.match(r"([a-z ]+ for )?c10::cuda::", name)]
    failed += [f"left open, not of c10_cuda: {name}" for name in others]

    kernels = ptxas_report(said)
    if not kernels:
        failed.append("ptxas reported no kernel")
    else:
        most = max(kernels, key=lambda k: k.registers)
        print(f"kernels: {len({k.name for k in kernels})}")
        print(f"most registers: {most.registers}, {most.architecture} {most.name}")
    if options.verbose:
        print("architecture, registers, thread blocks per multiprocessor that they let run, kernel:")
        rows = [(k.architecture, k.registers, blocks_per_multiprocessor(k), k.name) for k in kernels]
        print(*(f"  {a} {registers:3} {blocks:2} {name}" for a, registers, blocks, name in rows), sep="\n")
    in_use = set()
    for k in kernels:
        pattern, blocks = first_rule(BLOCKS_PER_MULTIPROCESSOR, k.name)
        in_use.add(pattern)
        if blocks_per_multiprocessor(k) < blocks:
            few = f"{k.registers} registers let fewer than {blocks} thread blocks run"
            failed.append(f"{k.architecture}: {few}: {k.name}")
    idle = [pattern for pattern, _ in BLOCKS_PER_MULTIPROCESSOR if kernels and pattern not in in_use]
    failed += [f"BLOCKS_PER_MULTIPROCESSOR is for no kernel: {pattern}" for pattern in idle]
    failed += [f"{k.architecture}: {k.stack} bytes of stack: {k.name}" for k in kernels if k.stack]
    failed += [f"{k.architecture}: {k.spills} bytes of spills: {k.name}" for k in kernels if k.spills]

    wide = products = 0
    found = set()
    names = [k.name for k in kernels]
    for source in sorted((ROOT / setup_cuda.KERNELS).glob("*.cu")):
        files = sorted(kept.glob(f"{source.stem}.*ptx"))
        if not files:
            failed.append(f"{kept} has no PTX of {source.name}: remove build/temp*/{setup_cuda.KERNELS}")
        for file in files:
            in_file = kernels_in_ptx(file.read_text())
            for name, body in in_file.items():
                expected, loads = wide_loads_of_products(name), len(LOAD_16_BYTES.findall(body))
                products += expected > 0
                if loads < expected:
                    failed.append(f"{file.name}: {loads} loads of 16 bytes, expected {expected} and more: {name}")
            bodies = {name: body for name, body in in_file.items() if must_load_16_bytes(name)}
            wide += len(bodies)
            found |= {pattern for pattern in MUST_LOAD_16_BYTES if any(re.search(pattern, name) for name in bodies)}
            narrow = [name for name, body in bodies.items() if not LOAD_16_BYTES.search(body)]
            failed += [f"{file.name}: no 16-byte load from global memory: {name}" for name in narrow]
    print(f"kernels that must load 16 bytes at once, over the architectures: {wide}")
    print(f"kernels whose products must, over the architectures: {products}")
    failed += [f"finds no kernel: {rule.pattern}" for rule in (DOT, TILE) if not any(map(rule.search, names))]
    idle = [pattern for pattern in MUST_LOAD_16_BYTES if pattern not in found]
    failed += [f"MUST_LOAD_16_BYTES finds no kernel: {pattern}" for pattern in idle]

    for line in failed:
        print("FAILED:", line)
    print("cuda-check:", f"{len(failed)} failed" if failed else "passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
