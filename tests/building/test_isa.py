"""Every instruction set computes the right numbers, and no code of one leaks into another or into torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT, TESTS

from se_ext import _C

pytestmark = pytest.mark.cpu_only

LIBRARY = ROOT / "se_ext" / "libse_ext.so"
ALL = ["baseline", "avx2", "avx512"]

# Values and gradients over dtypes, layouts, odd sizes, activations and gates; conversions of every half bit pattern.
SELF_CHECK = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch, se_ext
from helpers import ACTIVATIONS, DTYPES, GATES, HALF, check_against_float64, make_map, make_weights
from se_ext import _C, reference

torch.manual_seed(1)
SHAPES = [(2, 3, 1, 1), (5, 19, 5, 7), (3, 33, 3, 11), (4, 70, 2, 2), (1, 16, 8, 8), (2, 130, 3, 3), (1, 2, 97, 67)]
checks = 0
for dtype in DTYPES:
    for channels_last in (False, True):
        for i, shape in enumerate(SHAPES * 2):
            n, c, h, w = shape
            hidden = (13, 16, 37)[i % 3]
            act, gate = ACTIVATIONS[i % 9], GATES[i % 5]
            post = ["identity", "relu", "silu", "gelu", "hardswish"][(i + i // 5) % 5]
            x, residual = (make_map(shape, dtype, channels_last, requires_grad=True) for _ in range(2))
            weight_dtype = torch.float32 if dtype in HALF and i % 2 else dtype
            length = h * w * c * max(n, hidden)
            tensors = [x, *make_weights(c, hidden, weight_dtype, requires_grad=True), residual if i < 7 else None]
            check_against_float64(
                lambda x, w1, b1, w2, b2, r: se_ext.squeeze_excite(x, w1, b1, w2, b2, act, gate, r, post),
                lambda x, w1, b1, w2, b2, r: reference.squeeze_excite(x, w1, b1, w2, b2, act, gate, r, post),
                tensors,
                (length, length),
            )
            checks += 1
    for activation in ACTIVATIONS:
        x = torch.cat([torch.linspace(-12, 12, 1003), torch.linspace(-90, 90, 1003)])[None, None].to(dtype)
        x.requires_grad_()
        check_against_float64(
            lambda x: se_ext.rescale(x, torch.ones(1, 1, dtype=dtype), None, activation),
            lambda x: reference.rescale(x, torch.ones(1, 1, dtype=torch.float64), None, activation),
            [x],
            (1, 1),
            (x.detach().abs() != 3).to(dtype),  # hardswish's kink
        )
        checks += 1
for dtype in HALF:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1024, 64)
    x = torch.cat([x, x[..., :3]], dim=2)
    for scale in (1.0, 1 / 3, 3e4, 2.0**-20):
        y = se_ext.rescale(x, torch.full((1, 1024), scale))
        expected = (x.float() * scale).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        bits, expected_bits = (t.masked_fill(t.isnan(), 0).view(torch.int16) for t in (y, expected))
        assert torch.equal(bits, expected_bits), (dtype, scale)
        checks += 1
torch.manual_seed(0)
print(_C.cpu_capability(), checks, se_ext.squeeze(torch.randn(1, 64, 56, 56)).double().sum().item().hex())
"""


