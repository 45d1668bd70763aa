"""torch's own OpenMP pool and nothing beside it, also from several threads at once. (Forked processes:
test_processes.py.)"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import TESTS, assert_close, make_map, make_weights, one_thread, to_float64

import se_ext
from se_ext import reference

pytestmark = pytest.mark.cpu_only

SHAPE = (8, 64, 56, 56)

# What the children run: a block big enough to wake every thread, forward and backward.
PRELUDE = f"""
import os, sys, threading
sys.path.insert(0, {str(TESTS)!r})
import torch, se_ext
from se_ext import _C
torch.manual_seed(0)
x = torch.randn{SHAPE}
weights = [torch.randn(4, 64), torch.randn(4), torch.randn(64, 4), torch.randn(64)]

grad = torch.randn{SHAPE}

def step():
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    y = se_ext.squeeze_excite(*leaves, post_activation="relu")
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

def threads_of_this_process():
    return len(os.listdir("/proc/self/task"))
"""


def run_python(code: str, timeout: float = 60, **env: str) -> str:
    """Runs code in an interpreter of its own; a hang is a failure like any other. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_openmp_runtime():
    """One libgomp (or libomp) in the process, the one that torch brought, after both computed on several threads."""
    out = run_python("""
torch.set_num_threads(2)
step()
torch.randn(512, 512) @ torch.randn(512, 512)
maps = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
for path in sorted(maps):
    name = os.path.basename(path)
    if name.startswith(("libgomp", "libomp", "libiomp")):
        print(os.path.realpath(path))
print(os.path.realpath(_C.openmp_runtime()))
print(os.path.dirname(os.path.realpath(torch.__file__)))
""")
    *runtimes, ours, torch_package = out.split()
    assert runtimes == [ours]
    assert os.path.commonpath([ours, os.path.dirname(torch_package)]) == os.path.dirname(torch_package)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU")
def test_set_num_threads_is_respected():
    """No pool for one thread; at most three more for four; none of its own beside torch's."""
    out = run_python("""
torch.set_num_threads(1)
before = threads_of_this_process()
step()
print(threads_of_this_process() - before, _C.num_threads())
torch.set_num_threads(4)
torch.randn(2**22).add_(1)  # torch wakes its pool
pool = threads_of_this_process()
step()
print(threads_of_this_process() - pool, _C.num_threads())
""")
    assert out.split() == ["0", "1", "0", "4"]


def test_our_kernels_use_several_threads():
    """The pool grows when we compute alone: a build without OpenMP would stay at one thread."""
    out = run_python("""
torch.set_num_threads(3)
before = threads_of_this_process()
with torch.no_grad():
    se_ext.squeeze(x)
print(threads_of_this_process() - before)
""")
    assert out.split() == ["2"]


def test_concurrent_calls():
    """Eight Python threads, each with its own data, forward and backward, again and again."""
    cases, failures = [], []
    for i in range(8):
        shape = [(2, 64, 56, 56), (8, 128, 14, 14), (1, 512, 7, 7), (3, 7, 5, 5)][i % 4]
        x = make_map(shape, channels_last=bool(i % 2), requires_grad=True)
        weights = make_weights(shape[1], 8, requires_grad=True)
        leaves = [to_float64(t) for t in (x, *weights)]
        with one_thread():
            exact = reference.squeeze_excite(*leaves, post_activation="silu")
            grads = torch.autograd.grad(exact.square().sum(), leaves)
        cases.append(([x, *weights], [exact.detach(), *grads]))
    start = threading.Barrier(len(cases))

    def work(tensors, expected):
        try:
            start.wait()
            for _ in range(10):
                y = se_ext.squeeze_excite(*tensors, post_activation="silu")
                actual = [y, *torch.autograd.grad(y.square().sum(), tensors)]
                length = tensors[0].numel() // tensors[0].shape[1]
                for a, e in zip(actual, expected, strict=True):
                    assert_close(a, e, torch.float32, length + tensors[0].shape[1] + 8)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
        assert not t.is_alive()
    assert failures == []
