"""C++ programs: CMake builds, tests and installs the library; the program of examples/cpp computes what Python does.

`make cpp` runs what is slow, with SE_EXT_REQUIRE_CMAKE=1, which turns a missing cmake or libjpeg into a failure. The
library is built for the baseline alone, in build/cmake. The commands of docs/cpp.md are run as they stand there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from test_build import build_kernels, made_up_compiler
from test_docs import blocks_of

import se_ext
import setup_cuda

pytestmark = pytest.mark.cpu_only

PAGE = ROOT / "docs" / "cpp.md"
EXAMPLE = ROOT / "examples" / "cpp"
BUILD = ROOT / "build" / "cmake"
TORCH = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
SETS = ["baseline", "avx2", "avx512"] if platform.machine() == "x86_64" else ["baseline"]


def require(found: bool, what: str) -> None:
    if not found and os.environ.get("SE_EXT_REQUIRE_CMAKE") == "1":
        pytest.fail(f"no {what}")
    if not found:
        pytest.skip(f"no {what}")


def run(command: Sequence[str | Path] | str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the command, of a shell if it is one string, printed; `python` in it is the Python of the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command if isinstance(command, str) else list(map(str, command)),
        shell=isinstance(command, str),
        cwd=cwd,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "CMAKE_GENERATOR": "Ninja"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def run_well(command: Sequence[str | Path] | str, cwd: Path, **environment: str) -> str:
    done = run(command, cwd, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def configure(*options: str | Path, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    require(shutil.which("cmake") is not None, "cmake")
    return run(["cmake", "-S", source, *options], cwd=ROOT, **environment)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What the failed configuration said, on one line: CMake wraps messages."""
    assert done.returncode == 1
    assert "Call Stack" in done.stdout or "CMake Error" in done.stdout
    return " ".join(done.stdout.split())


def commands(word: str) -> str:
    """The block of shell commands in docs/cpp.md that contains the word."""
    [code] = [block.code for block in blocks_of(PAGE) if block.language == "sh" and word in block.code]
    return f"set -e\n{code}"


# ---- what setup.py and CMakeLists.txt share ----


def test_the_version_and_the_paths_of_the_package() -> None:
    """Python's package holds CMake's, of its version and its torch."""
    assert Path(se_ext.library_path).samefile(Path(se_ext.__file__).parent / "libse_ext.so")
    folder = Path(se_ext.cmake_prefix_path) / "se_ext"
    assert f'set(PACKAGE_VERSION "{se_ext.__version__}")' in (folder / "se_extConfigVersion.cmake").read_text()
    config = (folder / "se_extConfig.cmake").read_text()
    assert f'VERSION_EQUAL "{torch.__version__.split("+")[0]}"' in config
    assert "@" not in config


def test_the_architectures_are_those_of_setup_cuda() -> None:
    [default] = re.findall(r'SE_EXT_CUDA_ARCHITECTURES "(.*)"', (ROOT / "cmake" / "cuda.cmake").read_text())
    *real, last = [f"{name.replace('.', '')}-real" for name in setup_cuda.DEFAULT_ARCHITECTURES]
    assert default == ";".join([*real, last.removesuffix("-real")])


