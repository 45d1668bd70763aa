"""What the demo hands over: the table, the numbers and their origin, and files that are whole or absent."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import se_ext

from .train import Agreement, Run

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder inside `folder`; at a clean exit move its files up, else leave no trace."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, folder / file.name)


def summarize(runs: Sequence[Run], peak_bytes: int) -> dict[str, object]:
    """Return one table row: a variant's numbers over its seeds."""
    accuracies = [run.test_accuracy[-1] for run in runs]
    epoch_ms = np.concatenate([run.epoch_ms for run in runs])
    return {
        "parameters": sum(p.numel() for p in runs[0].net.parameters()),
        "test_accuracy_per_seed": accuracies,
        "test_accuracy_mean": float(np.mean(accuracies)),
        "test_accuracy_std": float(np.std(accuracies, ddof=1)) if len(runs) > 1 else None,
        "epoch_ms_median": float(np.median(epoch_ms)),
        "epoch_ms_quartiles": np.quantile(epoch_ms, (0.25, 0.75)).tolist(),
        "peak_step_bytes": peak_bytes,
        "epoch_ms": [run.epoch_ms for run in runs],
        "train_loss": [run.train_loss for run in runs],
        "test_accuracy": [run.test_accuracy for run in runs],
    }


def table(rows: dict[str, dict]) -> str:
    """Return the rows as aligned text."""
    cells = [("variant", "parameters", "test accuracy, %", "epoch, ms (quartiles)", "peak memory, MiB *")]
    for variant, row in rows.items():
        spread = "" if row["test_accuracy_std"] is None else f" ± {100 * row['test_accuracy_std']:.2f}"
        low, high = row["epoch_ms_quartiles"]
        epoch_ms = f"{row['epoch_ms_median']:.0f} ({low:.0f}-{high:.0f})"
        accuracy = f"{100 * row['test_accuracy_mean']:.2f}{spread}"
        peak_mib = f"{row['peak_step_bytes'] / 2**20:.2f}"
        cells.append((variant, f"{row['parameters']:,}", accuracy, epoch_ms, peak_mib))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    row_format = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    header, *lines = [row_format.format(*line) for line in cells]
    rule = "  ".join("-" * width for width in widths)
    note = "* most bytes of tensors alive at once in a training step, beyond weights, momentum and data"
    return "\n".join([header, rule, *lines, note])


def verdict(seeds: Sequence[int], result: Agreement) -> str:
    """Return the line that says whether the two SE variants reached the same accuracy."""
    per_seed = ", ".join(
        f"seed {seed} {100 * plain:.2f} and {100 * fused:.2f} % (flips: {flips})"
        for seed, (plain, fused), flips in zip(seeds, result.accuracies, result.flips, strict=True)
    )
    opening = "same seed, same accuracy" if result.holds else "SAME SEED, DIFFERENT ACCURACY"
    return (
        f"{opening}: plain PyTorch and se_ext: {per_seed}; "
        f"means differ by {100 * abs(result.mean_difference):.2f} points "
        f"(tolerance {100 * result.tolerance:.2f})"
    )


def provenance() -> dict[str, object]:
    """Return the machine, the versions, the thread count and the commit that the numbers belong to."""
    packages = ("torch", "scikit-learn", "numpy", "matplotlib")
    return {
        "machine": {"cpu": cpu_name(), "logical_cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "se_ext": se_ext.__version__,
            **{package: metadata.version(package) for package in packages},
        },
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git(*arguments: str) -> str | None:
    """Return what git prints about this checkout, or None where there is no git, checkout or commit."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
