"""Train the variants side by side, on the same splits and batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .data import Cells, batches, flipped
from .model import VARIANTS, build

BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3


@dataclass
class Run:
    """One variant from one seed: per-epoch lists."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    epoch_ms: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, variant: str, seed: int, step_count: int) -> Run:
        """Return a run at its first step, on a cosine schedule that ends at zero after step_count steps."""
        net = build(variant, seed)
        optimizer = torch.optim.SGD(
            net.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        return cls(net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, step_count))


def train_epoch(run: Run, images: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
    """Train on the batches, in their order; the time of this is kept."""
    run.net.train()
    start = time.perf_counter()
    loss_sum = torch.zeros(())
    for batch, wanted in zip(images, labels, strict=True):
        loss = functional.cross_entropy(run.net(batch), wanted)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()
        run.schedule.step()
        loss_sum += loss.detach() * len(wanted)
    run.epoch_ms.append((time.perf_counter() - start) * 1e3)
    run.train_loss.append(loss_sum.item() / sum(map(len, labels)))


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images classified right."""
    logits = torch.cat([net.eval()(batch) for batch in images.split(256)])
    return (logits.argmax(1) == labels).double().mean().item()


def train_all(cells: Cells, seeds: Sequence[int], epochs: int) -> dict[str, list[Run]]:
    """Train every variant from every seed, with a progress bar on stderr. A seed has a split of its own.

    The variants take turns epoch by epoch in a rotating order, so a busy spell of the machine hits all alike.

    Returns:
        variant -> one finished Run per seed.
    """
    runs: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}
    with tqdm(total=len(VARIANTS) * len(seeds) * epochs, unit="epoch") as bar:
        for seed in seeds:
            train, test = cells.split(seed)
            mean, std = cells.images[train].mean(), cells.images[train].std()
            images = (cells.images - mean) / std
            step_count = epochs * len(batches(train, BATCH_SIZE, seed, 0))
            for variant in VARIANTS:
                runs[variant].append(Run.start(variant, seed, step_count))
            for epoch in range(epochs):
                order = batches(train, BATCH_SIZE, seed, epoch)
                inputs = [flipped(images[indices], seed, epoch, step) for step, indices in enumerate(order)]
                labels = [cells.labels[indices] for indices in order]
                first = epoch % len(VARIANTS)
                for variant in VARIANTS[first:] + VARIANTS[:first]:
                    bar.set_description(f"seed {seed}, {variant}")
                    run = runs[variant][-1]
                    train_epoch(run, inputs, labels)
                    run.test_accuracy.append(accuracy(run.net, images[test], cells.labels[test]))
                    bar.update()
    return runs