def compile_commands(folder: Path, *options: str) -> dict[str, list[str]]:
    """Source below csrc → the words of the command with which CMake, configured in the folder, compiles it."""
    done = configure("-B", folder, TORCH, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
    assert done.returncode == 0, done.stdout
    entries = json.loads((folder / "compile_commands.json").read_text())
    files = {Path(entry["file"]): shlex.split(entry["command"]) for entry in entries}
    csrc = ROOT / "csrc"
    return {file.relative_to(csrc).as_posix(): words for file, words in files.items() if csrc in file.parents}


def sources(pattern: str) -> set[str]:
    """Below csrc, but for the bindings for Python."""
    csrc = ROOT / "csrc"
    return {file.relative_to(csrc).as_posix() for file in csrc.glob(pattern) if file.name != "bindings.cpp"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return compile_commands(tmp_path_factory.mktemp("configured"))


def kernel_files() -> set[str]:
    """Of this processor's instruction sets."""
    return {f"cpu/kernels/{folder}{name}.cpp" for folder in ("", "depthwise/") for name in SETS}


@pytest.mark.slow
def test_cmake_compiles_the_same_sources(compiled: dict[str, list[str]]) -> None:
    """All but csrc/cuda, which has an option; of the kernels those of this processor."""
    others = sources("**/*.cpp") - sources("cuda/*.cpp") - sources("cpu/kernels/**/*.cpp")
    assert set(compiled) == others | kernel_files()


@pytest.mark.slow
def test_cmake_compiles_the_kernels_with_the_same_flags(compiled: dict[str, list[str]], tmp_path: Path) -> None:
    """But for those that Python was built with, which it adds to all extensions."""
    printed = build_kernels(tmp_path, "-v").stdout
    pythons = set(shlex.split(" ".join(map(str, sysconfig.get_config_vars("CFLAGS", "CCSHARED")))))
    for name in kernel_files():
        [theirs] = re.findall(rf".* -c csrc/{re.escape(name)} .*", printed)
        flags, expected = (
            {word for word in words if re.match(r"-(std=|O|m|f|W)", word)}
            for words in (compiled[name], shlex.split(theirs))
        )
        assert flags <= expected
        assert expected - flags <= pythons


@pytest.mark.slow
def test_cmake_compiles_cuda_as_setup_cuda_does(tmp_path: Path) -> None:
    toolkit = setup_cuda.find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc")
    compiled = compile_commands(
        tmp_path, "-DSE_EXT_CUDA=ON", "-DSE_EXT_CUDA_ARCHITECTURES=80-real;90", f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}"
    )
    kernels = sources("cuda/kernels/*.cu")
    assert {name for name in compiled if name.startswith("cuda/")} == sources("cuda/*.cpp") | kernels
    assert "no_cuda.cpp" not in compiled
    assert any("8.0 9.0+PTX" in word for word in compiled["cuda/info.cpp"])

    host = [f"-Xcompiler={flag}" for flag in setup_cuda.HOST_FLAGS.removeprefix("-Xcompiler=").split(",")]
    flags = [flag for flag in setup_cuda.NVCC_FLAGS if not flag.startswith("-I") and flag != setup_cuda.HOST_FLAGS]
    for name in kernels:
        assert {*flags, *host} <= set(compiled[name])
        assert [word for word in compiled[name] if word.startswith("-std=")] == ["-std=c++20"]
        architectures = [word.split("=", 1)[1] for word in compiled[name] if word.startswith("--generate-code")]
        assert architectures == ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[compute_90,sm_90]"]


@pytest.mark.slow
def test_cmake_compiles_the_ops_for_openmp_and_does_not_link_it(compiled: dict[str, list[str]]) -> None:
    assert {"-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden"} <= set(compiled["cpu/parallel.cpp"])


# ---- what a configuration says that cannot work ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "se_ext: no torch 2.10 or newer found"),
        (
            [TORCH, "-DSE_EXT_INSTRUCTION_SETS=baseline;sse9"],
            f'to be baseline and others of {";".join(SETS)} ({platform.machine()}), got "baseline;sse9"',
        ),
        ([TORCH, "-DSE_EXT_INSTRUCTION_SETS=avx2"], 'got "avx2"'),
        ([TORCH, "-DSE_EXT_CUDA=ON"], "SE_EXT_CUDA=ON, but there is no nvcc that works"),
    ],
    ids=["no torch", "unknown instruction set", "no baseline", "no nvcc"],
)
def test_a_configuration_that_cannot_work_says_so(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in said(configure("-B", tmp_path, *options, CUDACXX="/nowhere/nvcc"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        ('exec {} -U__GNUC__ -D__GNUC__=11 "$@"', "se_ext: expected GCC 12 or newer, got GCC 11."),
        (
            'for word; do case $word in *.cxx) grep -q "pragma omp" $word && exit 1;; esac; done; exec {} "$@"',
            "makes of an OpenMP loop does not link with the OpenMP runtime that",
        ),
    ],
    ids=["an old GCC", "another OpenMP"],
)
def test_a_compiler_that_cannot_build_it_is_refused(stand_in: str, message: str, tmp_path: Path) -> None:
    compiler = made_up_compiler(tmp_path / "c++", stand_in.format(shutil.which("g++")))
    assert message in said(configure("-B", tmp_path / "build", TORCH, f"-DCMAKE_CXX_COMPILER={compiler}"))


def find_package(tmp_path: Path, asked: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Configures a project that does nothing but find_package(se_ext …) with the Python package on its path."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(program LANGUAGES CXX)\n"
        f"list(APPEND CMAKE_PREFIX_PATH {se_ext.cmake_prefix_path})\nfind_package(se_ext {asked} REQUIRED)\n"
    )
    return configure("-B", tmp_path / "build", *options, source=tmp_path)


@pytest.mark.slow
def test_a_program_without_torch_is_told_which_one(tmp_path: Path) -> None:
    assert f"se_ext needs torch {torch.__version__.split('+')[0]}, and no" in said(find_package(tmp_path, ""))


@pytest.mark.slow
def test_a_program_with_another_torch_is_refused(tmp_path: Path) -> None:
    """Another version, or the library would not load, or crash."""
    (tmp_path / "TorchConfig.cmake").write_text("set(Torch_FOUND TRUE)\n")
    (tmp_path / "TorchConfigVersion.cmake").write_text(
        "set(PACKAGE_VERSION 2.10.0)\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n"
    )
    running = torch.__version__.split("+")[0]
    message = f"se_ext was built against torch {running}, but torch 2.10.0 was found ({tmp_path})"
    assert message in said(find_package(tmp_path, "", f"-DTorch_DIR={tmp_path}"))


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "found"), [("0.1", True), ("0.1.0 EXACT", True), ("0.2", False), ("0.1.9", False)])
def test_find_package_takes_versions_of_the_same_series(asked: str, found: bool, tmp_path: Path) -> None:
    done = find_package(tmp_path, asked, TORCH)
    assert (done.returncode == 0) == found, done.stdout


