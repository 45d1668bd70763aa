"""Inputs larger than the allocator keeps, timed in the environment that this process was started in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from harness import SEED, time_row
from problem import Problem, check, draw_problem, reference
from summary import INPLACE, OURS, Row
from timing import Plan
from variants import make_step
from workloads import Workload, read_workloads

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


def cases(text: str) -> list[tuple[Workload, int]]:
    """The workloads whose name or network has `text` in it, each with the batch that makes x large."""
    found = {workload.name: workload for workload in read_workloads()[0]}
    return [(found[name], large_batch(found[name])) for name in NAMES if found[name].matches(text)]


def large_batch(workload: Workload) -> int:
    """The smallest multiple of BATCH_STEP for which a float32 x passes LARGE_BYTES."""
    bytes_per_sample = workload.channels * workload.points * torch.finfo(torch.float32).bits // 8
    return (LARGE_BYTES // (bytes_per_sample * BATCH_STEP) + 1) * BATCH_STEP


def measure(text: str, layouts: Sequence[str], plan: Plan) -> Iterator[Row]:
    """Yields one row after the other; raises WrongResult rather than time a wrong kernel."""
    for workload, batch in cases(text):
        for layout in layouts:
            problem = draw_problem(workload, layout, batch, torch.float32, torch.device("cpu"), SEED)
            yield measure_row(problem, plan)


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
