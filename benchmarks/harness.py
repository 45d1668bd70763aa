"""One row of the results: one workload in one layout, dtype, batch size and mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import summary
import torch
from problem import Problem, check, draw_problem, reference
from timing import OtherLoad, Plan, Samples, Step, interleave
from torch import Tensor
from variants import make_step
from workloads import Workload

SEED = 2017


@dataclass(frozen=True)
class Grid:
    """What is measured: every workload in every batch size, dtype, layout and mode, all variants in each."""

    workloads: Sequence[Workload]
    device: torch.device
    dtypes: Sequence[str]
    batches: Sequence[int]
    layouts: Sequence[str]
    modes: Sequence[str]
    variants: Sequence[str]

    def __len__(self) -> int:
        axes = (self.workloads, self.dtypes, self.batches, self.layouts, self.modes)
        return torch.Size(len(axis) for axis in axes).numel()


def measure(grid: Grid, plan: Plan, announce: Callable[[str], object]) -> Iterator[summary.Row]:
    """Yields one row after the other, announced before it is timed; raises WrongResult rather than time a
    wrong kernel."""
    # The dtypes side by side, because they are compared with each other too.
    for batch, workload, layout, dtype in itertools.product(grid.batches, grid.workloads, grid.layouts, grid.dtypes):
        problem = draw_problem(workload, layout, batch, getattr(torch, dtype), grid.device, SEED)
        expected = reference(problem)
        for mode in grid.modes:
            announce(f"{workload.name} {layout} {dtype} batch {batch} {mode}")
            yield measure_row(problem, expected, mode, grid.variants, plan)


def measure_row(
    problem: Problem, expected: dict[str, Tensor], mode: str, variants: Sequence[str], plan: Plan
) -> summary.Row:
    """Checks se_ext against the float64 formula, then times all variants interleaved."""
    steps = {}
    with torch.inference_mode(mode == "inference"):
        for name in variants:
            steps[name], results = make_step(name, problem, mode)
            if name == summary.OURS:
                check(problem, expected, results())
        return time_row(problem, mode, steps, plan)


def time_row(problem: Problem, mode: str, steps: dict[str, Step], plan: Plan) -> summary.Row:
    """Times the steps interleaved, right or wrong; `mode` says what each of them does with the problem."""
    # The first call may compile, in other processes; their time is no disturbance.
    for step in steps.values():
        step()
    load = OtherLoad()
    samples = interleave(steps, plan, lambda: _synchronize(problem.x.device))
    other_cpu_share = load.share()
    if any(name.startswith("compile") for name in steps):
        torch._dynamo.reset()
    workload = problem.workload
    return summary.add_metrics(
        {
            "name": workload.name,
            "device": problem.x.device.type,
            "dtype": str(problem.x.dtype).removeprefix("torch."),
            "batch": problem.x.shape[0],
            "layout": problem.layout,
            "mode": mode,
            "workload": asdict(workload),
            "bytes_x": problem.bytes_x,
            "floor_bytes": summary.FLOOR_PASSES[mode] * problem.bytes_x,
            "working_set_bytes": problem.working_set_bytes(mode),
            "other_cpu_share": rounded(other_cpu_share),
            "variants": recorded(samples),
        }
    )


def recorded(samples: Mapping[str, Samples]) -> dict[str, dict[str, Any]]:
    """The samples of each variant as a results file keeps them."""
    return {
        name: {
            "samples_us": [round(t, 3) for t in found.time_us],
            "calls_per_block": found.calls_per_block,
            "page_faults_per_call": round(found.page_faults_per_call, 4),
        }
        for name, found in samples.items()
    }


def rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