# ---- build, test, install ----


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which the commands of docs/cpp.md have installed the library, built for the baseline."""
    require(shutil.which("cmake") is not None, "cmake")
    home = tmp_path_factory.mktemp("home")
    limited = "cmake -S . -B build/cmake -DSE_EXT_INSTRUCTION_SETS=baseline -DSE_EXT_BUILD_TESTS=ON"
    run_well(commands("--install").replace("cmake -S . -B build/cmake", limited), ROOT, HOME=str(home))
    return home


@pytest.mark.slow
def test_the_ops_in_a_cpp_program(home: Path) -> None:
    """Values, gradients, in place, an error, threads, one OpenMP runtime, instruction sets, and dlopen."""
    run_well("ctest --output-on-failure --no-tests=error", BUILD, OMP_NUM_THREADS="2")


@pytest.mark.slow
def test_the_installed_library_is_like_pythons(home: Path) -> None:
    """It takes OpenMP's symbols from torch's runtime, exports no others than Python's, and needs no Python."""

    def exported(library: Path | str) -> set[str]:
        lines = run_well(["nm", "-DC", "--defined-only", library], ROOT).splitlines()
        return {line.split(maxsplit=2)[2] for line in lines if " T " in line and "se_ext::" in line}

    library = home / "se_ext" / "lib" / "libse_ext.so"
    dynamic = run_well(["objdump", "-p", library], ROOT)
    needed = re.findall(r"NEEDED\s+(\S+)", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if re.match(r"lib(gomp|omp|iomp|.*python)", name)] == []
    assert "RUNPATH" not in dynamic
    assert exported(library) == exported(se_ext.library_path)
    assert {path.name for path in library.parent.glob("cmake/se_ext/*")} == {
        "se_extConfig.cmake", "se_extConfigVersion.cmake",
    }  # fmt: skip


# ---- the program of examples/cpp ----


@pytest.fixture(scope="module")
def photograph() -> Path:
    datasets = pytest.importorskip("sklearn.datasets")
    return Path(datasets.__file__).parent / "images" / "china.jpg"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory, photograph: Path) -> Path:
    """A folder with what prepare.py writes."""
    folder = tmp_path_factory.mktemp("networks")
    shutil.copy(photograph, folder)
    shutil.copy(EXAMPLE / "prepare.py", folder)
    run_well(commands("prepare.py").splitlines()[1], folder, OMP_NUM_THREADS="1")
    return folder


