"""Builds the wheel against one version of torch, installs it elsewhere, and runs tests there.

    python3.12 tests/building/versions.py 2.10.0

The Python that runs this program is the one that is tested. It needs no package: everything happens in a temporary
folder, which is removed afterwards. The result goes into RESULTS, and from there into the table of docs/usage.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "usage.md"
BEGIN, END = "<!-- versions:begin -->\n", "<!-- versions:end -->\n"
COLUMNS = ("torch", "Python", "compiler", "CUDA kernels", "tests", "passed", "skipped", "failed")

TESTS = ["tests/kernels", "tests/dispatch", "tests/modules"]
TEST_PACKAGES = ["pytest", "pytest-xdist", "hypothesis", "numpy"]
# What tests of single ops compare with. pip takes the torchvision that belongs to the torch.
OTHER_LIBRARIES = ["torchvision", "timm", "onnx", "onnxscript", "onnxruntime"]


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **environment: str) -> str:
    """What the command printed; ends the program, with all of that, where it fails and `check` is set."""
    print("+", *command, flush=True)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def build_requirements() -> list[str]:
    """Those of pyproject.toml, which a build without isolation expects in the environment."""
    listed = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert listed is not None
    return ast.literal_eval(listed[1])


def environment(folder: Path, torch: str | None, libraries: list[str]) -> Path:
    """The Python of a new virtual environment with that torch, by default the newest that pip finds."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    install = [python, "-m", "pip", "install"]
    if uv := shutil.which("uv"):  # in a tenth of the time
        install = [uv, "pip", "install", "--python", python]
    chosen = f"torch=={torch}" if torch else "torch"
    run(*install, "--quiet", chosen, *build_requirements(), *TEST_PACKAGES, *libraries)
    return python


def wheel(python: Path, folder: Path, kernels: Path | None) -> Path:
    """A wheel, built from the source distribution."""
    run(python, "setup.py", "--quiet", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    if kernels is not None:
        take_kernels(kernels, source)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    [built] = folder.glob("*.whl")
    return built


def take_kernels(compiled: Path, source: Path) -> None:
    """Gives a build the CPU kernels of another one. They know no torch and no Python."""
    build = source / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    objects = sorted(compiled.glob("csrc/cpu/kernels/**/*.o"))
    if not objects:
        sys.exit(f"--kernels: no csrc/cpu/kernels/*.o in {compiled}")
    newest = max(file.stat().st_mtime for file in (ROOT / "csrc/cpu/kernels").rglob("*.*"))
    if any(file.stat().st_mtime < newest for file in objects):
        sys.exit(f"--kernels: a kernel's source is newer than what is in {compiled}; build there first")
    for file in objects:
        to = build / file.relative_to(compiled)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)  # which makes it newer than the sources


def test(python: Path, folder: Path, tests: list[str]) -> dict[str, int]:
    """How many tests passed, were skipped, and failed. They run in a copy, beside which no sources lie."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    report = folder / "report.xml"
    said = run(
        python, "-m", "pytest", "--quiet", "-n", "2", "--dist", "worksteal", f"--junitxml={report}", *tests,
        cwd=folder, check=False, OMP_WAIT_POLICY="passive",
    )  # fmt: skip
    print(said, flush=True)
    if not report.exists():
        sys.exit("pytest wrote no report")
    counts = xml.parse(report).getroot().find("testsuite")
    assert counts is not None
    total, skipped, failures, errors = (int(counts.get(key, 0)) for key in ("tests", "skipped", "failures", "errors"))
    failed = failures + errors
    return {"passed": total - skipped - failed, "skipped": skipped, "failed": failed}


def try_version(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of the table."""
    libraries = [] if options.without_libraries else OTHER_LIBRARIES
    python = environment(folder / "environment", options.torch, libraries)
    built = wheel(python, folder, options.kernels)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", built)
    print(built.name, run(python, "-m", "se_ext", cwd=folder), sep="\n", flush=True)
    facts = "import torch, se_ext; print(torch.__version__, bool(se_ext._C.cuda_toolkit()), se_ext._C.compiler())"
    torch, cuda, compiler = run(python, "-c", facts, cwd=folder).split(maxsplit=2)
    return {
        "torch": torch,
        "Python": platform.python_version(),
        "compiler": compiler.strip(),
        "CUDA kernels": {"True": "built", "False": "not built"}[cuda],
        "tests": " ".join(options.tests),
        **test(python, folder, options.tests),
    }


def order(row: dict[str, Any]) -> tuple[list[int], list[int], str]:
    return numbers(row["torch"]), numbers(row["Python"]), row["compiler"]


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])]


def record(row: dict[str, Any]) -> None:
    """Puts the row into RESULTS, in the place of an older one of the same versions."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = ("torch", "Python", "compiler")
    rows = [old for old in rows if any(old[name] != row[name] for name in key)]
    RESULTS.write_text(json.dumps(sorted([*rows, row], key=order), indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, ["---"] * 5 + ["---:"] * 3]
    for row in rows:
        tests = ", ".join(f"`{name}`" for name in row["tests"].split())
        lines.append([tests if column == "tests" else str(row[column]) for column in COLUMNS])
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page, with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(rows) + END + after


def main() -> int:
    """Returns the exit status: 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("torch", nargs="?", help="a version of torch; by default the newest that pip finds")
    parser.add_argument("--tests", nargs="+", default=TESTS, help=f"what pytest runs; by default {' '.join(TESTS)}")
    parser.add_argument("--kernels", type=Path, help="a folder build/temp.* whose compiled CPU kernels are taken")
    parser.add_argument("--without-libraries", action="store_true", help=f"don't install {', '.join(OTHER_LIBRARIES)}")
    options = parser.parse_args()
    os.environ.setdefault("FORCE_CUDA", "0")
    with tempfile.TemporaryDirectory(prefix="se_ext_versions_") as folder:
        row = try_version(options, Path(folder))
    record(row)
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(RESULTS.read_text())))
    print(row)
    return 1 if row["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
