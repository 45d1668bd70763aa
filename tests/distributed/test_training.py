"""examples/train_ddp.py: gradients of several processes are those of one, and a killed process costs only its step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_near
from processes import Processes, processes
from torch import nn

import se_ext
from examples import train_ddp

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as group:
        yield group


def check_gradients(*words: str) -> None:
    """With given statistics: a batch norm in training normalises by the samples of its own process."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_default_dtype(torch.float64)  # DDP does not follow a network that changes its dtype
    try:
        model = train_ddp.network(train_ddp.parse(["--checkpoint", "none", *words])).eval()
        torch.manual_seed(0)
        plain = se_ext.models.seresnet18(num_classes=3).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    images, labels = train_ddp.batch(0)
    nn.functional.cross_entropy(model(images[rank::count].double()), labels[rank::count]).backward()
    nn.functional.cross_entropy(plain(images.double()), labels).backward()
    ours = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():
        grad = ours[name].grad
        assert_near(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, p.grad, name, 1e-9)


@pytest.mark.parametrize("shard", ["ddp", "block", "layer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_one_process(two: Processes, shard: str, checkpointing: bool) -> None:
    two.run(check_gradients, "--shard", shard, *(["--checkpointing"] if checkpointing else []))


def start(checkpoint: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    options = ["-m", "examples.train_ddp", f"--checkpoint={checkpoint}", f"--steps={steps}", "--shard=block"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """The same weights as a run that nobody disturbed."""
    steps = 6
    with start(tmp_path / "undisturbed.pt", steps) as run:
        assert "step 6" in run.communicate(timeout=60)[0]
    with start(tmp_path / "killed.pt", steps) as run:
        lines = [run.stdout.readline() for _ in range(2)]
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        lines += run.communicate(timeout=90)[0].splitlines()
        assert run.returncode == 0
    numbers = [int(line.split()[1].rstrip(":")) for line in lines if line.startswith("step")]
    assert numbers[-1] == steps
    assert len(numbers) <= steps + 1  # what was done is not done again, but for the step that was cut short
    whole, again = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("undisturbed", "killed"))
    assert whole["step"] == again["step"] == steps
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name]), name