def build_example(folder: Path, word: str, home: Path) -> Path:
    """The example, copied and built by the commands that contain the word, and beside it what forgot the library."""
    header = run("echo '#include <cstdio>\n#include <jpeglib.h>' | ${CXX:-g++} -E -x c++ -", ROOT)
    require(header.returncode == 0, "libjpeg (Debian: libjpeg-dev)")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    with (folder / "CMakeLists.txt").open("a") as file:
        file.write("add_executable(forgetful $<TARGET_OBJECTS:classify>)\n")
        file.write("target_link_libraries(forgetful PRIVATE ${TORCH_LIBRARIES} JPEG::JPEG)\n")
    run_well(commands(word), folder, HOME=str(home), LDFLAGS="-Wl,--as-needed")
    return folder / "build"


@pytest.fixture(scope="module")
def with_cmake(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    return build_example(tmp_path_factory.mktemp("with_cmake"), "$HOME/se_ext", home)


@pytest.fixture(scope="module")
def with_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_python")
    return build_example(folder, "se_ext.cmake_prefix_path", folder)


def read_logits(file: Path) -> torch.Tensor:
    return torch.tensor([float(line) for line in file.read_text().split()], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["seresnet18.pt", "seresnet18.pt2"])
@pytest.mark.parametrize("against", ["with_cmake", "with_python"])
def test_the_program_computes_what_python_does(
    against: str, model: str, networks: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program = request.getfixturevalue(against) / "classify"
    printed = run_well([program, model, "china.jpg", tmp_path / "logits"], networks, OMP_NUM_THREADS="2")

    ours, expected = read_logits(tmp_path / "logits"), read_logits(networks / "logits.txt")
    assert ours.shape == expected.shape == (1000,)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()

    *classes, time = printed.splitlines()
    numbers = [int(number) for number in re.findall(r"^class +(\d+) +[\d.]+ %$", "\n".join(classes), re.MULTILINE)]
    assert numbers == expected.topk(5).indices.tolist()
    assert re.fullmatch(r"[\d.]+ ms an image", time)


@pytest.mark.slow
@pytest.mark.parametrize("against", ["with_cmake", "with_python"])
def test_the_program_has_the_library_and_one_openmp_runtime(
    against: str, networks: Path, request: pytest.FixtureRequest
) -> None:
    """Although it calls none of its functions, and the linker was told to leave out what is not called."""
    folder = request.getfixturevalue(against)
    assert "libse_ext.so" not in run_well(["ldd", folder / "forgetful"], folder)
    printed = run_well([folder / "classify", "seresnet18.pt2", "china.jpg"], networks, LD_DEBUG="libs")
    loaded = [Path(file).name for file in re.findall(r"calling init: (\S+)", printed)]
    assert loaded.count("libse_ext.so") == 1
    assert len([name for name in loaded if re.match(r"lib(gomp|omp|iomp5)", name)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["seresnet18.pt", "seresnet18.pt2"])
def test_the_error_without_the_library_is_the_one_on_the_page(model: str, with_python: Path, networks: Path) -> None:
    script, package = (block.code for block in blocks_of(PAGE) if block.language == "text")
    done = run([with_python / "forgetful", model, "china.jpg"], networks)
    assert done.returncode == 1
    assert done.stdout.strip().startswith(script if model.endswith(".pt") else package), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"), [("missing.pt", "missing.pt"), ("seresnet18.pt", "cannot open the photograph missing.jpg")]
)
def test_a_missing_file_is_named(model: str, message: str, with_python: Path, networks: Path) -> None:
    done = run([with_python / "classify", model, "missing.jpg"], networks)
    assert done.returncode == 1
    assert message in done.stdout


# ---- TorchScript ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["module", "network"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_frozen_and_optimised_in_cpp(how: str, what: str, home: Path, tmp_path: Path) -> None:
    network = what == "network"
    model = se_ext.models.seresnet18(num_classes=10) if network else se_ext.SqueezeExcitation(16, 4)
    channels = 3 if network else 16
    x = torch.randn(2, channels, 64, 64)
    made = torch.jit.script(model.eval()) if how == "script" else torch.jit.trace(model.eval(), x)
    made.save(tmp_path / "model.pt")
    run_well([BUILD / "tests" / "cpp" / "script_test", "model.pt", str(channels)], tmp_path, OMP_NUM_THREADS="1")
