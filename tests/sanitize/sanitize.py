"""The library under sanitizers: sanitize.py [--short] [--only address|thread] [--isa NAME…] [what pytest takes]

First AddressSanitizer and UndefinedBehaviorSanitizer under the tests of the ops, for each instruction set; then
ThreadSanitizer under a program that calls every op, for the baseline. Before each, mistakes on purpose must be found.
--short: the first alone, for the baseline, on the tests of values and shapes. In AVX2 and AVX-512 the ends of rows are
masked instructions, of which no sanitizer sees anything: there the baseline, and test_guard_pages.py, look.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import instrument
from instrument import HERE, ROOT

# Of the kernels, and what reaches them by other ways. Compilers and exporters are torch's code, and slow under a
# sanitizer; test_memory.py measures an allocator that AddressSanitizer replaces.
TESTS = [
    "kernels",
    "dispatch/test_errors.py",
    "dispatch/test_fallback.py",
    "dispatch/test_func.py",
    "dispatch/test_negative_views.py",
    "robust/test_fuzz.py",
    "robust/test_properties.py",
]
NOT_THESE = [
    f"--ignore={ROOT / 'tests/kernels/test_memory.py'}",
    # Reads beyond a tensor on purpose, and expects the signal itself.
    "--deselect=tests/kernels/test_depthwise.py::test_nothing_is_read_beyond_a_tensor",
]
SHORT = [
    "kernels/test_values.py",
    "kernels/test_shapes.py",
    "kernels/test_depthwise.py",
    *(f"kernels/test_precision.py::test_accuracy_of_{what}" for what in ("activations", "slopes", "gates")),
]

PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}"]
PYTEST += ["-p", "require_sanitizer"]
PATHS = f"{ROOT / 'tests'} {ROOT} {HERE}"  # behind the package with the sanitizers: ROOT has the ordinary one

# Memory comes filled with NaNs, so that a kernel that reads what nobody wrote is seen; an allocation that is too large
# fails as it does without the sanitizer. Python and torch don't free all of their memory at the end: no leak is looked
# for.
ADDRESS = {
    "detect_leaks": 0,
    "detect_stack_use_after_return": 1,
    "allocator_may_return_null": 1,
    "max_malloc_fill_size": (1 << 31) - 1,
    "malloc_fill_byte": 255,
}
MISTAKES = {
    "heap-buffer-overflow": "library.se_ext_write_past(ctypes.c_void_p(values.data_ptr()), count, more)",
    "use-after-poison": "library.se_ext_write_past_scratch(count, more)",
    "signed integer overflow": "library.se_ext_overflow(ctypes.c_int64(2**63 - 1))",
}


def of_the_compiler(library: str) -> str:
    """Where the compiler has its library of that name."""
    found = subprocess.run([instrument.CXX, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve(strict=True))


def options(**values: object) -> str:
    return ":".join(f"{name}={value}" for name, value in values.items())


class Reports:
    """What the sanitizers find, in files: pytest keeps the output of a process that AddressSanitizer ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def environment(self) -> dict[str, str]:
        to_file = {"log_path": self.folder / "report"}
        return {
            # The sanitizer comes before all others, and finds __cxa_throw only in a libstdc++ that is there from the
            # start.
            "LD_PRELOAD": " ".join(of_the_compiler(name) for name in ("libasan.so", "libstdc++.so")),
            "ASAN_OPTIONS": options(**ADDRESS, **to_file),
            "UBSAN_OPTIONS": options(print_stacktrace=1, **to_file),
        }

    def take(self) -> str:
        """All of them, but what is no finding: that an allocation is too large, which tests ask for."""
        text = ""
        for file in sorted(self.folder.iterdir()):
            report = file.read_text(errors="replace")
            text += report if "ERROR: " in report or "runtime error: " in report else ""
            file.unlink()
        return text


def run(command: list[object], reports: Reports, package: Path, isa: str) -> int:
    """In the folder of the package, which Python's child processes then import too."""
    child = {**os.environ, **reports.environment(), "SE_EXT_CPU_ISA": isa, "SE_EXT_REQUIRE_ISA": isa}
    child["OMP_WAIT_POLICY"] = "passive"
    done = subprocess.run([sys.executable, *map(str, command)], env=child, cwd=package, check=False)
    return done.returncode


def mistakes_are_found(package: Path, isa: str, reports: Reports) -> bool:
    load = "import ctypes, torch, se_ext; library = ctypes.CDLL(se_ext._loader.LIBRARY); "
    # Of the wider sets a whole register, because the sanitizer does not see a masked one.
    more = 1 if isa == "baseline" else 16
    load += f"values = torch.ones(1024); count, more = ctypes.c_int64(1024), ctypes.c_int64({more});"
    for message, mistake in MISTAKES.items():
        run(["-c", f"{load} {mistake}"], reports, package, isa)
        text = reports.take()
        if message not in text:
            print(f"FAILED {isa}: a mistake on purpose was not found: expected {message!r} in {text!r}")
            return False
    return True


def address(sets: list[str], tests: list[str], narrowed: list[str]) -> bool:
    package = instrument.package(sets)
    right = True
    with tempfile.TemporaryDirectory() as folder:
        reports = Reports(folder)
        for isa in sets:
            if not mistakes_are_found(package, isa, reports):
                return False
            ended = run([*PYTEST, "-o", f"pythonpath={package} {PATHS}", *tests, *narrowed], reports, package, isa)
            found = reports.take()
            print(found, end="")
            if ended != 0 or found:
                print(f"FAILED {isa}: pytest ended with {ended}, {'with' if found else 'without'} a sanitizer's report")
                right = False
    return right


def thread(sets: list[str]) -> bool:
    program = instrument.threads(sets)
    for isa in sets:
        child = {**os.environ, "SE_EXT_CPU_ISA": isa}
        command = [*addresses_not_drawn(), program, "--without-barriers"]
        broken = subprocess.run(command, env=child, capture_output=True, text=True, check=False)
        if "ThreadSanitizer: data race" not in broken.stderr:
            print(f"FAILED {isa}: no race was found where barriers are left out:\n{broken.stdout}{broken.stderr}")
            return False
        print(f"ThreadSanitizer, {isa}: ", end="", flush=True)
        if subprocess.run([*addresses_not_drawn(), program], env=child, check=False).returncode != 0:
            print(f"FAILED {isa}: reports of ThreadSanitizer, or other bits on several threads")
            return False
    return True


@cache
def addresses_not_drawn() -> tuple[str, ...]:
    """What starts a program at fixed addresses, where that is allowed: ThreadSanitizer refuses some random ones."""
    command = ("setarch", "-R")
    try:
        return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else ()
    except OSError:
        return ()


def main() -> int:
    known = list(instrument.instruction_sets())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=["address", "thread"])
    parser.add_argument("--isa", nargs="+", choices=known)
    chosen, narrowed = parser.parse_known_args()
    sets = chosen.isa or (["baseline"] if chosen.short else known)
    tests = [str(ROOT / "tests" / name) for name in (SHORT if chosen.short else TESTS)]
    tests += NOT_THESE
    right = chosen.only == "thread" or address(sets, tests, narrowed)
    if chosen.only != "address" and not chosen.short:
        # The threads' shares and barriers are the same in every set; what masked instructions touch it does not see.
        right &= thread(chosen.isa or ["baseline"])
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
