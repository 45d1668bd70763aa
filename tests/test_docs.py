"""The documents are right: their code runs, their links lead somewhere, and what they name exists.

Python blocks of a page run in order, in one namespace. In shell blocks, targets of make are looked up in the Makefile,
and `python -m se_ext` is run. A block that cannot run here has an HTML comment in front of it: `<!-- not run: why -->`.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import se_ext
from se_ext.__main__ import report

pytestmark = pytest.mark.cpu_only

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
README = ROOT / "README.md"
USAGE = ROOT / "docs" / "usage.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
GENERATED = ("benchmarks.md", "targets.md")  # of docs/, written by `make readme`


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language, the number of its first line of code, and why it is not run, if so."""

    page: Path
    language: str
    line: int
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    begin: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = number
            continue
        comment = re.fullmatch(r"<!-- not run: (.*) -->", lines[begin - 1])
        code = "\n".join(lines[begin + 1 : number])
        yield Block(page, lines[begin].removeprefix("```"), begin + 2, code, comment and comment[1])
        begin = None
    assert begin is None, f"{page}:{begin}: a block of code without an end"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PAGES_WITH_PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def quoted(page: Path) -> list[str]:
    """What stands between backticks in the page's prose."""
    return re.findall(r"`([^`]+)`", prose(page))


# ---- code ----


def run_python(page: Path, last: str | None = None) -> dict[str, Any]:
    """Runs the page's Python blocks, up to the first that contains `last`; the namespace that they leave."""
    importlib.import_module("torchvision_shim")  # timm imports torchvision
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python" and block.not_run is None:
            # Empty lines in front, so that a traceback shows the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
            if last is not None and last in block.code:
                return namespace
    assert last is None, f"no block of {page} contains {last!r}"
    return namespace


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name)
def test_python_blocks_run(page: Path) -> None:
    run_python(page)


def test_the_main_pages_have_python_blocks() -> None:
    assert {README, USAGE} <= set(PAGES_WITH_PYTHON)


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_language_that_is_tested(block: Block) -> None:
    if block.not_run is None:
        assert block.language in ("python", "sh")
    else:
        assert block.not_run.strip()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh" and b.not_run is None], ids=str)
def test_shell_blocks_name_commands_that_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for line in block.code.splitlines():
        command = shlex.split(line, comments=True)
        if command[0] == "make":
            target, *variables = command[1:]
            assert target in make_targets()
            makefile = (ROOT / "Makefile").read_text()
            for variable in variables:
                assert f"$({variable.split('=')[0]})" in makefile
        else:
            assert command[:2] == ["python", "-m"], f"a command that this test does not know: {line}"
            assert importlib.util.find_spec(f"{command[2]}.__main__") is not None
            if command[2:] == ["se_ext"]:
                subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_targets_of_make_exist(page: Path) -> None:
    named = {words.split()[1] for words in quoted(page) if re.match(r"make [a-z]", words)}
    assert named <= make_targets()


# ---- what the code blocks claim ----


@pytest.mark.parametrize(
    ("page", "last", "model"),
    [
        (README, "create_model", "efficientnet_b0"),
        (USAGE, "efficientnet_b0", "efficientnet_b0"),
        (USAGE, "mobilenetv3_large_100", "mobilenetv3_large_100"),
    ],
    ids=["README", "usage: efficientnet", "usage: mobilenet"],
)
def test_timms_checkpoint_loads_into_the_network_of_the_page(
    page: Path, last: str, model: str, restore_threads: None
) -> None:
    torch.set_num_threads(1)  # a hundred small layers: on a busy machine their threads wait for one another
    namespace = run_python(page, last)
    timm = namespace["timm"]
    network = namespace["network"]
    if page == README:  # whose block goes on to another network
        network = timm.create_model(model)
        assert len(se_ext.convert(network).converted) > 60
    else:
        assert sum(isinstance(module, se_ext.SqueezeExcitation) for module in network.modules()) >= 8
        assert not any(type(module).__name__ == "SqueezeExcite" for module in network.modules())
    theirs = timm.create_model(model).double().eval()
    for p in theirs.parameters():
        if p.dim() == 1:  # biases are 0 and batch norms the identity until a network is trained
            torch.nn.init.uniform_(p, 0.5, 1.0)
    network.double().eval().load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-9, atol=1e-9)


# ---- links ----


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README.read_text()))
    assert {name(page) for page in ROOT.glob("docs/*.md")} <= linked


# ---- names ----


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = {words for words in quoted(page) if re.fullmatch(r"test_\w+\.py", words)}
    assert named <= {file.name for file in ROOT.glob("tests/**/test_*.py")}


def test_every_promise_has_a_test() -> None:
    rows = [line.split("|")[-2].strip() for line in (ROOT / "docs/promises.md").read_text().splitlines() if "|" in line]
    rows = [row for row in rows if row not in ("test", "---")]
    assert len(rows) > 30
    proof = r"`(test_\w+\.py|make [a-z-]+)`"
    assert not [row for row in rows if not re.fullmatch(rf"{proof}(, {proof})*", row)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Those with their folder; not patterns, as in csrc/cpu/<op>.cpp."""
    folders = r"(csrc|se_ext|tests|benchmarks|docs|examples|\.ci)/[\w./-]*"
    for words in quoted(page):
        if re.fullmatch(folders, words):
            assert (ROOT / words).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_of_the_library_exist(page: Path) -> None:
    for path in re.findall(r"(?<![\w.])se_ext\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", " ".join(quoted(page))):
        value: Any = se_ext
        for part in path.split("."):
            assert hasattr(value, part), f"se_ext.{path}"
            value = getattr(value, part)


def test_the_readme_lists_the_public_names() -> None:
    """A row may have several in its first cell."""
    cells = re.findall(r"^\| (`se_ext\.\w+`(?:, `se_ext\.\w+`)*) \|", README.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`se_ext\.(\w+)`", " ".join(cells))) == set(se_ext.__all__)


def test_usage_lists_the_lines_of_the_report() -> None:
    section = USAGE.read_text().split("## What was built, and what runs")[1]
    rows = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert rows == [*(label for label in report() if label != "GPU"), "GPU"]


@pytest.mark.parametrize(
    ("heading", "known"),
    [("- Activations: ", se_ext.reference.ACTIVATIONS), ("- Gates: ", se_ext.reference.GATES)],
    ids=["activations", "gates"],
)
def test_usage_lists_activations_and_gates(heading: str, known: dict[str, Any]) -> None:
    [line] = [line for line in USAGE.read_text().splitlines() if line.startswith(heading)]
    assert re.findall(r"`(\w+)`", line) == list(known)


# ---- form ----


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize(("page", "region"), [(README, "speed"), (ROOT / "docs/gpu.md", "gpu")], ids=["speed", "gpu"])
def test_generated_regions(page: Path, region: str) -> None:
    marks = re.findall(r"^<!-- (\w+:(?:begin|end)) -->$", page.read_text(), flags=re.MULTILINE)
    assert marks == [f"{region}:begin", f"{region}:end"]


@pytest.mark.parametrize("page", [p for p in sorted(ROOT.glob("docs/*.md")) if p.name not in GENERATED], ids=name)
def test_a_page_begins_with_its_question(page: Path) -> None:
    first = page.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith("?")


def test_one_version() -> None:
    version = re.escape(se_ext.__version__)
    assert re.search(rf'^version = "{version}"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert re.search(rf"^Version {version}\b", README.read_text(), flags=re.MULTILINE)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == se_ext.__version__
