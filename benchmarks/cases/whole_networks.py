"""Whole networks as a user runs them: timm's network without and with se_ext, eager, compiled and in other runtimes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import se_ext.models
from benchmarks import summary
from benchmarks.cases import runtimes
from benchmarks.cases.networks import (
    ALLOWED,
    CHECKED,
    NetworkCase,
    check,
    fused,
    make_step,
    swapped,
    with_se_ext,
    without_se,
)
from benchmarks.experiments import INFERENCE, NETWORK_NAMES
from benchmarks.measure.allocator import DEFAULT, in_environment
from benchmarks.measure.case import Work, WrongResult
from benchmarks.measure.timing import Plan
from benchmarks.summary import BARE, COMPILED, EAGER, ONLY_BLOCKS, PLAIN, WITH


@dataclass(frozen=True)
class WholeNetworkCase(NetworkCase):
    """`runtimes` names those that are timed beside torch."""

    runtimes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.name, self.layout, self.mode, str(self.batch), *self.runtimes])

    def fallback(self) -> WholeNetworkCase | None:
        """Without the other runtimes, which may fail where torch works."""
        return dataclasses.replace(self, runtimes=()) if self.runtimes else None

    def measure(self, plan: Plan) -> summary.Row:
        """In a fresh process: a crash loses one row, and the row's memory is given back."""
        return in_environment(DEFAULT, self.measure_here, plan)

    def measure_here(self, plan: Plan) -> summary.Row:
        """Checks every variant, then times all of them."""
        network, images, labels = self.build()
        users, bare = user_s(self.name, network, self.layout), without_se(network)
        eager = {EAGER + change: net for change, net in users.items()}
        check({**eager, summary.WITHOUT: bare}, images[:CHECKED], labels[:CHECKED])
        others = runtimes.load(self.runtimes, network, images)
        inference = self.mode == INFERENCE
        torch._dynamo.reset()
        # Frozen weights are the best form of an inference that PyTorch has on a CPU.
        with torch.inference_mode(inference), torch._inductor.config.patch(freezing=inference):
            for name, infer in others.items():
                check_logits(name, logits(network, images), infer())
            compiled = {
                COMPILED + change: compile_copy(COMPILED + change, net, images)
                for change, net in {**users, BARE: bare}.items()
            }
            steps = {name: make_step(net, images, labels) for name, net in {**eager, **compiled}.items()}
            row = self.timed({**steps, **others}, plan)
        torch._dynamo.reset()
        return summary.add_times(row)


def work(text: str, *, mode: Sequence[str], batch: Sequence[int], quick: bool) -> Work:
    """A training step at one image is left out: a batch norm needs more than one value per channel."""
    versions = runtimes.installed()
    found, notes = runtimes.available(versions)
    cases = [
        WholeNetworkCase(name, "nhwc", one, size, found if one == INFERENCE else ())
        for name, one, size in itertools.product(NETWORK_NAMES, mode, batch)
        if text in name and (one == INFERENCE or size > 1)
    ]
    return Work(cases, notes, {"runtimes": versions})


def user_s(name: str, network: nn.Module, layout: str) -> dict[str, nn.Module]:
    """By what was done to it: timm's network, and what a user of se_ext has in its place, which is se_ext's own network
    where there is one, else its blocks. In inference also the blocks alone where there is one; their training step,
    which takes minutes, is a part of the experiment `networks`."""
    blocks = swapped(network, with_se_ext)
    if not hasattr(se_ext.models, name):
        return {PLAIN: network, WITH: blocks}
    own = {PLAIN: network, WITH: fused(name, network, layout)}
    return own if network.training else {**own, ONLY_BLOCKS: blocks}


def compile_copy(name: str, network: nn.Module, images: Tensor) -> nn.Module:
    """The network compiled: a copy, because freezing takes the weights, and because training changes them.

    Isolated, because torch otherwise keeps the code of all networks of a class in one list, and a call would try the
    guards of the others too. Raises WrongResult where its logits are others.
    """
    compiled: nn.Module = torch.compile(copy.deepcopy(network), isolate_recompiles=True)  # type: ignore[call-overload]
    check_logits(name, logits(network, images), logits(compiled, images))
    return compiled


def logits(network: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, network(images)).detach()


def check_logits(name: str, truth: Tensor, found: Tensor) -> None:
    """Raises WrongResult unless the logits are those of the eager network."""
    error = ((found - truth).norm() / truth.norm()).item()
    if not error <= ALLOWED:
        raise WrongResult(f"{name}: logits off by {error:.2e} from eager's; allowed {ALLOWED:.2e}")
