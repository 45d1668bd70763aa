"""Inputs larger than the allocator keeps, under its settings: blocks into a fresh output, and in place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.cases.blocks import make_step, time_row
from benchmarks.cases.problem import SEED, Problem, check, draw_problem, reference
from benchmarks.cases.workloads import Workload, read_workloads
from benchmarks.measure.allocator import ENVIRONMENTS, in_environment, spelled
from benchmarks.measure.case import Case, Work
from benchmarks.measure.timing import Plan
from benchmarks.summary import INPLACE, OURS, Row

# From 32 MB at most (mallopt(3), M_MMAP_THRESHOLD), glibc gives each tensor fresh pages and hands them back when it is
# freed; twice that is clear of any threshold.
LARGE_BYTES = 64 * 2**20
BATCH_STEP = 32
NAMES = (
    "64x56x56-m8-relu-sigmoid",
    "256x56x56-m16-relu-sigmoid",
    "512x28x28-m32-relu-sigmoid",
    "32x112x112-m8-silu-sigmoid",
)
VARIANTS = ("clone", "eager_conv", "eager_linear", "compile", OURS, INPLACE)
OPEN_GATE = 20.0  # sigmoid(20) is 1 in float32


@dataclass(frozen=True)
class LargeInputCase(Case):
    environment: str
    workload: Workload
    layout: str

    def measure(self, plan: Plan) -> Row:
        row = in_environment(self.environment, measure_here, self.workload, self.layout, plan)
        return {"environment": self.environment, **row}


def work(text: str, *, environment: Sequence[str], layout: Sequence[str], quick: bool) -> Work:
    named = {workload.name: workload for workload in read_workloads()[0]}
    found = [named[name] for name in NAMES if named[name].matches(text)]
    notes = [f"{name}: {spelled(ENVIRONMENTS[name])}" for name in environment]
    return Work([LargeInputCase(*parts) for parts in itertools.product(environment, found, layout)], notes)


def large_batch(workload: Workload) -> int:
    """The smallest multiple of BATCH_STEP for which a float32 x passes LARGE_BYTES."""
    bytes_per_sample = workload.channels * workload.points * torch.finfo(torch.float32).bits // 8
    return (LARGE_BYTES // (bytes_per_sample * BATCH_STEP) + 1) * BATCH_STEP


def measure_here(workload: Workload, layout: str, plan: Plan) -> Row:
    """The row in the environment that this process was started in."""
    batch = large_batch(workload)
    return measure_row(draw_problem(workload, layout, batch, torch.float32, torch.device("cpu"), SEED), plan)


def measure_row(problem: Problem, plan: Plan) -> Row:
    """Checks se_ext, also in place, against the float64 formula with the problem's weights; times all variants with
    weights that leave x as it is, since in place it is the output of the call before, which would fade away."""
    expected = reference(problem)
    with torch.inference_mode():
        for name in (OURS, INPLACE):
            copied = dataclasses.replace(problem, x=problem.x.clone())
            check(copied, expected, make_step(name, copied, "inference")[1]())
        del expected, copied
        timed = open_gate(problem)
        return time_row(timed, "inference", {name: make_step(name, timed, "inference")[0] for name in VARIANTS}, plan)


def open_gate(problem: Problem) -> Problem:
    """The problem with weights for which every gate is 1."""
    weights = {
        **problem.weights,
        "fc2.weight": torch.zeros_like(problem.weights["fc2.weight"]),
        "fc2.bias": torch.full_like(problem.weights["fc2.bias"], OPEN_GATE),
    }
    return dataclasses.replace(problem, weights=weights)
