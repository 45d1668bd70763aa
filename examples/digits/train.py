"""Train the variants side by side and measure what a comparison needs: accuracy, time and memory."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from .data import Digits, batches
from .model import VARIANTS, DigitNet, build

BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass
class Run:
    """One variant from one seed: per-epoch lists, and which test images the last epoch got right."""

    net: DigitNet
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    epoch_ms: list[float] = field(default_factory=list)
    correct: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    @classmethod
    def start(cls, variant: str, seed: int, step_count: int) -> Run:
        """Return a run at its first step, on a cosine schedule that ends at zero after step_count steps."""
        net = build(variant, seed)
        optimizer = torch.optim.SGD(
            net.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        return cls(net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, step_count))


def train_step(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """Take one SGD step and return the batch's mean loss."""
    loss = functional.cross_entropy(run.net(images), labels)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    run.schedule.step()
    return loss.detach()


def train_epoch(run: Run, digits: Digits, order: Sequence[Tensor]) -> None:
    """Train on the batches in the given order, then test; only the training is timed."""
    run.net.train()
    start = time.perf_counter()
    losses = [train_step(run, digits.train_images[i], digits.train_labels[i]) * len(i) for i in order]
    run.epoch_ms.append((time.perf_counter() - start) * 1e3)
    run.train_loss.append(torch.stack(losses).sum().item() / len(digits.train_labels))
    with torch.no_grad():
        run.correct = run.net.eval()(digits.test_images).argmax(1) == digits.test_labels
    run.test_accuracy.append(run.correct.double().mean().item())


def train_all(digits: Digits, seeds: Sequence[int], epochs: int) -> dict[str, list[Run]]:
    """Train every variant from every seed, with a progress bar on stderr.

    The variants take turns epoch by epoch in a rotating order, so a busy spell of the machine hits all alike.

    Returns:
        variant -> one finished Run per seed.
    """
    runs: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}
    batches_per_epoch = math.ceil(len(digits.train_labels) / BATCH_SIZE)
    with tqdm(total=len(VARIANTS) * len(seeds) * epochs, unit="epoch") as bar:
        for seed in seeds:
            for variant in VARIANTS:
                runs[variant].append(Run.start(variant, seed, epochs * batches_per_epoch))
            for epoch in range(epochs):
                order = batches(len(digits.train_labels), BATCH_SIZE, seed, epoch)
                first = epoch % len(VARIANTS)
                for variant in VARIANTS[first:] + VARIANTS[:first]:
                    bar.set_description(f"seed {seed}, {variant}")
                    train_epoch(runs[variant][-1], digits, order)
                    bar.update()
    return runs


@dataclass(frozen=True)
class Agreement:
    """How two variants compare per seed: their accuracies, the images only one got right, and the verdict."""

    accuracies: list[tuple[float, float]]
    flips: list[int]
    mean_difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the mean accuracies differ by no more than the tolerance."""
        return abs(self.mean_difference) <= self.tolerance


def agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Agreement:
    """Compare which test images two variants got right, paired by seed.

    Why not demand equality: the two sum the same numbers in a different order, which moves a gate by a
    rounding error, and training lets that grow until images near a class border fall on the other side.
    The tolerance is McNemar's test. If neither variant is the better one, each of the K images (over all
    seeds) that only one of them got right is a fair coin, so the difference in right answers has mean 0 and
    standard deviation sqrt(K). Three of those, over the number of (seed, image) pairs, is the tolerance on
    the mean accuracy. It is zero where the variants never differ, and it does not hide a wrong gate: a
    variant that loses K images and gains none is caught from K = 10 on.

    Args:
        first, second: per seed, a bool tensor [test images]: was the image classified right?
    """
    flips = [int((a ^ b).sum()) for a, b in zip(first, second, strict=True)]
    pair_count = sum(len(a) for a in first)
    surplus = sum(int(b.sum()) - int(a.sum()) for a, b in zip(first, second, strict=True))
    return Agreement(
        [(a.double().mean().item(), b.double().mean().item()) for a, b in zip(first, second, strict=True)],
        flips,
        surplus / pair_count,
        3 * math.sqrt(sum(flips)) / pair_count,
    )


def peak_step_bytes(variant: str, digits: Digits) -> int:
    """Return the peak of the tensor bytes one training step adds to weights, momentum and data.

    Counts torch's allocator, not the process: a resident set is mostly libraries and hides the activations.
    """
    run = Run.start(variant, seed=0, step_count=2)
    images, labels = digits.train_images[:BATCH_SIZE], digits.train_labels[:BATCH_SIZE]
    train_step(run, images, labels)  # allocates the momentum
    run.optimizer.zero_grad(set_to_none=True)
    cpu = torch.profiler.ProfilerActivity.CPU
    with silenced_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        train_step(run, images, labels)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Point file descriptor 2 at nothing: the profiler writes its start and stop notices straight to it."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
