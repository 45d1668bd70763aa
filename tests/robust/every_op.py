"""One call of every op, with its backward, on random data that are the same in every process; and a program that
test_processes.py runs, which makes these calls in one process and then in others.

    every_op.py digest            prints a digest of all results for each number of threads
    every_op.py fork              in forked children, after the ops ran in the parent
    every_op.py "fork first"      in a forked child, before any op ran
    every_op.py loader N METHOD…  in N workers of a DataLoader that starts processes by METHOD
    every_op.py interrupt         until the last of a few interrupts
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from helpers import bits, one_thread
from ops import CASES, OpCase, Options
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import se_ext

SHAPE = (4, 64, 28, 28)  # enough for all threads, forward and backward
THREADS = (1, 2, 4)
INTERRUPTS = 3
LONGEST_S = 60.0

Step = Callable[[], list[Tensor]]


def step_of(case: OpCase, options: Options) -> Step:
    """Returns outputs, what is written, and gradients."""
    arguments = case.make(options)
    written = {name: arguments[name] for name in case.writes}

    def fresh() -> dict[str, Any]:
        with one_thread():  # torch's own loops, on several, hang in a forked child
            return arguments | {name: t.clone() for name, t in written.items()}

    grad = torch.randn_like(case.run(fresh())[0])
    return lambda: [t.detach() for t in case.step(fresh(), grad)]


def make_steps() -> dict[str, Step]:
    torch.manual_seed(1)
    steps = {}
    for i, case in enumerate(CASES):
        options = Options(SHAPE, 4, channels_last=i % 2 == 1, pre_activation="silu", requires_grad=True)
        steps[case.name] = step_of(case, options)
    return steps


def digest(tensors: list[Tensor]) -> str:
    whole = hashlib.sha256()
    with one_thread():
        for t in tensors:
            whole.update(bits(t).numpy().tobytes())
    return whole.hexdigest()


def digest_of_all(steps: dict[str, Step]) -> str:
    return digest([t for step in steps.values() for t in step()])


# ---- forked children ----


def succeeds_in_a_child(function: Callable[[], None]) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    since = time.monotonic()
    while time.monotonic() - since < LONGEST_S:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def fork() -> None:
    torch.set_num_threads(4)
    steps = make_steps()
    expected = digest_of_all(steps)

    def child() -> None:
        results = [t for step in steps.values() for t in step()]
        assert digest(results) == expected

    def child_of_child() -> None:
        child()
        assert succeeds_in_a_child(child)

    assert succeeds_in_a_child(child)
    assert succeeds_in_a_child(child_of_child)
    assert digest_of_all(steps) == expected


def fork_first() -> None:
    def child() -> None:
        torch.set_num_threads(2)
        steps = make_steps()
        assert digest_of_all(steps) == digest_of_all(steps)

    assert succeeds_in_a_child(child)


# ---- workers ----


class Blocks(Dataset[list[Tensor]]):
    """Sample i: a block's output and its gradients, computed in the worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> list[Tensor]:
        torch.manual_seed(i)
        leaves = [torch.randn(SHAPE), torch.randn(4, 64), torch.randn(4), torch.randn(64, 4), torch.randn(64)]
        for leaf in leaves:
            leaf.requires_grad_()
        y = se_ext.squeeze_excite(*leaves, post_activation="relu")
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def collate(samples: list[list[Tensor]]) -> list[Tensor]:
    maps, *rest = default_collate(samples)
    return [se_ext.squeeze(maps[:, 0]), maps, *rest]


def load(methods: list[str], workers: int) -> None:
    torch.set_num_threads(2)
    data = Blocks()
    expected = [digest(collate([data[i], data[i + 1]])) for i in (0, 2)]
    for method in methods:
        loader = DataLoader(
            data,
            batch_size=2,
            num_workers=workers,
            multiprocessing_context=method,
            collate_fn=collate,
            timeout=LONGEST_S,
        )
        assert [digest(batch) for batch in loader] == expected, method


# ---- interrupts ----


def interrupt() -> None:
    """Each call either happens or does not: the map is twice what it was, or what it was."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(2)
    steps = make_steps()
    expected = digest_of_all(steps)
    x = torch.randn(8, 64, 112, 112)
    half, double = torch.full((8, 64), 0.5), torch.full((8, 64), 2.0)
    weights = [torch.randn(4, 64, requires_grad=True), None, torch.randn(64, 4, requires_grad=True), None]
    for _ in range(INTERRUPTS):
        y = x.clone()
        print("ready", flush=True)
        try:
            since = time.monotonic()
            while time.monotonic() - since < LONGEST_S:
                torch.ops.se_ext.rescale_(y, half)
                se_ext.squeeze_excite(x, *weights, post_activation="silu").backward(x)
                torch.ops.se_ext.rescale_(y, double)
            raise AssertionError("no interrupt came")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        assert torch.equal(y, x) or torch.equal(y, x / 2)
        assert digest_of_all(steps) == expected


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "digest":
        steps = make_steps()
        for threads in THREADS:
            torch.set_num_threads(threads)
            print(digest_of_all(steps))
    elif what == "fork":
        fork()
    elif what == "fork first":
        fork_first()
    elif what == "loader":
        load(rest[1:], int(rest[0]))
    else:
        interrupt()
    print("right")


if __name__ == "__main__":
    main()
