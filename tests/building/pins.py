"""Writes what `make` installs, with the hashes of all files, from requirements-dev.in. Needs a network.

Three files, because there are two builds of one version of torch. The registry's asks for NVIDIA's libraries, which
are gigabytes; the one for CPUs does not, but not every place has it. `make` takes it where pip finds it. A single file
would not do: pip checks hashes only where every package has one, and of two builds whose hashes are listed it takes
the registry's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

UV = "uv==0.13.9"
ROOT = Path(__file__).resolve().parents[2]
DIRECT = ROOT / "requirements-dev.in"
PINS = ROOT / "requirements-dev.txt"
CPU_PINS = ROOT / "requirements-dev-cpu.txt"
CUDA_PINS = ROOT / "requirements-dev-cuda.txt"
HEADER = "# Written by `make pins` from requirements-dev.in. For pip install --no-deps --require-hashes.\n"
CUDA = re.compile("(nvidia|cuda)-|triton$|torch$")  # the packages in CUDA_PINS
# Torch for CPUs, which the registry does not have: version, and the wheel's hash for Python 3.11 on x86-64 Linux.
CPU_BUILD = ("2.13.0", "sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b")


def resolve(uv: Path) -> dict[str, str]:
    """Package → its lines, as a file of requirements has them."""
    command = [
        str(uv), "pip", "compile", "--quiet", "--no-config", "--generate-hashes", "--no-header", "--no-emit-index-url",
        "--annotation-style=line", "--python-version=3.11", "--python-platform=x86_64-manylinux_2_28", DIRECT.name,
    ]  # fmt: skip
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    blocks = re.split(r"^(?=\w)", said, flags=re.MULTILINE)[1:]
    return {block.partition("==")[0]: block for block in blocks}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, UV], check=True)
        blocks = resolve(Path(folder, "bin", "uv"))
    version, digest = CPU_BUILD
    if not blocks["torch"].startswith(f"torch=={version} "):
        sys.exit(f"CPU_BUILD is of torch {version}, but {DIRECT.name} is not")
    CPU_PINS.write_text(f"{HEADER}torch=={version}+cpu --hash={digest}\n")
    for file, for_cuda in ((PINS, False), (CUDA_PINS, True)):
        file.write_text(HEADER + "".join(block for name, block in blocks.items() if bool(CUDA.match(name)) == for_cuda))


if __name__ == "__main__":
    main()
