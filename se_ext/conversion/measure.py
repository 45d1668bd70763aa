"""What a network takes before and after a conversion: the times of its calls, which take turns, and the memory of a
training step."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .verify import tensors_in

Step = Callable[[], object]
# So small that the network stays what it was while its steps are timed.
LEARNING_RATE = 1e-4


class Spread(NamedTuple):
    median: float
    low: float
    """10 % of the values are lower"""
    high: float
    """10 % are higher"""


def inference(model: nn.Module, images: Tensor) -> Step:
    """A call that computes the outputs in evaluation."""
    model.eval()

    def step() -> None:
        with torch.inference_mode():
            model(images)

    return step


def training_step(model: nn.Module, images: Tensor) -> Step:
    """A call that goes forward, backward, and down the gradients with SGD."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = [t.square().mean() for t in tensors_in(model(images)) if t.requires_grad]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()

    return step


def interleaved(steps: Mapping[str, Step], rounds: Iterable[int]) -> dict[str, list[float]]:
    """The seconds of each step, a value a round; the first of a round is another each time. Each is called once before,
    and that call is not counted."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    for turn in rounds:
        for name in _turned(names, turn):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _turned(names: list[str], turn: int) -> Iterator[str]:
    first = turn % len(names)
    yield from names[first:]
    yield from names[:first]


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """Of the times of two steps, round by round, so that a slow moment of the machine hits both sides."""
    found = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, median, high = torch.tensor(found, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return Spread(median.item(), low.item(), high.item())


def peak_bytes(step: Step, model: nn.Module) -> int:
    """The most memory that tensors hold during a training step on the CPU: parameters, buffers, and what it allocates
    on top of them.

    Gradients are freed before the profile starts, as the step would do first: the profiler takes the size of a block
    that it did not see allocated from any earlier profile that saw one at that address.
    """
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = list(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    return max(held, default=0) + sum(t.nbytes for t in model.state_dict().values())
