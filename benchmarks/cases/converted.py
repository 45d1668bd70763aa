"""Whole networks of timm before and after se_ext.convert: time, memory, and what the conversion itself takes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import se_ext
from benchmarks import summary
from benchmarks.cases.networks import CHECKED, NetworkCase, check, make_step, se_blocks, without_se
from benchmarks.cases.whole_networks import compile_copy
from benchmarks.experiments import INFERENCE, NETWORK_NAMES, TRAIN
from benchmarks.measure.allocator import DEFAULT, in_environment
from benchmarks.measure.case import Work, WrongResult
from benchmarks.measure.timing import Plan
from benchmarks.summary import COMPILED, CONVERTED, EAGER, PLAIN
from se_ext.conversion.measure import peak_bytes

QUICK_SIZE = 64
COMPILED_LAYOUT = "nhwc"


@dataclass(frozen=True)
class ConvertedCase(NetworkCase):
    """`compiled`: also under torch.compile. `quick`: small images."""

    compiled: bool = False
    quick: bool = False

    def __str__(self) -> str:
        form = [COMPILED] if self.compiled else []
        return " ".join([self.name, self.layout, self.mode, str(self.batch), *form])

    @property
    def image_size(self) -> int:
        return QUICK_SIZE if self.quick else super().image_size

    def fallback(self) -> ConvertedCase | None:
        """Without the compiler, which may fail where eager works."""
        return dataclasses.replace(self, compiled=False) if self.compiled else None

    def measure(self, plan: Plan) -> summary.Row:
        """In a fresh process: so does a user's first call of convert, and a crash loses one row."""
        return in_environment(DEFAULT, self.measure_here, plan)

    def measure_here(self, plan: Plan) -> summary.Row:
        """Checks the converted network, then times all."""
        network, images, labels = self.build()
        converted, conversion_s = convert(network)
        eager = {EAGER + PLAIN: network, EAGER + CONVERTED: converted}
        check({**eager, summary.WITHOUT: without_se(network)}, images[:CHECKED], labels[:CHECKED])
        torch._dynamo.reset()
        with torch.inference_mode(self.mode == INFERENCE):
            compiled = {
                COMPILED + change: compile_copy(COMPILED + change, eager[EAGER + change], images)
                for change in ((PLAIN, CONVERTED) if self.compiled else ())
            }
            steps = {name: make_step(net, images, labels) for name, net in {**eager, **compiled}.items()}
            row = self.timed(steps, plan)
        torch._dynamo.reset()
        if self.mode == TRAIN:
            row["peak_bytes"] = {name: peak_bytes(steps[name], net) for name, net in eager.items()}
        return summary.add_times({**row, "se_blocks": len(se_blocks(network)), "conversion_s": conversion_s})


def work(text: str, *, mode: Sequence[str], batch: Sequence[int], layout: Sequence[str], quick: bool) -> Work:
    """A training step at one image is left out: a batch norm needs more than one value per channel."""
    return Work(
        [
            ConvertedCase(name, where, one, size, one == TRAIN and where == COMPILED_LAYOUT, quick)
            for name, where, one, size in itertools.product(NETWORK_NAMES, layout, mode, batch)
            if text in name and (one == INFERENCE or size > 1)
        ]
    )


def convert(network: nn.Module) -> tuple[nn.Module, float]:
    """A converted copy, and the seconds that the conversion took. Raises WrongResult unless every SE block is
    converted."""
    converted = copy.deepcopy(network)
    start = time.perf_counter()
    report = se_ext.convert(converted)
    seconds = time.perf_counter() - start
    missing = set(se_blocks(network)) - {row.path for row in report.converted}
    if missing:
        raise WrongResult(f"convert left SE blocks as they were: {', '.join(sorted(missing))}")
    return converted, seconds
