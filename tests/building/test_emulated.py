"""No illegal instruction on an older CPU: every op computes the right numbers on emulated ones.

qemu-x86_64 (Debian: qemu-user) refuses what the named CPU lacks. It knows AVX2 and no AVX-512: the AVX-512 kernels are
not tested here, only that they stay away. Importing torch takes it 20 s, so `make emulated` runs what is slow, with
SE_EXT_REQUIRE_QEMU=1, which turns a missing emulator into a failure.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
from test_isa import SELF_CHECK

pytestmark = pytest.mark.cpu_only

# CPUs, and the kernels that are right for them. Nehalem has no AVX; Haswell has AVX2, FMA and F16C, and the kernels in
# AVX2 need all three. (Without F16C torch's own conversions to float16 are the illegal instruction.)
CPUS = {"Nehalem": "baseline", "Haswell": "avx2", "Haswell,-fma": "baseline"}

# Machine code, and the CPUs that may run it.
INSTRUCTIONS = {
    "vaddps xmm": ("c5f858c0", {"Haswell"}),
    "vpaddd ymm": ("c5fdfec0", {"Haswell"}),
    "vfmadd231ps ymm": ("c4e27db8c0", {"Haswell"}),
    "vcvtph2ps ymm": ("c4e27d13c0", {"Haswell"}),
    "vaddps zmm": ("62f17c4858c0", set()),
    "vmovups zmm{k1}{z}": ("62f17cc91000", set()),
    "kmovw k1, eax": ("c5f892c8", set()),
}

EXECUTE = """
import ctypes, mmap, sys
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code = ctypes.addressof(ctypes.c_char.from_buffer(page))
page.write(bytes.fromhex("4889f8") + bytes.fromhex(sys.argv[1]) + bytes.fromhex("c3"))  # mov rax, rdi; …; ret
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code)(code + 512)
print("done")
"""

# The ops that test_isa.py's check of the whole block does not call by name.
EVERY_PART = f"""{SELF_CHECK}
for dtype in DTYPES:
    for channels_last in (False, True):
        for i, shape in enumerate([(1, 19, 5, 7), (3, 33, 3, 11), (2, 130, 1, 3)]):
            n, c, h, w = shape
            x, residual = (make_map(shape, dtype, channels_last, requires_grad=True) for _ in range(2))
            z, scale = (torch.randn(n, c).to(dtype).requires_grad_() for _ in range(2))
            weights = make_weights(c, 13, dtype, bias=i > 0, requires_grad=True)
            act, gate, post = ACTIVATIONS[3 * i], GATES[i], ACTIVATIONS[2 * i + 1]
            length = h * w * c * n
            for name, tensors, options in (
                ("squeeze", [x], ()),
                ("excite", [z, *weights], (act, gate)),
                ("rescale", [x, scale, residual], (post,)),
            ):
                check_against_float64(
                    lambda *t: getattr(se_ext, name)(*t, *options),
                    lambda *t: getattr(reference, name)(*t, *options),
                    tensors,
                    (length, length),
                )
            for pre, tail in (("identity", "relu"), ("silu", "identity"), ("gelu", post)):
                bn = lambda m, t: m.bn_squeeze_excite(*t[:3], None, None, *t[3:7], residual=t[7], **options)
                options = dict(training=True, pre_activation=pre, activation=act, gate=gate, post_activation=tail)
                check_against_float64(
                    lambda *t: bn(se_ext, t),
                    lambda *t: bn(reference, t),
                    [x, *(torch.rand(c).to(dtype).requires_grad_() for _ in range(2)), *weights, residual],
                    (length, length),
                )
            for kernel, stride in ((3, 1), (5, 2), (7, 1)):
                filters = [torch.randn(c, 1, 3, kernel).to(dtype).requires_grad_(), torch.rand(c).to(dtype)]
                check_against_float64(
                    lambda *t: se_ext.depthwise_conv(*t, stride, "same"),
                    lambda *t: reference.depthwise_conv(*t, stride, "same"),
                    [x, *filters],
                    (length + 21, length + 21),
                )
            with torch.no_grad():
                expected = se_ext.squeeze_excite(x, *weights, act, gate, residual, post)
                target = x.clone()
                se_ext.squeeze_excite(target, *weights, act, gate, residual, post, inplace=True)
                assert torch.equal(target, expected)
print("parts", torch.get_num_threads())
"""


def emulate(cpu: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments on the emulated CPU, with two threads, in its own choice of kernels."""
    qemu = shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64":
        pytest.skip("this Python is not x86-64 code")
    if qemu is None:
        if os.environ.get("SE_EXT_REQUIRE_QEMU") == "1":
            pytest.fail("no qemu-x86_64")
        pytest.skip("no qemu-x86_64 (Debian: qemu-user)")
    # NumPy's OpenBLAS would take the kernels that OPENBLAS_CORETYPE names, whatever the CPU.
    own_choice = ("SE_EXT_CPU_ISA", "SE_EXT_REQUIRE_ISA", "OPENBLAS_CORETYPE")
    env = {k: v for k, v in os.environ.items() if k not in own_choice}
    env["OMP_NUM_THREADS"] = "2"
    command = [qemu, "-cpu", cpu, sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("cpu", ["Nehalem", "Haswell"])
def test_the_emulator_refuses_what_the_cpu_lacks(cpu: str, instruction: str) -> None:
    """An emulator that ran everything would prove nothing."""
    code, allowed_on = INSTRUCTIONS[instruction]
    done = emulate(cpu, "-I", "-S", "-c", EXECUTE, code)
    if cpu in allowed_on:
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (-signal.SIGILL, "")


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_every_op_on_an_older_cpu(cpu: str) -> None:
    """An instruction from beyond the CPU ends the process with SIGILL."""
    done = emulate(cpu, "-c", EVERY_PART)
    assert done.returncode == 0, done.stderr[-4000:]
    capability, checks, _, *parts = done.stdout.split()
    assert capability == CPUS[cpu]
    assert int(checks) > 100
    assert parts == ["parts", "2"]
