"""examples/train_ddp.py: gradients of several processes are those of one, and a killed process costs only its step."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_near, assert_same_bits
from processes import Processes, processes
from torch import Tensor, nn

import se_ext
from examples import train_ddp

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Processes]]:
    """Of two and of four processes."""
    with processes(2) as two, processes(4) as four:
        yield {2: two, 4: four}


def network(shard: str, *words: str) -> nn.Module:
    """The example's, in float64."""
    torch.set_default_dtype(torch.float64)  # DDP does not follow a network that changes its dtype
    try:
        return train_ddp.network(train_ddp.parse(["--checkpoint", "none", "--shard", shard, *words]))
    finally:
        torch.set_default_dtype(torch.float32)


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return se_ext.models.seresnet18(num_classes=3)
    finally:
        torch.set_default_dtype(torch.float32)


def loss(model: nn.Module, part: int, parts: int) -> Tensor:
    """Of every parts-th image of a batch."""
    images, labels = train_ddp.batch(0)
    return nn.functional.cross_entropy(model(images[part::parts].double()), labels[part::parts])


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def check_gradients(training: bool, shard: str, *words: str) -> None:
    """A batch norm in training normalises by the samples of its own process: one process that takes the parts one after
    another has the same gradients."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, plain = network(shard, *words).train(training), plain_network().train(training)
    loss(model, rank, count).backward()
    for part in range(count):
        (loss(plain, part, count) / count).backward()
    ours = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():
        assert_near(whole(ours[name].grad), p.grad, name, 1e-9)


@pytest.mark.parametrize("shard", ["ddp", "block", "layer"])
@pytest.mark.parametrize(
    ("count", "training", "words"), [(2, False, ()), (2, True, ("--checkpointing",)), (4, True, ())]
)
def test_gradients_are_those_of_one_process(
    groups: dict[int, Processes], count: int, training: bool, words: tuple[str, ...], shard: str
) -> None:
    groups[count].run(check_gradients, training, shard, *words)


class PlainBlock(nn.Module):
    """An SE block as people write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def check_convert_behind_fully_shard() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), PlainBlock(8), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = plain.double()
    model = train_ddp.fully_shard(copy.deepcopy(plain))
    report = se_ext.convert(model)
    assert [block.path for block in report.converted] == ["1"], report
    loss(model, torch.distributed.get_rank(), torch.distributed.get_world_size()).backward()
    loss(plain, 0, 1).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_near(whole(ours.grad), theirs.grad, name, 1e-9)


def test_convert_behind_fully_shard(groups: dict[int, Processes]) -> None:
    """The weights that the conversion compares with are parts, which a hook puts together for forward alone."""
    groups[2].run(check_convert_behind_fully_shard)


# ---- checkpoints ----


def train_and_save(folder: Path, shard: str) -> None:
    """A step, in both kinds of checkpoint."""
    model = network(shard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss(model, torch.distributed.get_rank(), torch.distributed.get_world_size()).backward()
    optimizer.step()
    for step in (1, 2):
        train_ddp.save_parts(folder / "parts", model, optimizer, step)
    train_ddp.save(folder / "whole.pt", model, optimizer, 2)


def load_and_compare(folder: Path, shard: str) -> None:
    """What other processes read has the bits of the whole state."""
    model = network(shard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    assert train_ddp.load_parts(folder / "parts", model, optimizer) == 2
    options = train_ddp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = train_ddp.get_state_dict(model, optimizer, options=options)
    if torch.distributed.get_rank() == 0:
        saved = torch.load(folder / "whole.pt", weights_only=True)
        assert weights.keys() == saved["model"].keys()
        assert_same_bits(weights.values(), saved["model"].values())
        momenta = [{k: v["momentum_buffer"] for k, v in of["state"].items()} for of in (state, saved["optimizer"])]
        assert momenta[0].keys() == momenta[1].keys()
        assert_same_bits(momenta[0].values(), momenta[1].values())


def test_a_checkpoint_is_read_by_other_processes(groups: dict[int, Processes], tmp_path: Path) -> None:
    """Written by two processes that share blocks, read by four that share layers."""
    groups[2].run(train_and_save, tmp_path, "block")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step_000000002"]
    (tmp_path / "parts" / "step_000000003").mkdir()  # of processes that were killed in the middle
    groups[4].run(load_and_compare, tmp_path, "layer")


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
    undisturbed, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("undisturbed", "killed"))
    assert undisturbed["step"] == killed["step"] == steps
    for name, weight in undisturbed["model"].items():
        assert torch.equal(weight, killed["model"][name]), name
