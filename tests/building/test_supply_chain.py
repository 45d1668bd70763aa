"""What comes from outside: at run time torch alone, and nothing from a network; for development what a hash names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT
from pins import CPU_BUILD, CPU_PINS, CUDA_PINS, DIRECT, PINS

from se_ext import _loader

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    return partial(said_by, tmp_path / "program.py")


def said_by(program: Path, code: str) -> str:
    """What a program of that code prints. A file, because se_ext.convert reads the sources of a network."""
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_loader.PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- at run time ----

USE = """
import torch, se_ext
from torch import nn
from se_ext.__main__ import report

network = se_ext.models.seresnet18(num_classes=3)
network(torch.randn(2, 3, 32, 32)).square().mean().backward()
assert all(p.grad.isfinite().all() for p in network.parameters())

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
    def forward(self, x):
        return x * self.fc(self.pool(x).flatten(1))[:, :, None, None]

plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Gated(), nn.Conv2d(8, 4, 3)).eval()
x = torch.randn(2, 3, 9, 9)
with torch.no_grad():
    before = plain(x)
    assert se_ext.convert(plain).converted
    torch.testing.assert_close(plain(x), before)
    assert se_ext.insert_se(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())).inserted
    torch.jit.script(se_ext.SqueezeExcitation(8, 4))(torch.randn(1, 8, 5, 5))
report()
print("used")
"""

# An audit hook sees what socket.socket cannot hide: C code that makes one, or looks up a name.
NO_NETWORK = """
import sys
def forbid(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        raise RuntimeError(f"network: {event}")
sys.addaudithook(forbid)
"""

TRY_NETWORK = """
import socket
try:
    socket.socket()
except RuntimeError as error:
    print(error)
"""


def test_nothing_is_taken_from_a_network(python: Callable[[str], str]) -> None:
    assert python(NO_NETWORK + TRY_NETWORK).strip() == "network: socket.__new__"
    assert python(NO_NETWORK + USE).strip() == "used"


# Refuses every installed package that torch doesn't require, directly or through another.
TORCH_ALONE = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def normal(name):
    return re.sub("[-_.]+", "-", name).lower()

wanted, todo = set(), ["torch"]
while todo:
    name = normal(todo.pop())
    if name not in wanted:
        wanted.add(name)
        try:
            listed = requires(name) or []
        except PackageNotFoundError:  # required elsewhere: on another system, or for an extra
            continue
        todo += [re.match(r"[\\w.-]+", line)[0] for line in listed if "extra ==" not in line]

own = {"se_ext"}
refused = {
    module for module, packages in packages_distributions().items() if not wanted & {normal(p) for p in packages}
} - own - set(sys.stdlib_module_names)

class Refuse:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse)
"""


def test_torch_is_all_that_is_required(python: Callable[[str], str]) -> None:
    assert {"timm", "numpy", "onnx", "pytest"} <= set(python(TORCH_ALONE + "print(*sorted(refused))").split())
    assert python(TORCH_ALONE + USE).strip() == "used"
    assert 'dependencies = ["torch>=2.10"]\n' in (ROOT / "pyproject.toml").read_text()


def loads(file: Path) -> list[ast.Call]:
    """Calls of torch.load."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "torch.load"]


def test_files_are_loaded_without_running_code() -> None:
    """torch.load(weights_only=True), which refuses a pickle that calls anything."""
    files = [file for folder in ("se_ext", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    found = {file: loads(file) for file in files}
    assert any(found.values())
    for file, calls in found.items():
        for call in calls:
            safe = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "weights_only"]
            assert safe == ["True"], f"{file}:{call.lineno}"


# ---- for development ----


def pins(file: Path) -> dict[str, tuple[str, set[str]]]:
    """Package → its version and its hashes; each package once."""
    found = {}
    text = re.sub(r" *#.*", "", file.read_text()).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([a-z0-9-]+)==([\w.+]+)((?: +--hash=sha256:[0-9a-f]{64})+)", line)
        assert match is not None, f"{file.name}: {line[:80]}"
        name, version, hashes = match.groups()
        assert name not in found
        found[name] = version, set(re.findall("sha256:[0-9a-f]+", hashes))
    return found


def test_each_package_for_development_has_its_hashes() -> None:
    assert len(pins(PINS)) > 50
    assert len(pins(CUDA_PINS)) > 10


def test_the_pins_are_those_of_the_list() -> None:
    """`make pins` was run after the list was changed."""
    written = [line for line in DIRECT.read_text().splitlines() if line and not line.startswith("#")]
    direct = dict(line.split("==") for line in written)
    assert len(direct) == len(written)
    for torch in (CPU_PINS, CUDA_PINS):
        pinned = {name: version.removesuffix("+cpu") for name, (version, _) in (pins(PINS) | pins(torch)).items()}
        assert direct.items() <= pinned.items()


def test_both_builds_of_torch_are_pinned() -> None:
    """Each in a file of its own: pip takes the registry's wherever it may, and with it NVIDIA's libraries."""
    version, digest = CPU_BUILD
    assert pins(CPU_PINS) == {"torch": (f"{version}+cpu", {digest})}
    assert pins(CUDA_PINS)["torch"][0] == version
    assert "torch" not in pins(PINS)
    assert [name for name in pins(PINS) if name.startswith(("nvidia-", "cuda-"))] == []