def run_python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("SE_EXT_CPU_ISA", "SE_EXT_REQUIRE_ISA")}
    if isa is not None:
        env["SE_EXT_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


@cache
def self_check(isa: str) -> list[str]:
    """[the instruction set in use, the number of checks, a sum as it came out]"""
    done = run_python(SELF_CHECK, isa)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("isa", ALL)
def test_each_instruction_set(isa):
    if isa not in _C.cpu_capabilities():
        assert os.environ.get("SE_EXT_REQUIRE_ISA") != isa, f"this build or CPU has no {isa}"
        pytest.skip(f"this build or CPU has no {isa}")
    assert self_check(isa)[:2] == [isa, str(4 * (2 * 14 + 9) + 2 * 4)]


def test_instruction_sets_are_not_one_and_the_same():
    """Sums of different widths round differently, so a switch that switches nothing shows."""
    available = _C.cpu_capabilities()
    if len(available) < 2:
        pytest.skip("one instruction set")
    assert len({self_check(isa)[2] for isa in available}) == len(available)


def test_the_widest_is_the_default():
    done = run_python("from se_ext import _C; print(_C.cpu_capability())", None)
    assert done.stdout.split() == [_C.cpu_capabilities()[-1]]
    assert _C.cpu_capabilities() == ALL[: len(_C.cpu_capabilities())]


@pytest.mark.parametrize("call", ["se_ext._C.cpu_capability()", "se_ext.squeeze(torch.ones(1, 1, 1))"])
def test_unknown_instruction_set(call):
    """A ValueError that says what it expected and what came."""
    names = ["sse9", "AVX2", ""]
    done = run_python(
        f"""
import os, torch, se_ext._C
for name in {names}:
    os.environ["SE_EXT_CPU_ISA"] = name
    try:
        {call}
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
""",
        None,
    )
    expected = "ValueError SE_EXT_CPU_ISA: expected one of baseline, avx2, avx512, got "
    assert done.stdout.splitlines() == [f'{expected}"{name}"' for name in names], done.stderr


# ---- what the object files define ----


def tool(name: str, *arguments: object) -> str:
    if shutil.which(name) is None:
        missing(f"no {name}")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def missing(what: str) -> None:
    if os.environ.get("SE_EXT_REQUIRE_BUILD_TREE") == "1":
        pytest.fail(what)
    pytest.skip(what)


def static_libraries() -> list[Path]:
    """Of the newest build."""
    found = sorted(ROOT.glob("build/temp*/libse_ext_*.a"), key=lambda p: p.stat().st_mtime)
    if not found:
        missing("no build tree: build/temp*/libse_ext_*.a")
    return [p for p in found if p.parent == found[-1].parent]


def foreign_symbols(nm_output: str, isa: str) -> list[str]:
    """The symbols that other object files could see or replace and that lie outside se_ext::cpu::<isa>."""
    own = re.compile(rf"_Z(GV|GR|TV|TI|TS|TT|TW|TH|Z)*NK?6se_ext3cpu{len(isa)}{isa}")
    foreign = []
    for line in nm_output.splitlines():
        match = re.fullmatch(r"(?:[0-9a-f]+)? +([A-Zuvw]) (\S+)", line)
        if match and match[1] not in "Uw" and not own.match(match[2]):
            foreign.append(match[2])
    return foreign


def test_kernels_define_nothing_outside_their_namespace():
    """A weak symbol shared by two instruction sets would be the linker's choice, and a crash on lesser machines."""
    tables = {"kernels": "5table", "depthwise": "15depthwise_table"}
    libraries = {p.stem: p for p in static_libraries()}
    for isa in _C.cpu_capabilities():
        for folder, table in tables.items():
            symbols = tool("nm", libraries[f"libse_ext_{folder}_{isa}"])
            assert f"_ZN6se_ext3cpu{len(isa)}{isa}{table}Ev" in symbols
            assert foreign_symbols(symbols, isa) == []


def test_foreign_symbols_are_found():
    lines = """
0000000000000000 T _ZN6se_ext3cpu4avx25tableEv
0000000000000000 W _ZN6se_ext3cpu4avx27squeezeIfEEvRKNS_4SlabE
0000000000000000 t _ZL6helperv
                 U memset
0000000000000000 u _ZGVZN6se_ext3cpu4avx25tableEvE5table
0000000000000000 W _ZN6se_ext3cpu6squeezeEv
0000000000000000 W _ZSt3minIlERKT_S2_S2_
0000000000000000 T exported
0000000000000000 V _ZN6se_ext3cpu6avx5125tableEv
"""
    assert foreign_symbols(lines, "avx2") == [
        "_ZN6se_ext3cpu6squeezeEv",
        "_ZSt3minIlERKT_S2_S2_",
        "exported",
        "_ZN6se_ext3cpu6avx5125tableEv",
    ]


def wide_instructions(disassembly: str) -> set[tuple[str, str]]:
    """("avx512" or "avx2", the function) of instructions that need that much, outside the kernels compiled for it."""
    needs_avx512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b")
    needs_avx = re.compile(r"\tv(?!err|erw)|%ymm")
    found, function, own = set(), "", ""
    for line in disassembly.splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
            own = next((isa for isa in ("avx512", "avx2") if f"cpu{len(isa)}{isa}" in function), "")
        elif own != "avx512" and needs_avx512.search(line):
            found.add(("avx512", function))
        elif own == "" and needs_avx.search(line):
            found.add(("avx2", function))
    return found


def test_wide_instructions_stay_in_their_kernels():
    """All that runs on every CPU, reached by a test or not, does without AVX; the AVX2 kernels without AVX-512."""
    for library in (LIBRARY, Path(_C.__file__)):
        disassembly = tool("objdump", "--disassemble", "--no-show-raw-insn", library)
        assert wide_instructions(disassembly) == set()
    symbols = tool("nm", LIBRARY)
    assert all(f"cpu{len(isa)}{isa}" in symbols for isa in _C.cpu_capabilities())  # the names are there to be found


def test_wide_instructions_are_found():
    lines = """
0000000000001000 <_ZN6se_ext3cpu6avx5127squeezeEv>:
    1000:\tvaddps %zmm0,%zmm1,%zmm2
0000000000001010 <_ZN6se_ext3cpu4avx27squeezeEv>:
    1010:\tvaddps %ymm0,%ymm1,%ymm2
    1014:\tvmovups %xmm16,%xmm1
0000000000001020 <_ZN6se_ext3cpu8Schedule2ofEv>:
    1020:\tmovups (%rdi),%xmm0
    1024:\tverr   %ax
    1028:\tret
0000000000001030 <_ZN6se_ext5namesEv.cold>:
    1030:\tvmovdqu (%rdi),%xmm15
0000000000001040 <_ZN6se_ext8baselineEv>:
    1040:\tkmovw  %k1,%eax
"""
    assert wide_instructions(lines) == {
        ("avx512", "_ZN6se_ext3cpu4avx27squeezeEv"),
        ("avx2", "_ZN6se_ext5namesEv.cold"),
        ("avx512", "_ZN6se_ext8baselineEv"),
    }


@pytest.mark.parametrize("level", [2, 3])
def test_caches_are_those_that_a_core_can_use(level):
    """The schedules depend on them; sysconf, the obvious source, adds up the last caches of the chip."""
    sizes = {
        (int((cache / "level").read_text()), (cache / "type").read_text().strip()): (cache / "size").read_text().strip()
        for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    }
    size = sizes.get((level, "Unified"))
    expected = {2: 1 << 20, 3: 16 << 20}[level] if size is None else int(size.removesuffix("K")) << 10
    assert _C.cache_bytes(level) == expected


def undefined_symbols() -> list[str]:
    lines = tool("nm", "-D", "--undefined-only", LIBRARY).splitlines()
    symbols = [line.split()[-1] for line in lines]
    assert "GOMP_parallel" in {s.split("@")[0] for s in symbols}  # the listing works, and the library is parallel
    return symbols


def test_library_needs_no_python():
    """C++ programs load it: no symbol of the Python C API, and no libpython or libtorch_python."""
    assert [s for s in undefined_symbols() if re.match(r"_?Py", s)] == []
    assert [n for n in needed() if "python" in n] == []


def test_library_brings_no_openmp_runtime():
    """torch's is the one in the process."""
    assert [n for n in needed() if re.match(r"lib(gomp|omp|iomp)", n)] == []


def needed() -> list[str]:
    found = re.findall(r"NEEDED\s+(\S+)", tool("objdump", "-p", LIBRARY))
    assert "libc10.so" in found
    return found
