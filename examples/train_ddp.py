"""Trains a small SE-ResNet on several processes, and goes on from the last checkpoint when one of them was killed.

    torchrun --nproc-per-node 2 --max-restarts 3 -m examples.train_ddp --checkpoint checkpoint.pt

With --sharded-checkpoint every process writes its own part of the state, and other processes than those that wrote it
can read it: more or fewer of them, or sharded in another way.

The data are random images whose label is the brightest colour, so nothing is downloaded. Each process computes its part
of every batch. gloo on a CPU, nccl on GPUs.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import se_ext

BATCH_SIZE = 8  # of all processes together


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--checkpoint", type=Path, required=True, help="file to write after each step, and to go on from")
    option("--sharded-checkpoint", action="store_true", help="a folder instead: each process writes its own part")
    option("--steps", type=int, default=20, help="steps in all (%(default)s)")
    option("--shard", choices=("ddp", "block", "layer"), default="ddp", help="DDP, or FSDP2 of each block or layer")
    option("--sync-batch-norm", action="store_true", help="normalise by the whole batch")
    option("--checkpointing", action="store_true", help="compute activations again in backward, to save memory")
    return parser.parse_args(argv)


def network(options: argparse.Namespace) -> nn.Module:
    """The same weights in every process, then wrapped by torch's own tools, in the order that they ask for."""
    torch.manual_seed(0)
    model: Any = se_ext.models.seresnet18(num_classes=3)
    if options.checkpointing:
        model.set_grad_checkpointing(True)
    if options.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if options.shard == "ddp":
        return DistributedDataParallel(model)
    for module in list(model.modules()):
        is_layer = not list(module.children()) and list(module.parameters(recurse=False))
        if is_layer if options.shard == "layer" else hasattr(module, "se"):
            fully_shard(module)
    return fully_shard(model)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The step's whole batch: images [N, 3, 32, 32] and labels [N], which the step's number alone decides."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(3, [BATCH_SIZE], generator=generator)
    images = torch.randn([BATCH_SIZE, 3, 32, 32], generator=generator)
    images[torch.arange(BATCH_SIZE), labels] += 1
    return images, labels


def share_statistics(model: nn.Module) -> None:
    """The running statistics of rank 0 are everybody's. DDP does the same; sharding leaves each rank its own."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Rank 0 writes the whole state, under another name until the file is complete."""
    share_statistics(model)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=whole)  # every rank takes part
    if dist.get_rank() == 0:
        part = path.with_suffix(".part")
        torch.save({"model": weights, "optimizer": state, "step": step}, part)
        part.replace(path)
    dist.barrier()


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that are done."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True, map_location="cpu")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    return int(saved["step"])


def save_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Each rank writes what it holds to a folder of the step's own; the older ones go when that is complete."""
    share_statistics(model)
    weights, state = get_state_dict(model, optimizer)
    now = folder / f"step_{step:09}"
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=now)
    if dist.get_rank() == 0:
        for before in set(folder.iterdir()) - {now}:
            shutil.rmtree(before)
    dist.barrier()


def load_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that are done. `.metadata` is what a complete checkpoint has: it is written last."""
    complete = sorted(path.parent for path in folder.glob("step_*/.metadata"))
    if not complete:
        return 0
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=complete[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return int(complete[-1].name.removeprefix("step_"))


def train(options: argparse.Namespace) -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_default_device(device)
    model = network(options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    read, write = (load_parts, save_parts) if options.sharded_checkpoint else (load, save)
    for step in range(read(options.checkpoint, model, optimizer), options.steps):
        with torch.device("cpu"):
            images, labels = (whole[rank::count].to(device) for whole in batch(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        write(options.checkpoint, model, optimizer, step + 1)
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)


def join() -> None:
    """Makes the process group of all processes that torchrun has started. Its store stays for all of its starts (torch
    2.13), and would tell the processes of a later start where those of an earlier one were: each start has keys of its
    own there."""
    store, rank, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    join()
    try:
        train(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
