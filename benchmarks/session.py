"""One run of the benchmark: options in; progress, tables and a results file out."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import allocator
import command
import compare
import facts
import results_file
import torch
from harness import SEED, Grid, measure
from problem import WrongResult
from timing import Plan
from tqdm import tqdm
from workloads import SKIP_REASON, Workload, read_workloads

QUICK = Plan(rounds=3, block_ms=0.3, warmup_ms=1.0)
METHOD = (
    "Variants take turns (A B C, B C A, ...), one block of calls each per round; samples_us has the time per "
    "call of each block, and a ratio is the median of the ratios round by round. Inputs are random and stay "
    "the same from call to call, so what fits in cache of working_set_bytes (x, y, weights; in training also "
    "their gradients) is warm. gb_per_s is 2 (training: 5; clone: 2) times bytes_x over the median time. "
    "Compile time is not included. se_ext's output and gradients matched the float64 formula on the same "
    "data before timing. other_cpu_share is the part of all CPU time that other programs used."
)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 1 if there was nothing to time or a result was wrong."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return command.fail("--device cuda: this torch finds no CUDA device")
    older = results_file.load(options.compare) if options.compare else None
    workloads, skipped = ([w for w in found if w.matches(options.workload)] for found in read_workloads())
    if not workloads:
        reason = SKIP_REASON if skipped else "no workload and no network has this in its name"
        return command.fail(f"--workload {options.workload}: {reason}")

    results = _header(options, skipped)
    for note in results["notes"]:
        print(note, file=sys.stderr)
    try:
        results["rows"] = _measure(options, workloads)
    except WrongResult as error:
        return command.fail(f"not timed, because the result is wrong: {error}")

    command.publish(results, options.out)
    if older:
        print(f"\n{compare.markdown(older, results)}")
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    return QUICK if options.quick else Plan(rounds=options.rounds)


def _measure(options: argparse.Namespace, workloads: list[Workload]) -> list[dict[str, Any]]:
    grid = Grid(
        workloads,
        torch.device(options.device),
        options.dtype,
        options.batch,
        options.layout,
        options.mode,
        options.variants,
    )
    rows = []
    with tqdm(total=len(grid), unit="row", file=sys.stderr) as bar:
        for row in measure(grid, _plan(options), announce=bar.set_description):
            rows.append(row)
            bar.update()
    return rows


def _notes(skipped: list[Workload]) -> list[str]:
    names = ", ".join(workload.name for workload in skipped)
    return [allocator.note(), *([f"skipped {names}: {SKIP_REASON}"] if skipped else [])]


def _header(options: argparse.Namespace, skipped: list[Workload]) -> dict[str, Any]:
    plan = _plan(options)
    settings = {
        "rounds": plan.rounds,
        "block_ms": plan.block_ms,
        "warmup_ms": plan.warmup_ms,
        "seed": SEED,
        "quick": options.quick,
    }
    return {
        **facts.header("blocks", torch.device(options.device), METHOD, _notes(skipped), settings),
        "skipped": [
            {"name": w.name, "networks": [use.model for use in w.uses], "reason": SKIP_REASON} for w in skipped
        ],
    }
