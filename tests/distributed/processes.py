"""Processes that work together (gloo, one thread each) and stay for a whole file of tests: their start takes longer
than most tests."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 60  # for one call; a process that waits for the others gives up then


class Processes:
    """`count` processes, which form torch's default process group."""

    def __init__(self, count: int, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.members = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            member = context.Process(target=_work, args=(rank, count, store, theirs), daemon=True)
            member.start()
            theirs.close()
            self.pipes.append(ours)
            self.members.append(member)

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a module's function in each of them; fails with what went wrong in the first that failed."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        errors = []
        for rank, pipe in enumerate(self.pipes):
            try:
                error = pipe.recv() if pipe.poll(2 * SECONDS) else "no answer"
            except EOFError:
                error = "the process has ended"
            if error is not None:
                errors.append(f"process {rank} of {len(self.pipes)}: {error}")
        if errors:
            raise AssertionError(errors[0])

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for member in self.members:
            member.join(SECONDS)
            if member.is_alive():
                member.kill()


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory() as folder:
        group = Processes(count, Path(folder, "store"))
        try:
            yield group
        finally:
            group.end()


def _work(rank: int, count: int, store: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(20260101)  # the same in every process
        try:
            function(*arguments)
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)
    dist.destroy_process_group()
