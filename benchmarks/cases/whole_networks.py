"""Whole networks as a user runs them: timm's network without and with se_ext, eager and compiled."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import se_ext.models
from benchmarks import summary
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
from benchmarks.measure.case import Work, WrongResult
from benchmarks.measure.timing import Plan

NAMES = ("efficientnet_b0", "mobilenetv3_large_100", "seresnet50")


@dataclass(frozen=True)
class WholeNetworkCase(NetworkCase):
    def measure(self, plan: Plan) -> summary.Row:
        """Checks every variant, then times all of them."""
        network, images, labels = self.build()
        eager = {"eager": network, "eager_se_ext": user_s(self.name, network, self.layout)}
        check({**eager, summary.WITHOUT: without_se(network)}, images[:CHECKED], labels[:CHECKED])
        inference = self.mode == "inference"
        torch._dynamo.reset()
        # Frozen weights are the best form of an inference that PyTorch has on a CPU.
        with torch.inference_mode(inference), torch._inductor.config.patch(freezing=inference):
            compiled = {f"compile{name.removeprefix('eager')}": compile_copy(net) for name, net in eager.items()}
            for name, net in eager.items():
                check_logits(name, net, compiled[f"compile{name.removeprefix('eager')}"], images)
            steps = {name: make_step(net, images, labels) for name, net in {**eager, **compiled}.items()}
            row = self.timed(steps, plan)
        torch._dynamo.reset()
        return summary.add_times(row)


def work(text: str, *, mode: Sequence[str], batch: Sequence[int], quick: bool) -> Work:
    names = [name for name in NAMES if text in name]
    return Work([WholeNetworkCase(n, "nhwc", m, size) for n, m, size in itertools.product(names, mode, batch)])


def user_s(name: str, network: nn.Module, layout: str) -> nn.Module:
    """What a user of se_ext has in place of timm's network: se_ext's own where there is one, else its blocks."""
    return fused(name, network, layout) if hasattr(se_ext.models, name) else swapped(network, with_se_ext)


def compile_copy(network: nn.Module) -> nn.Module:
    """A copy, because freezing takes the weights, and because training changes them."""
    return cast(nn.Module, torch.compile(copy.deepcopy(network)))


def check_logits(name: str, eager: nn.Module, compiled: nn.Module, images: Tensor) -> None:
    """Raises WrongResult unless the compiled network has the eager one's logits."""
    truth, found = (net(images).detach() for net in (copy.deepcopy(eager), compiled))
    error = ((found - truth).norm() / truth.norm()).item()
    if not error <= ALLOWED:
        raise WrongResult(f"{name}: logits off by {error:.2e} when compiled; allowed {ALLOWED:.2e}")
