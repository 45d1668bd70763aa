"""The CUDA part of setup.py: the switches, and errors that name them."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools.errors import SetupError

import setup_cuda
from se_ext import _C

pytestmark = pytest.mark.cpu_only

KNOWN = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TOOLKIT = setup_cuda.Toolkit("nvcc", "13.0", KNOWN, (), ())


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def find(toolkit: setup_cuda.Toolkit | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_cuda, "find_toolkit", lambda: toolkit)


@pytest.mark.parametrize(
    ("force", "torch_cuda", "built"),
    [("", None, False), ("", "13.0", True), ("0", "13.0", False), ("1", None, True), ("1", "13.2", True)],
)
def test_what_decides(force: str, torch_cuda: str | None, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FORCE_CUDA, else whether torch has CUDA."""
    find(TOOLKIT, monkeypatch)
    monkeypatch.setenv("FORCE_CUDA", force)
    assert setup_cuda.chosen_toolkit(torch_cuda) is (TOOLKIT if built else None)


def test_without_a_toolkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find(None, monkeypatch)
    assert setup_cuda.chosen_toolkit("13.0") is None
    assert "FORCE_CUDA=1" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SetupError, match="FORCE_CUDA=1: no nvcc in CUDA_HOME"):
        setup_cuda.chosen_toolkit("13.0")


def test_another_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    find(TOOLKIT, monkeypatch)
    with pytest.raises(SetupError, match=r"CUDA_HOME: .* CUDA 13.0, but torch was built with CUDA 12.8.*FORCE_CUDA=0"):
        setup_cuda.chosen_toolkit("12.8")


def test_an_unknown_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(SetupError, match='FORCE_CUDA: expected 0 or 1, got "yes"'):
        setup_cuda.chosen_toolkit(None)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", [*KNOWN[:-1], "12.0+PTX"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0a 8.0", ["9.0a", "8.0"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
    ],
)
def test_architectures(listed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert setup_cuda.architectures(TOOLKIT) == expected


def test_architectures_that_nvcc_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out of the default list, with a word; an error in a list of the user's."""
    older = setup_cuda.Toolkit("nvcc", "12.4", KNOWN[:5], (), ())
    assert setup_cuda.architectures(older) == [*KNOWN[:4], "9.0+PTX"]
    assert "does not know 10.0, 12.0" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    with pytest.raises(SetupError, match=r"TORCH_CUDA_ARCH_LIST: nvcc 12.4 knows .*, but not 10.0"):
        setup_cuda.architectures(older)


@pytest.mark.parametrize("listed", ["sm_90", "9", "native", "8.0,9.0"])
def test_a_malformed_list(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SetupError, match=f'TORCH_CUDA_ARCH_LIST: expected the likes of .*, got "{listed}"'):
        setup_cuda.architectures(TOOLKIT)


def test_flags() -> None:
    assert setup_cuda.architecture_flags(["8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_max_jobs_bounds_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nvcc here is a script that writes empty objects; what is up to date is not compiled again."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
echo begin >> {tmp_path}/log
sleep 0.2
for argument; do
  test "$option" = -o && : > "$argument"
  test "$option" = -MF && echo "made : {nvcc}" > "$argument"
  option=$argument
done
echo end >> {tmp_path}/log
""")
    nvcc.chmod(0o755)
    monkeypatch.chdir(Path(setup_cuda.__file__).parent)
    monkeypatch.setenv("MAX_JOBS", "2")
    toolkit = setup_cuda.Toolkit(str(nvcc), "13.0", KNOWN, (), ())
    objects = setup_cuda.compile_kernels(toolkit, ["8.0", "9.0"], str(tmp_path))
    assert all(Path(made).exists() for made in objects)

    events = (tmp_path / "log").read_text().split()
    running = [sum(1 if event == "begin" else -1 for event in events[: i + 1]) for i in range(len(events))]
    assert max(running) == 2
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "se_ext: compiling the CUDA kernels for 8.0 9.0, 2 at a time: some minutes"
    assert sorted(line.split(": ")[0] for line in lines) == sorted(map(str, setup_cuda.KERNELS.glob("*.cu")))

    assert setup_cuda.compile_kernels(toolkit, ["8.0", "9.0"], str(tmp_path)) == objects
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["libcudart.so", "libcudart.so.13"], "cudart"),
        (["libcudart.so.13"], ":libcudart.so.13"),
        (["libcudart.so.12"], "cudart"),  # another version: the linker says what it lacks
        ([], "cudart"),
    ],
)
def test_the_runtime_library_of_a_wheel_has_a_version_in_its_name(
    tmp_path: Path, files: list[str], expected: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert setup_cuda.runtime_library(setup_cuda.Toolkit("nvcc", "13.0", KNOWN, (), (str(tmp_path),))) == expected


def test_a_build_without_cuda_says_so() -> None:
    if _C.cuda_toolkit():
        pytest.skip("this build has CUDA")
    assert (_C.cuda_architectures(), _C.cuda_path(), _C.last_cuda_path()) == ([], "", "")
    with pytest.raises(ValueError, match=r"^set_cuda_path: se_ext was built without CUDA.*FORCE_CUDA=1"):
        _C.set_cuda_path("whole")
