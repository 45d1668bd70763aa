"""Threads of Python, forked and spawned processes, settings of OpenMP, and Ctrl-C: the results are those of a lone
thread of one process, and nothing hangs."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import programs
import pytest
import torch
from every_op import INTERRUPTS, LONGEST_S, digest, make_steps
from strategies import TIMES

import se_ext

pytestmark = pytest.mark.cpu_only
CALLERS = 8


def lines_of(running: subprocess.Popen[str]) -> list[str]:
    done = programs.finish(running, 3 * LONGEST_S)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    assert last == "right"
    return lines


def said(*words: str, **environment: str) -> list[str]:
    return lines_of(programs.start("every_op.py", *words, **environment))


def test_threads_of_python_with_settings_of_their_own(restore_threads: None) -> None:
    """Each calls the ops in another order, with another number of threads: torch's setting belongs to a thread. Forward
    and backward of a step may have different numbers."""
    steps = make_steps()
    expected = {name: digest(step()) for name, step in steps.items()}
    names, meet = list(steps), threading.Barrier(CALLERS)

    def work(caller: int) -> list[str]:
        torch.set_num_threads(1 + caller % 4)
        meet.wait()
        order = names[caller * 3 :] + names[: caller * 3]
        return [name for name in order * TIMES if digest(steps[name]()) != expected[name]]

    with ThreadPoolExecutor(CALLERS) as pool:
        assert list(pool.map(work, range(CALLERS))) == [[]] * CALLERS


def runs_beside(step: Callable[[], object]) -> bool:
    """Whether this thread goes on while another one is in the middle of `step`."""
    times: list[float] = []

    def work() -> None:
        times.append(time.perf_counter())
        step()
        times.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
    begin, end = times
    return any(abs(tick - (begin + end) / 2) < (end - begin) / 4 for tick in ticks)


def test_other_threads_of_python_run_during_an_op(restore_threads: None) -> None:
    """Python's lock is released, in forward and in backward."""
    torch.set_num_threads(1)
    x, scale = torch.randn(16, 64, 112, 112, requires_grad=True), torch.rand(16, 64, requires_grad=True)
    y = se_ext.rescale(x, scale, None, "silu")
    grad = torch.randn_like(y)
    steps = (
        lambda: se_ext.rescale(x, scale, None, "silu"),
        lambda: torch.autograd.grad(y, (x, scale), grad, retain_graph=True),
    )
    for step in steps:
        assert any(runs_beside(step) for _ in range(5))  # a busy machine may keep this thread waiting
    numbers = torch.rand(300_000).tolist()
    assert not all(runs_beside(lambda: sorted(numbers)) for _ in range(5))  # which holds the lock


def test_the_number_of_threads_changes_between_forward_and_backward(restore_threads: None) -> None:
    leaves = [torch.randn(4, 64, 28, 28), torch.randn(4, 64), torch.randn(4), torch.randn(64, 4), torch.randn(64)]
    for leaf in leaves:
        leaf.requires_grad_()
    found = set()
    for forward, backward in ((1, 1), (1, 4), (4, 1), (2, 3)):
        torch.set_num_threads(forward)
        y = se_ext.squeeze_excite(*leaves, post_activation="silu")
        torch.set_num_threads(backward)
        found.add(digest(list(torch.autograd.grad(y, leaves, leaves[0].detach()))))
    assert len(found) == 1


def test_forks_of_torchscript(restore_threads: None) -> None:
    """torch.jit.fork calls the op on threads of the interpreter, several at once."""

    @torch.jit.script
    def several(x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        futures = [torch.jit.fork(torch.ops.se_ext.rescale, x, scale, None, "silu") for _ in range(4)]
        return [torch.jit.wait(future) for future in futures]

    torch.set_num_threads(2)
    x, scale = torch.randn(4, 64, 28, 28), torch.rand(4, 64)
    expected = se_ext.rescale(x, scale, None, "silu")
    assert all(torch.equal(y, expected) for y in several(x, scale))


def test_openmps_own_settings() -> None:
    """Levels of nesting, a limit of threads, one thread: the same bits."""
    settings = [
        {"OMP_MAX_ACTIVE_LEVELS": "3", "OMP_NUM_THREADS": "2,2,2"},
        {"OMP_THREAD_LIMIT": "2", "OMP_DYNAMIC": "true"},
        {"OMP_NUM_THREADS": "1"},
    ]
    digests = {line for setting in settings for line in said("digest", **setting)}
    assert len(digests) == 1


def test_a_forked_child() -> None:
    """The parent's threads do not survive a fork; the child computes the same bits, and so does a child of its own."""
    assert said("fork") == []


def test_a_child_that_forked_before_the_first_call() -> None:
    assert said("fork first") == []


def test_workers_of_a_data_loader() -> None:
    assert said("loader", "2", "fork", "spawn", "forkserver") == []


def test_an_interrupt_leaves_the_process_usable() -> None:
    running = programs.start("every_op.py", "interrupt")
    assert running.stdout is not None
    for _ in range(INTERRUPTS):
        assert running.stdout.readline() == "ready\n"
        threading.Event().wait(0.3)
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == "interrupted\n"
    assert lines_of(running) == []
