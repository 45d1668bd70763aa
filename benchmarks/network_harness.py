"""One row of networks.json: one network in one layout, batch size and mode, all variants interleaved."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import summary
import timm_networks
import torch
from harness import recorded, rounded
from problem import LAYOUTS
from timing import OtherLoad, Plan, Step, interleave
from torch import Tensor, nn
from torch.nn import functional

SEED = 2017
LEARNING_RATE = 1e-4  # so small that the network stays what it was while its steps are timed
BLOCK_MS = 10
CHECKED = 2  # images: batch norm in train mode needs more than one value per channel


@dataclass(frozen=True)
class Case:
    """What is timed: forward passes ("inference"), or forward + backward + SGD steps ("train")."""

    mode: str
    batch: int


CASES = (Case("inference", 1), Case("inference", 8), Case("train", 8))


@dataclass(frozen=True)
class Budget:
    """How long to measure a row: as many rounds as fit into `seconds`, but from `least` to `most`.

    On two shared cores a step of two seconds varies by a fifth from round to round: the median ratio of nine rounds
    errs by several percent.
    """

    seconds: float = 8.0
    least: int = 25
    most: int = 40


def measure(
    names: Sequence[str], layouts: Sequence[str], budget: Budget, announce: Callable[[str], object]
) -> Iterator[summary.Row]:
    """Yields one row after the other, announced before it is timed; raises WrongResult rather than time a network
    that computes something else."""
    for name, layout, case in itertools.product(names, layouts, CASES):
        announce(f"{name} {layout} batch {case.batch} {case.mode}")
        yield measure_row(name, layout, case, budget)


def measure_row(name: str, layout: str, case: Case, budget: Budget) -> summary.Row:
    """Checks the swapped networks against the one as it is, then times all of them."""
    images, labels = draw_images(case.batch, timm_networks.image_size(name), layout)
    network = timm_networks.build(name, layout, images, SEED)
    networks = timm_networks.variants(name, network.train(case.mode == "train"), layout, case.mode)
    timm_networks.check(networks, images[:CHECKED], labels[:CHECKED])
    with torch.inference_mode(case.mode == "inference"):
        steps = {variant: make_step(net, images, labels) for variant, net in networks.items()}
        plan = _plan(case, budget, steps)
        load = OtherLoad()
        samples = interleave(steps, plan, lambda: None)
        other_cpu_share = load.share()
    peaks = {variant: peak_bytes(step, networks[variant]) for variant, step in steps.items() if case.mode == "train"}
    return summary.add_costs(
        {
            "name": name,
            "device": images.device.type,
            "dtype": str(images.dtype).removeprefix("torch."),
            "batch": case.batch,
            "layout": layout,
            "mode": case.mode,
            "se_blocks": len(timm_networks.se_blocks(network)),
            "image_size": images.shape[-1],
            "other_cpu_share": rounded(other_cpu_share),
            "peak_bytes": peaks,
            "variants": recorded(samples),
        }
    )


def peak_bytes(step: Step, network: nn.Module) -> int:
    """The most memory that tensors hold during a step: parameters, buffers, and what it allocates on top of them.

    Gradients are freed before the profile starts, as the step would do first: the profiler takes the size of a block
    that it did not see allocated from any earlier profile that saw one at that address.
    """
    network.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = list(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    return max(held, default=0) + sum(t.nbytes for t in network.state_dict().values())


def _plan(case: Case, budget: Budget, steps: dict[str, Step]) -> Plan:
    """Blocks of one call where it is long enough for the clock. A call at more than one image passes through so much
    memory that it leaves nothing in a cache for the next one: no lead-in."""
    lead_in_calls = 1 if case.batch == 1 else 0
    start = time.perf_counter()
    steps["as_is"]()
    round_s = (time.perf_counter() - start) * (1 + lead_in_calls) * len(steps)
    rounds = min(budget.most, max(budget.least, int(budget.seconds / round_s)))
    return Plan(rounds, block_ms=BLOCK_MS, warmup_ms=0, lead_in_calls=lead_in_calls)


def draw_images(batch: int, size: int, layout: str) -> tuple[Tensor, Tensor]:
    """Random images [N, 3, size, size], and a class for each."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(memory_format=LAYOUTS[layout]), torch.arange(batch)


def make_step(network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """The call to time: a training step of a network in train mode, else a forward pass."""
    if not network.training:
        return lambda: network(images)
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step
